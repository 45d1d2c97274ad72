"""Attention written out in Python: two batched matrix products with a softmax between them.

What else lies between (scale, mask, soft cap, position bias, attention sinks, dropout) need not be understood: each
result that comes of the first product and still has the shape of a map is followed until the second product takes it.
On the way there, keys and values are traced back to what they were before each was repeated for its group of queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import AttentionCall

_MOST_FOLLOWED = 32  # tensors kept in sight; one attention needs about ten

What = TypeVar("What")
Sightings = list[tuple[Tensor, What]]


@dataclass(slots=True, eq=False)
class Map:
    """A query-key product on its way to be an attention map."""

    query: Tensor
    key: Tensor
    heads: tuple[int, int] | None  # (batch, heads), where the product has the two merged and they were seen apart
    scores: Tensor | None = None  # what softmax saw of the keys
    logits: Tensor | None = None  # what softmax saw, attention sinks included


@dataclass(slots=True, eq=False)
class Handwritten:
    """Tensors in sight since the last attention, each with what is known of it."""

    maps: Sightings[tuple[Map, bool]]  # True after softmax
    expanded: Sightings[tuple[Tensor, int]]  # x.expand(...) by a new dimension: x without it, and where it is
    repeated: Sightings[Tensor]  # keys or values with each head repeated: those before
    merged: Sightings[tuple[int, int]]  # (batch · heads, length, width): batch and heads
    packed: Sightings[Tensor]  # the heads of one query turned into queries of fewer heads: the query before

    def forget(self) -> None:
        for sightings in (self.maps, self.expanded, self.repeated, self.merged, self.packed):
            sightings.clear()

    def before_repetition(self, heads: Tensor) -> Tensor:
        """Keys or values without the copies that ``repeat_kv`` and its like made of them."""
        return _grouped(heads, _find(self.repeated, heads))

    def before_packing(self, query: Tensor) -> Tensor | None:
        return _find(self.packed, query)

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        """Keep ``result`` in sight if it is a map that comes of one in sight."""
        for position, argument in _tensors(args, kwargs):
            found = _find(self.maps, argument)
            if found is None or not _still_a_map(func, position, argument, result):
                continue
            what = found[0]
            if func in _JOINS and what.scores is None:
                what.scores = argument
            if argument.ndim == 3 and result.ndim == 4 and what.heads is None:
                what.heads = (result.shape[0], result.shape[1])
            _add(self.maps, result, found)
            return


def _find(sightings: Sightings[What], tensor: Any) -> What | None:
    for known, what in reversed(sightings):
        if known is tensor:
            return what
    return None


def _add(sightings: Sightings[What], tensor: Tensor, what: What) -> None:
    sightings.append((tensor, what))
    if len(sightings) > _MOST_FOLLOWED:
        del sightings[0]


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[int, Tensor]]:
    """Tensor arguments, those in a list with their place in it."""
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, Tensor):
            yield 0, argument
        elif isinstance(argument, (list, tuple)):
            yield from ((place, item) for place, item in enumerate(argument) if isinstance(item, Tensor))


def _still_a_map(func: Any, position: int, before: Tensor, after: Tensor) -> bool:
    if before.ndim < 3 or after.ndim < 3 or before.shape[-2] != after.shape[-2]:
        return False
    if func in _JOINS:  # attention sinks stand behind the keys
        return position == 0
    return before.shape[-1] == after.shape[-1] or func in _CUTS


def _grouped(heads: Tensor, source: Tensor | None) -> Tensor:
    """``source`` if ``heads`` is it with each head repeated."""
    if source is None or source.ndim != heads.ndim:
        return heads
    same = source.shape[:-3] == heads.shape[:-3] and source.shape[-2:] == heads.shape[-2:]
    return source if same and heads.shape[-3] % source.shape[-3] == 0 else heads


# --- the products and the softmax

Look = Callable[[Handwritten, tuple[Any, ...], dict[str, Any], Any], AttentionCall | None]


def _look_at_product(seen: Handwritten, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> AttentionCall | None:
    left, right = [operand for operand in (*args, *kwargs.values()) if isinstance(operand, Tensor)][-2:]
    if left.ndim < 3 or right.ndim < 3:
        return None
    found = _find(seen.maps, left)
    if found is not None and found[1]:
        return _attention(found[0], seen.before_repetition(right))
    key = _grouped(right.transpose(-2, -1), _find(seen.repeated, right))
    _add(seen.maps, result, (Map(left, key, _find(seen.merged, left)), False))
    return None


def _look_at_einsum(seen: Handwritten, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> AttentionCall | None:
    equation, operands = args[0], args[1] if isinstance(args[1], (list, tuple)) else args[1:]
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation or "." in equation:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    left, right = inputs.split(",")
    found = _find(seen.maps, operands[0])
    if found is not None and found[1]:
        value = _arranged(operands[1], right, left[:-2] + left[-1])
        return None if value is None else _attention(found[0], value)
    query = _arranged(operands[0], left, out[:-1])
    key = _arranged(operands[1], right, out[:-2] + out[-1:])
    if len(out) >= 3 and query is not None and key is not None:
        _add(seen.maps, result, (Map(query, key, None), False))
    return None


def _arranged(tensor: Tensor, letters: str, wanted: str) -> Tensor | None:
    """The dimensions in the wanted order and one more behind them; None if there are others."""
    rest = [letter for letter in letters if letter not in wanted]
    if len(rest) != 1 or len(letters) != len(wanted) + 1:
        return None
    return tensor.permute([letters.index(letter) for letter in (*wanted, *rest)])


def _look_at_softmax(seen: Handwritten, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    logits = args[0] if args else kwargs["input"]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    found = _find(seen.maps, logits)
    if found is None or dim not in (-1, logits.ndim - 1):
        return
    what = found[0]
    what.logits = logits
    if what.scores is None:
        what.scores = logits
    _add(seen.maps, result, (what, True))


def _attention(what: Map, value: Tensor) -> AttentionCall:
    scores, logits = what.scores, what.logits
    assert scores is not None and logits is not None
    heads = what.heads or ((scores.shape[0], scores.shape[1]) if scores.ndim == 4 else None)
    return AttentionCall(
        query=_four_dimensional(what.query, heads),
        key=_four_dimensional(what.key, heads),
        value=_four_dimensional(value, heads),
        scores=_four_dimensional(scores, heads),
        logits=None if logits.shape[-1] == scores.shape[-1] else _four_dimensional(logits, heads),
    )


def _four_dimensional(tensor: Tensor, heads: tuple[int, int] | None) -> Tensor:
    if tensor.ndim != 3:
        return tensor
    if heads is None or tensor.shape[0] != heads[0] * heads[1]:
        return tensor.unsqueeze(1)
    return tensor.reshape(*heads, *tensor.shape[1:])


# --- heads that are repeated, merged with the batch, or packed


def _look_at_expand(seen: Handwritten, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    narrow = args[0]
    if narrow.ndim != result.ndim or result.ndim not in (4, 5):
        return
    grown = [dim for dim in range(result.ndim) if narrow.shape[dim] != result.shape[dim]]
    if len(grown) == 1 and result.ndim == 5 and grown[0] > 1:
        _add(seen.expanded, result, (narrow.squeeze(grown[0]), grown[0]))
    elif grown == [1]:
        _add(seen.repeated, result, narrow)


def _look_at_reshape(seen: Handwritten, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    before = args[0]
    if seen.maps:
        seen.follow(torch.reshape, args, kwargs, result)
    if before.ndim == 5 and result.ndim == 4:
        source, dim = _find(seen.expanded, before) or (None, 0)
        shape = before.shape
        if source is not None and result.shape == (*shape[: dim - 1], shape[dim - 1] * shape[dim], *shape[dim + 1 :]):
            _add(seen.repeated, result, source)
    elif before.ndim == 4 and result.ndim == 3 and before.shape[2:] == result.shape[1:]:
        _add(seen.merged, result, (before.shape[0], before.shape[1]))
    elif before.ndim == 4 and result.ndim == 4 and _packs(before, result):
        _add(seen.packed, result, before)


def _packs(before: Tensor, after: Tensor) -> bool:
    """(B, H, 1, D) → (B, G, H/G, D): how transformers spares a generation step the repetition of keys."""
    batch, heads, queries, width = before.shape
    groups, packed = after.shape[1], after.shape[2]
    return queries == 1 < packed and heads == groups * packed and (batch, width) == (after.shape[0], after.shape[3])


def _look_at_repetition(seen: Handwritten, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    if result.ndim == 4:
        _add(seen.repeated, result, args[0])


def _look_at_transpose(seen: Handwritten, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    """A matrix transpose is the first product's own, and is undone there; any other one moves the heads."""
    source = _find(seen.repeated, args[0])
    if source is None:
        return
    first, second = (dim % source.ndim for dim in (*args[1:], *kwargs.values()))
    matrix = {first, second} == {source.ndim - 2, source.ndim - 1}
    _add(seen.repeated, result, source if matrix else source.transpose(first, second))


def _overlook(seen: Handwritten, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    """Of a transposed map the shape may tell nothing."""


LOOKS: dict[Any, Look] = {
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm), _look_at_product),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), _look_at_product),
    torch.einsum: _look_at_einsum,
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), _look_at_softmax),
    Tensor.expand: _look_at_expand,
    **dict.fromkeys((Tensor.reshape, Tensor.view, Tensor.flatten, torch.reshape, torch.flatten), _look_at_reshape),
    **dict.fromkeys((Tensor.repeat_interleave, torch.repeat_interleave), _look_at_repetition),
    **dict.fromkeys((Tensor.transpose, torch.transpose), _look_at_transpose),
    **dict.fromkeys((Tensor.permute, torch.permute), _overlook),
    **dict.fromkeys((Tensor.mT.__get__, Tensor.T.__get__), _overlook),  # type: ignore[attr-defined]
}
_JOINS = frozenset({torch.cat, torch.concat, torch.concatenate})
_CUTS = frozenset({Tensor.__getitem__, Tensor.narrow, torch.narrow})
