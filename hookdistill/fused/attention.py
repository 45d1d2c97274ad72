"""Losses between attention maps, from queries and keys: no map of either model is ever whole in memory.

A block is some heads and queries of one example against all keys. Its scores are made by a matrix product for each model,
turned into a loss and into the gradient of the student's scores in place, and the gradient goes back into queries and keys by
two more products. What happens between is `scores.score_loss`.

Letters: B batch, H query heads, G key heads (H, or fewer if grouped), Q queries, K keys, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..losses.reduction import working_dtype
from .rows import gradient_dtype
from .scores import ScoreFunction, Scores, score_count, score_loss

Kind = Literal["kl", "mse", "scores mse"]

MAP_BLOCK = 1 << 18
"""Entries of a block of a map: a megabyte in float32, which stays in the cache."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Heads:
    """The attention of one model: its scores are ``query @ keyᵀ * scale + mask``.

    Args:
        query: ``[B, H, Q, D]``.
        key: ``[B, G, K, D]``.
        mask: bool, true where a query may attend, or additive; broadcasts to ``[B, H, Q, K]``.
        is_causal: query i sees keys 0 to i.
        never: the score at and below which a key counts as hidden; a query with no other key attends to nothing.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None = None
    is_causal: bool = False
    scale: float = 1.0
    never: float = -1e8

    @property
    def groups(self) -> int:
        """How many query heads share a key head."""
        return self.query.shape[1] // self.key.shape[1]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AttentionTask:
    """A loss between two attentions with equal numbers of heads, queries and keys.

    Args:
        valid: which entries count, bool: ``[B, T]`` for queries and keys alike, or broadcastable to ``[B, H, Q, K]``.
        mean: divide by the number of queries (``kl``) or entries (the others) that count.
        coefficient: what the gradient is multiplied by.
    """

    kind: Kind
    student: Heads
    teacher: Heads
    valid: Tensor | None = None
    mean: bool = True
    coefficient: float | Tensor = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class AttentionLosses:
    """The value, without its coefficient; and with it the gradient by the student's query and key."""

    value: Tensor
    total: Tensor
    query: Tensor | None
    key: Tensor | None


def attention_losses(
    task: AttentionTask, *, gradient: bool, most: int = MAP_BLOCK, function: ScoreFunction = score_loss
) -> AttentionLosses:
    """Value and gradient, by blocks of at most ``most`` entries of a map (but at least one row of it)."""
    ours, theirs = task.student, task.teacher
    dtype = working_dtype(ours.query, theirs.query)
    batch, heads, queries, _ = ours.query.shape
    keys = ours.key.shape[2]
    value = torch.zeros((), dtype=dtype, device=ours.query.device)
    count = torch.zeros_like(value)
    by_query = torch.zeros(ours.query.shape, dtype=dtype, device=value.device) if gradient else None
    by_key = torch.zeros(ours.key.shape, dtype=dtype, device=value.device) if gradient else None
    counted = queries_that_count(task.valid, batch, queries)
    for b, h, q in map_blocks(counted, heads, keys, most):
        s, our_query, our_key = _scores(ours, b, h, q, dtype)
        t, _, _ = _scores(theirs, b, h, q, dtype)
        valid = None if task.valid is None else _valid(task.valid, b, h, q)
        count += score_count(task.kind, s, t, valid)
        part, slope = function(Scores(task.kind, ours.never, theirs.never), s, t, valid, gradient)
        value += part
        if by_query is not None and by_key is not None and slope is not None:
            slope *= ours.scale
            by_query[b, h, q] = slope @ our_key
            _add_keys(by_key[b], h, ours.groups, slope.transpose(-2, -1) @ our_query)
    share = 1 / count.clamp_min(1) if task.mean else torch.ones_like(value)
    value *= share
    for slopes in (by_query, by_key):
        if slopes is not None:
            slopes *= share * task.coefficient
    return AttentionLosses(
        value,
        value * task.coefficient,
        None if by_query is None else by_query.to(gradient_dtype(ours.query)),
        None if by_key is None else by_key.to(gradient_dtype(ours.key)),
    )


def map_blocks(counted: Sequence[tuple[int, int]], heads: int, keys: int, most: int) -> Iterator[tuple[int, slice, slice]]:
    """Examples, heads and queries that make blocks of a map of about ``most`` entries.

    Args:
        counted: for each example the first query that counts, and the one behind the last.
    """
    rows = max(1, most // max(keys, 1))
    for b, (first, last) in enumerate(counted):
        heads_each, queries_each = max(1, rows // max(last - first, 1)), min(rows, last - first)
        for h in range(0, heads, heads_each):
            for q in range(first, last, max(queries_each, 1)):
                yield b, slice(h, min(h + heads_each, heads)), slice(q, min(q + queries_each, last))


def queries_that_count(valid: Tensor | None, batch: int, queries: int) -> list[tuple[int, int]]:
    """For each example the first query that counts, and the one behind the last; all, where asking would wait for a device."""
    if valid is None or valid.ndim != 2 or valid.device.type != "cpu":
        return [(0, queries)] * batch
    positions = torch.arange(queries)
    first = torch.where(valid, positions, queries).amin(-1)
    behind = torch.where(valid, positions + 1, 0).amax(-1)
    return [(start, max(start, end)) for start, end in zip(first.tolist(), behind.tolist(), strict=True)]


def _scores(side: Heads, b: int, h: slice, q: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Scores ``[heads, queries, keys]`` of a block, with the query and key ``[heads, …, D]`` that they are made of."""
    query = side.query[b, h, q].to(dtype)
    groups = side.groups
    if groups == 1:
        key = side.key[b, h].to(dtype)
    else:
        key = side.key[b, torch.arange(h.start, h.stop, device=query.device) // groups].to(dtype)
    scores = torch.matmul(query, key.transpose(-2, -1))
    if side.scale != 1:
        scores *= side.scale
    if side.is_causal:
        index = torch.arange(q.start, q.stop, device=scores.device)
        later = torch.arange(scores.shape[-1], device=scores.device) > index.unsqueeze(-1)
        scores.masked_fill_(later, -math.inf)
    elif side.mask is not None:
        mask = _part(side.mask, b, h, q)
        if mask.dtype is torch.bool:
            scores.masked_fill_(~mask, -math.inf)
        else:
            scores += mask
    return scores, query, key


def _part(mask: Tensor, b: int, h: slice, q: slice) -> Tensor:
    """What a mask that broadcasts to ``[B, H, Q, K]`` says for a block: it broadcasts to ``[heads, queries, keys]``."""
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    mask = mask[b if mask.shape[0] > 1 else 0]
    if mask.shape[0] > 1:
        mask = mask[h]
    return mask[:, q] if mask.shape[1] > 1 else mask


def _valid(valid: Tensor, b: int, h: slice, q: slice) -> Tensor:
    if valid.ndim == 2:  # of tokens
        return (valid[b, q].unsqueeze(-1) & valid[b]).unsqueeze(0)
    return _part(valid, b, h, q)


def _add_keys(by_key: Tensor, h: slice, groups: int, slopes: Tensor) -> None:
    if groups == 1:
        by_key[h] += slopes
    else:
        by_key.index_add_(0, torch.arange(h.start, h.stop, device=slopes.device) // groups, slopes)
