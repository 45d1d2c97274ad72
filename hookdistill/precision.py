"""Matrix products that autocast leaves alone."""

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in their own dtype, also where autocast would round them.

    Losses between relations, and similarities, subtract products that are nearly the same.
    """
    kind = left.device.type
    if not torch.amp.is_autocast_available(kind):
        return left @ right
    with torch.autocast(kind, enabled=False):
        return left @ right
