"""What the attention inside a module saw: its query, key and value, and the map it made of them.

``AttentionRecorder`` watches a module run; ``attention_scores`` and ``attention_probabilities`` make maps
of what it saw.
"""

from .calls import MAP_WORDS as MAP_WORDS
from .calls import AttentionCall as AttentionCall
from .calls import attention_probabilities as attention_probabilities
from .calls import attention_scores as attention_scores
from .calls import hidden_at as hidden_at
from .calls import map_of as map_of
from .recorder import AttentionRecorder as AttentionRecorder
