"""What ``layer_map=`` of a match can be: a name, pairs written out, a function, or one of the records below."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import MatchError, did_you_mean, listing
from .assignment import Order
from .static import STATIC, explicit, positions_of

Positions = Callable[[int, int], Iterable[int]]


@dataclass(frozen=True, slots=True)
class Fixed:
    """A map that needs nothing but the numbers of layers."""

    given: str | Positions | tuple[tuple[int, int], ...]

    def pairs(self, teacher: int, student: int) -> list[tuple[int, int]]:
        """Pairs (teacher position, student position) for so many layers.

        Raises:
            MatchError: they cannot be paired in this way.
        """
        if isinstance(self.given, tuple):
            return explicit(self.given, teacher, student)
        return [(t, s) for s, t in enumerate(positions_of(self.given, teacher, student))]

    def __str__(self) -> str:
        return self.given if isinstance(self.given, str) else "pairs" if isinstance(self.given, tuple) else "function"


@dataclass(frozen=True, slots=True)
class MinLoss:
    """Each student layer learns from the teacher layer to which its loss is least: in each step anew, or fixed when the plan is
    made.

    In each step it is the dynamic layer-wise distillation of NNI (``DynamicLayerwiseDistiller``).
    """

    each_step: bool = True

    def __str__(self) -> str:
        return "min_loss" if self.each_step else "min_loss_fixed"


@dataclass(frozen=True, slots=True)
class Emd:
    """Each student layer learns from all teacher layers, in the shares of the cheapest transport: BERT-EMD (arXiv 2010.06133).

    Args:
        cost_attention: let layers that are cheap to move weigh more, step by step (section 3.3); else all weigh the same.
        temperature: of that attention; the authors' code has 1.
    """

    cost_attention: bool = True
    temperature: float = 1.0

    def __str__(self) -> str:
        return "emd"


@dataclass(frozen=True, slots=True)
class Attention:
    """Each student layer learns from a mixture of all teacher layers, which it attends to: ALP-KD (arXiv 2012.14022)."""

    def __str__(self) -> str:
        return "attention"


@dataclass(frozen=True, slots=True)
class Cka:
    """The matching of largest total CKA on the batch with which the plan is made, kept from then on.

    Args:
        order: ``"monotone"`` keeps the order of depth; ``"any"`` does not, and needs scipy.
    """

    order: Order = "monotone"

    def __str__(self) -> str:
        return "cka"


ByData = MinLoss | Emd | Attention | Cka
LayerMap = Fixed | ByData

BY_DATA: dict[str, ByData] = {
    "min_loss": MinLoss(),
    "min_loss_fixed": MinLoss(each_step=False),
    "emd": Emd(),
    "attention": Attention(),
    "cka": Cka(),
}
LAYER_MAPS = (*STATIC, *BY_DATA)


def as_layer_map(given: Any) -> LayerMap:
    """What ``layer_map=`` stands for.

    Raises:
        MatchError: it is none of these.
    """
    if isinstance(given, str):
        if given not in LAYER_MAPS:
            raise MatchError(f"unknown layer_map {given!r}.{did_you_mean(given, LAYER_MAPS)} Known are {listing(LAYER_MAPS)}")
        return BY_DATA[given] if given in BY_DATA else Fixed(given)
    if isinstance(given, ByData):
        return given
    if isinstance(given, (list, tuple)):
        if any(not isinstance(pair, (list, tuple)) or len(pair) != 2 for pair in given) or not given:
            raise MatchError(
                f"layer_map={given!r}: pairs are written (teacher position, student position), as in [(3, 0), (7, 1)]"
            )
        return Fixed(tuple((t, s) for t, s in given))
    if callable(given) and not isinstance(given, type):
        return Fixed(given)
    raise MatchError(
        f"layer_map={given!r} is none of {listing(LAYER_MAPS)}, nor a list of pairs (teacher position, student position), nor "
        "a function (teacher layers, student layers) -> positions, nor a record of hookdistill.layer_maps"
    )
