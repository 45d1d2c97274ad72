"""Which teacher layer each student layer learns from, when both sides of a match are wildcards."""

from .assignment import Order as Order
from .assignment import matching as matching
from .kinds import LAYER_MAPS as LAYER_MAPS
from .kinds import Attention as Attention
from .kinds import ByData as ByData
from .kinds import Cka as Cka
from .kinds import Emd as Emd
from .kinds import Fixed as Fixed
from .kinds import LayerMap as LayerMap
from .kinds import MinLoss as MinLoss
from .kinds import as_layer_map as as_layer_map
from .mixing import mix as mix
from .static import STATIC as STATIC
from .static import chosen as chosen
from .static import explicit as explicit
from .static import first as first
from .static import last as last
from .static import skip as skip
from .static import spread as spread
from .static import uniform as uniform
from .transport import cost_attention as cost_attention
from .transport import transport as transport
