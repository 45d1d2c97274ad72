"""MiniLMv2's relations in blocks: softmax(X Xᵀ / √d) of neither model is ever whole in memory.

See ``losses.relation_kl`` for what it means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses.reduction import working_dtype
from .attention import MAP_BLOCK, map_blocks, queries_that_count
from .rows import gradient_dtype
from .scores import ScoreFunction, Scores, score_loss


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RelationTask:
    """A loss between the relations of two tensors ``[batch, heads, tokens, width]``, regrouped into ``heads`` heads.

    Args:
        valid: which tokens count, ``[batch, tokens]``.
        mean: divide by the number of relation rows that count.
        coefficient: what the gradient is multiplied by.
    """

    student: Tensor
    teacher: Tensor
    heads: int
    valid: Tensor | None = None
    mean: bool = True
    coefficient: float | Tensor = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class RelationLosses:
    """The value, without its coefficient; and with it the gradient by the student's tensor."""

    value: Tensor
    total: Tensor
    gradient: Tensor | None


def relation_losses(
    task: RelationTask, *, gradient: bool, most: int = MAP_BLOCK, function: ScoreFunction = score_loss
) -> RelationLosses:
    """Value and gradient, by blocks of at most ``most`` entries of a relation (but at least one row of it)."""
    dtype = working_dtype(task.student, task.teacher)
    student, teacher = task.student.detach(), task.teacher
    batch, _, tokens, _ = student.shape
    device = task.student.device
    value, slopes = torch.zeros((), dtype=dtype, device=device), None
    if gradient:
        slopes = torch.empty_like(student, dtype=dtype)
    for b in range(batch):
        valid = None if task.valid is None else task.valid[b]
        ours, theirs = (_regrouped(side[b], task.heads, dtype, valid) for side in (student, teacher))
        by_token = torch.zeros_like(ours) if gradient else None
        counted = queries_that_count(None if valid is None else valid.unsqueeze(0), 1, tokens)
        for _, h, q in map_blocks(counted, task.heads, tokens, most):
            s, t = (_scores(side, h, q, valid) for side in (ours, theirs))
            rows = None if valid is None else (valid[q].unsqueeze(-1) & valid).unsqueeze(0)
            part, slope = function(Scores("relation kl", -math.inf, -math.inf), s, t, rows, gradient)
            value += part
            if by_token is not None and slope is not None:
                if rows is not None:
                    slope *= rows
                slope *= ours.shape[-1] ** -0.5
                by_token[h, q] += slope @ ours[h]
                by_token[h] += slope.transpose(-2, -1) @ ours[h, q]
        if slopes is not None and by_token is not None:
            slopes[b] = _as_before(by_token, slopes[b])
    rows_counted = torch.tensor(float(batch * tokens), device=device) if task.valid is None else task.valid.sum()
    share = 1 / (rows_counted * task.heads).clamp_min(1) if task.mean else torch.ones_like(value)
    value = value * share
    if slopes is not None:
        slopes *= share * task.coefficient
        slopes = slopes.to(gradient_dtype(student))
    return RelationLosses(value, value * task.coefficient, slopes)


def _regrouped(side: Tensor, heads: int, dtype: torch.dtype, valid: Tensor | None) -> Tensor:
    """``[heads, tokens, width]`` of relation heads, zero at tokens that do not count."""
    joined = side.to(dtype).transpose(0, 1).flatten(1)
    if valid is not None:
        joined = joined.masked_fill(~valid.unsqueeze(-1), 0)
    return joined.view(joined.shape[0], heads, -1).transpose(0, 1).contiguous()


def _as_before(regrouped: Tensor, like: Tensor) -> Tensor:
    heads, tokens, width = like.shape
    return regrouped.transpose(0, 1).reshape(tokens, heads, width).transpose(0, 1)


def _scores(side: Tensor, h: slice, q: slice, valid: Tensor | None) -> Tensor:
    scores = torch.matmul(side[h, q], side[h].transpose(-2, -1))
    scores *= side.shape[-1] ** -0.5
    if valid is not None:
        scores.masked_fill_(~valid, torch.finfo(scores.dtype).min)
    return scores
