"""All comparisons, in the order of the table."""

from parity import on_features, on_logits, on_relations
from parity.comparing import CASES, KINDS, Case, Draw

__all__ = ["CASES", "KINDS", "Case", "Draw", "on_features", "on_logits", "on_relations"]
