"""Losses between attention maps ``[batch, heads, queries, keys]``, and between relations of what attention is made of.

A ``[batch, tokens]`` mask says which tokens are valid; an entry of the map counts where its query *and* its key are. A mask of
shape ``[batch, queries, keys]``, or that of the map, is taken entry by entry. Maps need the same number of heads on both
sides. Half precision is computed and returned in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import LossError
from ..precision import product
from .classes import kl_divergence
from .reduction import (
    Reduction,
    check_student,
    check_teacher,
    check_tensor,
    fit_mask,
    reduce,
    reduce_valid,
    working_dtype,
    zero_invalid,
)
from .registry import register_loss


@register_loss("attention_mse", compares="attention")
def attention_mse(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    """Squared difference of the entries of two maps, of probabilities or of scores; the mean is over valid entries.

    Scores that both sides mask out (-inf, or the most negative number that Hugging Face writes for it) do not count. TinyBERT
    (Jiao et al., 2019, arXiv 1909.10351, eq. 7) compares scores; its authors' code sets scores below -100 to zero on either
    side instead.
    """
    student, teacher = _check("attention_mse", student, teacher)
    valid = _entries(mask, student)
    hidden = torch.finfo(torch.float16).min  # -65504: below it no score lies that was not masked
    both_hidden = (student.detach() <= hidden) & (teacher.detach() <= hidden)
    valid = ~both_hidden if valid is None else valid & ~both_hidden
    return reduce_valid(lambda s, t: (s - t).square(), student, teacher, valid=valid, reduction=reduction)


@register_loss("attention_kl", compares="attention")
def attention_kl(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    """KL(teacher ‖ student) of each query's distribution over the keys, in nats; the mean is over heads and valid queries.

    Both are probabilities, as the selector ``attention`` gives them. MiniLM (Wang et al., 2020, arXiv 2002.10957, eq. 4).
    What the teacher gives no weight costs nothing, so rows that may attend to no key, all zeros on both sides, cost nothing
    either.
    """
    student, teacher = _check("attention_kl", student, teacher)
    valid = _entries(mask, student)
    queries = None if valid is None else valid.any(-1)
    if valid is not None:
        student, teacher = student.masked_fill(~valid, 0), teacher.masked_fill(~valid, 0)

    def value(s: Tensor, t: Tensor) -> Tensor:
        tiny = torch.finfo(s.dtype).tiny
        return (t * (t.clamp_min(tiny).log() - s.clamp_min(tiny).log())).sum(-1)

    return reduce_valid(value, student, teacher, valid=queries, reduction=reduction)


@register_loss("relation_kl", compares="attention")
def relation_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    heads: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(teacher ‖ student) of how the tokens attend to each other through queries, keys or values alone.

    Both are ``[batch, heads, tokens, width]``, as the selectors ``query``, ``key`` and ``value`` give them. The heads of each
    side are concatenated and regrouped into ``heads`` relation heads, so number and width of the heads may differ between
    student and teacher; each side's relation is softmax(X Xᵀ / √d) with d its own width of a relation head. By default the
    heads stay as they are. The value is that of one row, the mean is over relation heads and valid tokens. A ``[batch,
    tokens]`` mask holds for queries *and* keys.

    Wang et al., *MiniLMv2*, 2020, arXiv 2012.15828, section 3.1; with the values of the last layer, MiniLM's value relation
    (2020, arXiv 2002.10957, section 3.2).

    Also raises ``LossError`` for tensors of other shapes, and for ``heads`` that do not divide both widths.
    """
    check_student("relation_kl", student, -1)
    check_teacher("relation_kl", teacher)
    same_tokens = student.ndim == teacher.ndim == 4 and student.shape[::2] == teacher.shape[::2]
    if not same_tokens:
        raise LossError(
            "relation_kl compares [batch, heads, tokens, width] of the same tokens, as the selectors query, key and value give "
            f"them; got student {list(student.shape)} and teacher {list(teacher.shape)}."
        )
    heads = _relation_heads(student, teacher, heads)
    dtype = working_dtype(student, teacher)
    tokens = None if mask is None else fit_mask(mask, (student.shape[0], student.shape[2]))

    def log_relation(side: Tensor) -> Tensor:
        joined = side.to(dtype).transpose(1, 2).flatten(2)  # [batch, tokens, all heads' widths]
        if tokens is not None:
            joined = zero_invalid(joined, tokens)
        regrouped = joined.reshape(*joined.shape[:2], heads, joined.shape[2] // heads).transpose(1, 2)
        scores = product(regrouped, regrouped.transpose(-1, -2)) / math.sqrt(regrouped.shape[-1])
        if tokens is not None:  # finite, so that a row without any valid key is not NaN
            scores = scores.masked_fill(~tokens[:, None, None, :], torch.finfo(scores.dtype).min)
        return scores.log_softmax(-1)

    values = kl_divergence(log_relation(teacher), log_relation(student))
    return reduce(values, None if tokens is None else tokens[:, None].expand(values.shape), reduction)


def _relation_heads(student: Tensor, teacher: Tensor, heads: int | None) -> int:
    widths = [side.shape[1] * side.shape[3] for side in (student, teacher)]
    if heads is None:
        if student.shape[1] == teacher.shape[1]:
            return student.shape[1]
        shared = [count for count in range(1, min(widths) + 1) if all(width % count == 0 for width in widths)]
        raise LossError(
            f"relation_kl got {student.shape[1]} heads of the student and {teacher.shape[1]} of the teacher; say into how many "
            f"relation heads both are regrouped, heads= one of {', '.join(map(str, shared))}."
        )
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or any(width % heads for width in widths):
        raise LossError(
            f"relation_kl got heads={heads!r}, which must divide the widths of all heads together, {widths[0]} of the student "
            f"and {widths[1]} of the teacher."
        )
    return heads


def _check(loss: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    check_student(loss, student, -1)
    check_tensor(loss, "teacher", teacher)
    if student.ndim != 4 or student.shape != teacher.shape:
        heads = student.ndim == teacher.ndim == 4 and student.shape[1] != teacher.shape[1]
        differ = f"the numbers of heads differ, {student.shape[1]} and {teacher.shape[1]}" if heads else "the shapes differ"
        raise LossError(
            f"{loss} compares two maps [batch, heads, queries, keys] of one shape; student {list(student.shape)} and teacher "
            f"{list(teacher.shape)}: {differ}."
        )
    dtype = working_dtype(student, teacher)
    return student.to(dtype), teacher.to(dtype)


def _entries(mask: Tensor | None, attention: Tensor) -> Tensor | None:
    """Which entries of the maps count: bool, of their shape."""
    if mask is None:
        return None
    batch, _, queries, keys = attention.shape
    if isinstance(mask, Tensor) and mask.shape == (batch, queries) and queries == keys:
        valid = fit_mask(mask, mask.shape)
        return (valid[:, None, :, None] & valid[:, None, None, :]).expand(attention.shape)
    if isinstance(mask, Tensor) and mask.shape == (batch, queries, keys):
        return fit_mask(mask, mask.shape)[:, None].expand(attention.shape)
    if isinstance(mask, Tensor) and mask.shape == attention.shape:
        return fit_mask(mask, mask.shape)
    shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    tokens = f"[{batch}, {queries}] for tokens, " if queries == keys else ""
    raise LossError(
        f"the mask {shape} does not fit the attention map {list(attention.shape)}; {tokens}[{batch}, {queries}, {keys}] for "
        "pairs of query and key would fit."
    )
