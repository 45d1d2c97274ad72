"""Attention written out in Python: two batched matrix products with a softmax between them.

What else lies between (scale, mask, soft cap, position bias, attention sinks, dropout) need not be understood: each result
that comes of the first product and still has the shape of a map is followed until the second product takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import AttentionCall

_MOST_FOLLOWED = 32  # tensors kept in sight; one attention needs about ten


@dataclass(slots=True, eq=False)
class _Map:
    """A query-key product on its way to be an attention map."""

    query: Tensor
    key: Tensor
    heads: tuple[int, int] | None = None  # (batch, heads), where the product has the two merged and they were seen apart
    scores: Tensor | None = None  # what softmax saw of the keys
    logits: Tensor | None = None  # what softmax saw, attention sinks included


class Handwritten:
    """Tensors in sight since the last attention, each with what it is."""

    def __init__(self) -> None:
        self.scores: list[tuple[Tensor, _Map]] = []
        self.weights: list[tuple[Tensor, _Map]] = []
        self.expanded: list[tuple[Tensor, tuple[Tensor, int]]] = []  # of x[:, :, None].expand(...): x, expanded dimension
        self.repeated: list[tuple[Tensor, Tensor]] = []  # keys or values, and those before each was repeated for its group
        self.merged: list[tuple[Tensor, tuple[int, int]]] = []  # (batch · heads, length, width): batch and heads
        self.packed: list[tuple[Tensor, Tensor]] = []  # one query of many heads, turned into many queries of fewer heads

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> AttentionCall | None:
        """Look at one finished call; the attention, if this was its last product."""
        look = _LOOKS.get(func)
        if look is not None:
            return look(self, args, kwargs, result)
        if (self.scores or self.weights) and isinstance(result, Tensor):
            self.follow(func, args, kwargs, result)
        return None

    def forget(self) -> None:
        for entries in (self.scores, self.weights, self.expanded, self.repeated, self.merged, self.packed):
            entries.clear()

    def before_repetition(self, heads: Tensor) -> Tensor:
        """Keys or values without the copies that ``repeat_kv`` and its like made of them."""
        return _grouped(heads, _find(self.repeated, heads))

    def before_packing(self, query: Tensor) -> Tensor | None:
        return _find(self.packed, query)

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        for entries in (self.scores, self.weights):
            for position, argument in _tensors(args, kwargs):
                found = _find(entries, argument)
                if found is None or not _still_a_map(func, position, argument, result):
                    continue
                if func in _JOINS and found.scores is None:
                    found.scores = argument
                if argument.ndim == 3 and result.ndim == 4 and found.heads is None:
                    found.heads = (result.shape[0], result.shape[1])
                _add(entries, result, found)
                return


def _find(entries: list[tuple[Tensor, Any]], tensor: Any) -> Any:
    for known, what in reversed(entries):
        if known is tensor:
            return what
    return None


def _add(entries: list[tuple[Tensor, Any]], tensor: Tensor, what: Any) -> None:
    entries.append((tensor, what))
    if len(entries) > _MOST_FOLLOWED:
        del entries[0]


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[tuple[int, Tensor]]:
    """Tensor arguments, those in a list with their place in it."""
    for argument in (*args, *kwargs.values()):
        items = argument if isinstance(argument, (list, tuple)) else (argument,)
        for position, item in enumerate(items):
            if isinstance(item, Tensor):
                yield position, item


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


# --- the products and the softmax ----------------------------------------------------------------------------------------


def _look_at_product(
    seen: Handwritten, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
) -> AttentionCall | None:
    left, right = [operand for operand in (*args, *kwargs.values()) if isinstance(operand, Tensor)][-2:]
    if left.ndim < 3 or right.ndim < 3:
        return None
    found = _find(seen.weights, left)
    if found is not None:
        return _attention(found, seen.before_repetition(right))
    key = _grouped(right.transpose(-2, -1), _find(seen.repeated, right))
    _add(seen.scores, result, _Map(left, key, heads=_find(seen.merged, left)))
    return None


def _look_at_einsum(
    seen: Handwritten, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
) -> AttentionCall | None:
    equation, operands = args[0], args[1] if isinstance(args[1], (list, tuple)) else args[1:]
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation or "." in equation:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    left, right = inputs.split(",")
    found = _find(seen.weights, operands[0])
    if found is not None:
        value = _arranged(operands[1], right, left[:-2] + left[-1], free=1)
        return None if value is None else _attention(found, value)
    if len(out) >= 3 and out[-2] in left and out[-1] in right:
        query = _arranged(operands[0], left, out[:-1], free=1)
        key = _arranged(operands[1], right, out[:-2] + out[-1], free=1)
        if query is not None and key is not None:
            _add(seen.scores, result, _Map(query, key))
    return None


def _arranged(tensor: Tensor, letters: str, wanted: str, *, free: int) -> Tensor | None:
    """The dimensions in the wanted order, ``free`` further ones last; None if there are others."""
    rest = [letter for letter in letters if letter not in wanted]
    if len(rest) != free or len(letters) != len(wanted) + free:
        return None
    return tensor.permute([letters.index(letter) for letter in (*wanted, *rest)])


def _look_at_softmax(seen: Handwritten, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    logits = args[0] if args else kwargs["input"]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    found = _find(seen.scores, logits)
    if found is None or dim not in (-1, logits.ndim - 1):
        return
    found.logits = logits
    if found.scores is None:
        found.scores = logits
    _add(seen.weights, result, found)


def _attention(found: _Map, value: Tensor) -> AttentionCall:
    scores, logits = found.scores, found.logits
    assert scores is not None and logits is not None
    heads = found.heads or ((scores.shape[0], scores.shape[1]) if scores.ndim == 4 else None)
    return AttentionCall(
        query=_four_dimensional(found.query, heads),
        key=_four_dimensional(found.key, heads),
        value=_four_dimensional(value, heads),
        scores=_four_dimensional(scores, heads),
        logits=None if logits.shape[-1] == scores.shape[-1] else _four_dimensional(logits, heads),
    )


def _four_dimensional(tensor: Tensor, heads: tuple[int, int] | None) -> Tensor:
    if tensor.ndim != 3:
        return tensor
    return tensor.unflatten(0, heads) if heads and tensor.shape[0] == heads[0] * heads[1] else tensor.unsqueeze(1)


# --- heads that are repeated or packed -----------------------------------------------------------------------------------


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
    if seen.scores or seen.weights:
        seen.follow(torch.reshape, args, kwargs, result)
    if before.ndim == 4 and result.ndim == 3 and before.shape[2:] == result.shape[1:]:
        _add(seen.merged, result, (before.shape[0], before.shape[1]))
    if result.ndim != 4:
        return
    source, dim = _find(seen.expanded, before) or (None, 0)
    if source is not None:
        shape = before.shape
        if result.shape == (*shape[: dim - 1], shape[dim - 1] * shape[dim], *shape[dim + 1 :]):
            _add(seen.repeated, result, source)
    elif before.ndim == 4 and before.shape[2] == 1 and result.shape[2] > 1 and before.shape[0] == result.shape[0]:
        _add(seen.packed, result, before)


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


_Look = Callable[[Handwritten, tuple[Any, ...], dict[str, Any], Any], AttentionCall | None]
_LOOKS: dict[Any, _Look] = {
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm), _look_at_product),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), _look_at_product),
    torch.einsum: _look_at_einsum,
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), _look_at_softmax),
    Tensor.expand: _look_at_expand,
    **dict.fromkeys((Tensor.reshape, Tensor.view, Tensor.flatten, torch.reshape, torch.flatten), _look_at_reshape),
    **dict.fromkeys((Tensor.repeat_interleave, torch.repeat_interleave), _look_at_repetition),
    **dict.fromkeys((Tensor.transpose, torch.transpose), _look_at_transpose),
    **dict.fromkeys((Tensor.permute, torch.permute, Tensor.mT.__get__, Tensor.T.__get__), _overlook),
}
_JOINS = frozenset({torch.cat, torch.concat, torch.concatenate})
_CUTS = frozenset({Tensor.__getitem__, Tensor.narrow, torch.narrow})
