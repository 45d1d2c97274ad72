"""Losses between attention maps ``[batch, heads, queries, keys]``.

A ``[batch, tokens]`` mask says which tokens are valid; an entry of the map counts where its query *and* its key are. A mask of
shape ``[batch, queries, keys]``, or that of the map, is taken entry by entry. Student and teacher need the same number of
heads. Half precision is computed and returned in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LossError
from .reduction import Reduction, check_student, check_tensor, fit_mask, reduce_valid, working_dtype
from .registry import register_loss


@register_loss("attention_mse", compares="attention")
def attention_mse(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    """Squared difference of the entries of two maps, of probabilities or of scores; the mean is over valid entries.

    Scores that both sides mask out (-inf, or the most negative number that Hugging Face writes for it) do not count. TinyBERT
    (Jiao et al., 2019, eq. 7) compares scores; its authors' code sets scores below -100 to zero on either side instead.
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

    Both are probabilities, as the selector ``attention`` gives them. MiniLM (Wang et al., 2020, eq. 4). What the teacher gives
    no weight costs nothing, so rows that may attend to no key, all zeros on both sides, cost nothing either.
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
