"""Attention losses by Triton: what `fused.attention.attention_losses` does, with the queries and keys of both models read some
times over and nothing of a map written.

Four launches: which tiles hold anything, the sums of both softmaxes, the value with the gradient by the query, and the gradient
by the key. The host looks at no value, so that a call may be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..fused.attention import AttentionLosses, AttentionTask, Heads
from ..fused.rows import gradient_dtype
from . import maps
from .device import attention as kernels
from .device.maps import spans
from .launching import launch
from .maps import Blocks, Traits
from .tables import on_device

LOSSES = {"kl": maps.KL, "mse": maps.MSE, "scores mse": maps.SCORES}
CHUNK = 32
"""Entries of a mask that are looked at together, of each row."""
LIFTED = {maps.KL: 2.0**13, maps.MSE: 2.0**13, maps.SCORES: 0.25}
"""What slopes, times these, are multiplied with as float16: those by probabilities are at most 4, and most are tiny; those by
scores are at most four times the largest float16."""


def attention_losses_triton(task: AttentionTask, *, gradient: bool) -> AttentionLosses:
    """Value and gradient by query and key, in their shapes and dtypes but for float16, whose gradients are float32.

    Tensors whose rows are not dense are copied. What is allocated is linear in the numbers of queries and keys.
    """
    where = task.student.query.device
    with torch.no_grad(), torch.cuda.device(where if where.type == "cuda" else -1):
        return _losses(task, gradient=gradient)


def _losses(task: AttentionTask, *, gradient: bool) -> AttentionLosses:
    run = _Run(task, gradient=gradient)
    device = run.student.query.device
    coefficient = maps.on_the_device(task.coefficient, device)
    run.spans()
    share: float | Tensor = 1.0
    if run.loss == maps.SCORES:
        if task.mean:  # how many scores count is known once they are there
            run.values(None)
            share = maps.share(run.numbers.sum())
    else:
        run.sums()
        if task.mean:
            share = maps.share(_count(task))
    factor = maps.as_scalar(share * coefficient, device) if gradient else None
    if factor is not None or not (task.mean and run.loss == maps.SCORES):
        run.values(factor)
    if factor is not None:
        run.keys(factor)
    value = run.part.sum() * share
    return AttentionLosses(value, value * coefficient, run.by_query, run.by_key)


def _count(task: AttentionTask) -> float | Tensor:
    """How many queries, or entries, count."""
    batch, heads, queries, _ = task.student.query.shape
    entries = batch * heads * queries * task.student.key.shape[2]
    valid, of_queries = task.valid, task.kind == "kl"
    if valid is None:
        return batch * heads * queries if of_queries else entries
    if valid.ndim == 2:
        tokens = valid.sum(-1)
        return (tokens if of_queries else tokens.square()).sum() * heads
    if of_queries:
        return valid.any(-1).expand(batch, heads, queries).sum()
    return valid.sum() * (entries // valid.numel())


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """One model's attention, as kernels read it. ``base``: what scores are multiplied by."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    record: tuple[int, ...]
    traits: Traits

    @staticmethod
    def of(heads: Heads, *, base: float) -> _Side:
        query, key = maps.dense_rows(heads.query), maps.dense_rows(heads.key)
        strides = (*query.stride()[:3], *key.stride()[:3])
        traits = Traits.of(query.shape[3], [query, key], strides)
        mask: Tensor | None = None
        steps: tuple[int, ...] = (0, 0, 0, 0)
        if heads.is_causal:
            traits = replace(traits, kind=maps.CAUSAL)
        elif heads.mask is not None:
            mask = maps.readable_mask(heads.mask)
            one_for_all = not mask.ndim or mask.shape[-1] == 1
            mask = mask.expand(*query.shape[:3], key.shape[2])
            steps = mask.stride()
            traits = replace(
                traits,
                kind=maps.BOOL if mask.dtype is torch.uint8 else maps.ADDED,
                flat=steps[2] == 0,
                shared=steps[1] == 0,
                key_step=0 if one_for_all else 1,
                mask_unit=maps.aligned([mask], (*steps[:3], key.shape[2])),
            )
        record = maps.side_record(heads.scale * base, heads.never * base, heads.groups, *strides, *steps)
        return _Side(query, key, mask, record, traits)


class _Run:
    """A task laid out, and its launches, which leave to each other what is allocated here."""

    def __init__(self, task: AttentionTask, *, gradient: bool) -> None:
        self.loss = LOSSES[task.kind]
        softmax = self.loss != maps.SCORES
        sides = [_Side.of(side, base=maps.LOG2_E if softmax else 1.0) for side in (task.student, task.teacher)]
        self.student, self.teacher = sides
        query, key = self.student.query, self.student.key
        batch, heads, queries, _ = query.shape
        _, key_heads, keys, _ = key.shape
        which, valid, steps = _valid(task.valid, (batch, heads, queries, keys))
        self.tiles = Tiles.of(self.student.traits, self.teacher.traits, which)
        blocks, key_blocks = -(-queries // self.tiles.by_query.rows), -(-keys // self.tiles.by_key.rows)
        self.span_grid, self.grid, self.key_grid = (
            (batch * (blocks + key_blocks),),
            (batch * heads * blocks,),
            (batch * key_heads * key_blocks,),
        )
        self.by_query = torch.empty_like(query, dtype=gradient_dtype(query)) if gradient else None
        self.by_key = torch.empty_like(key, dtype=gradient_dtype(key)) if gradient else None
        table = on_device(
            (
                *self.student.record,
                *self.teacher.record,
                *(heads, queries, keys, blocks, key_blocks),
                *steps,
                *(stride for each in (self.by_query, self.by_key) for stride in _strides(each)),
            ),
            query.device,
        )

        def new(*shape: int, dtype: torch.dtype = torch.float32, needed: bool = True) -> Tensor:
            return query.new_empty(shape, dtype=dtype) if needed else table

        self.found = new(batch, blocks + key_blocks, 2, dtype=torch.int32)
        self.flags = new(batch, keys, dtype=torch.int32)
        self.sums_of = [new(batch, heads, queries, needed=softmax) for _ in sides]
        self.rests = new(batch, heads, queries, needed=softmax)
        self.part = new(*self.grid)
        self.numbers = new(*self.grid, dtype=torch.int32, needed=not softmax)
        self.table, self.valid = table, table if valid is None else valid
        self.masks = [table if side.mask is None else side.mask for side in sides]
        self.constants: dict[str, Any] = {"S": self.student.traits, "T": self.teacher.traits, "WHICH": which}

    def spans(self) -> None:
        """Find which tiles hold anything."""
        rows, key_rows = self.tiles.by_query.rows, self.tiles.by_key.rows
        constants = {**self.constants, "BOTH": self.loss == maps.SCORES, "ROWS": rows, "KEY_ROWS": key_rows, "CHUNK": CHUNK}
        launch(spans, self.span_grid, self.table, *self.masks, self.valid, self.found, self.flags, warps=4, **constants)

    def sums(self) -> None:
        """Compute the sums of both softmaxes."""
        self._launch(kernels.log_sums, self.grid, self.tiles.sums, *self.sums_of)

    def values(self, factor: Tensor | None) -> None:
        """Compute the parts of the value, and with the factor on it the gradient by the query."""
        out = self.table if self.by_query is None or factor is None else self.by_query
        arguments = (*self.sums_of, self.rests, self.table if factor is None else factor, out, self.part, self.numbers)
        self._launch(
            kernels.by_query, self.grid, self.tiles.by_query, *arguments, **self._slopes(out), GRADIENT=factor is not None
        )

    def keys(self, factor: Tensor) -> None:
        """Compute the gradient by the key."""
        assert self.by_key is not None
        arguments = (*self.sums_of, self.rests, factor, self.by_key)
        self._launch(kernels.by_key, self.key_grid, self.tiles.by_key, *arguments, **self._slopes(self.by_key))

    def _slopes(self, out: Tensor) -> dict[str, Any]:
        lift = LIFTED[self.loss] if self.student.query.dtype is torch.float16 else 1.0
        return {"LOSS": self.loss, "LIFT": lift, "OUT_UNIT": maps.aligned([out], _strides(out))}

    def _launch(self, kernel: Any, grid: tuple[int, ...], tile: Blocks, *arguments: Tensor, **constants: Any) -> None:
        sides = [(each.query, each.key, mask) for each, mask in zip((self.student, self.teacher), self.masks, strict=True)]
        constants |= {**self.constants, "ROWS": tile.rows, "COLUMNS": tile.columns}
        arguments = (self.table, *sides[0], *sides[1], self.valid, self.found, self.flags, *arguments)
        launch(kernel, grid, *arguments, warps=tile.warps, registers=maps.REGISTERS, stages=maps.STAGES, **constants)


@dataclass(frozen=True, slots=True)
class Tiles:
    """In what blocks the kernels go; the first two share their rows."""

    sums: Blocks
    by_query: Blocks
    by_key: Blocks

    @staticmethod
    def of(student: Traits, teacher: Traits, which: int) -> Tiles:
        """The largest that were found in which no thread keeps anything in memory for want of registers."""
        narrow = max(student.padded, teacher.padded) <= 64
        if student.exact or teacher.exact:
            if narrow:
                return Tiles(Blocks(32, 32, 8), Blocks(32, 16, 8), Blocks(16, 16, 4))
            return Tiles(Blocks(16, 32, 8), Blocks(16, 16, 8), Blocks(16, 16, 8))
        rows = 128 if narrow else 64
        if which == maps.PAIRS or student.scattered or teacher.scattered:
            return Tiles(Blocks(rows, 64, 8), Blocks(rows, 16, 8), Blocks(128, 16, 8))
        if narrow or (student.flat and teacher.flat):
            return Tiles(Blocks(128, 64, 8), Blocks(128, 32, 8), Blocks(128, 32, 8))
        return Tiles(Blocks(64, 64, 8), Blocks(64, 32, 8), Blocks(128, 16, 8))


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if tensor is None or tensor.ndim < 4 else tensor.stride()[:3]


def _valid(valid: Tensor | None, shape: tuple[int, ...]) -> tuple[int, Tensor | None, tuple[int, ...]]:
    """How a mask says what counts, the mask as bytes, and its strides."""
    if valid is None:
        return maps.ALL, None, (0, 0, 0, 0)
    valid = maps.as_bytes(valid)
    if valid.ndim == 2:
        valid = valid.contiguous()
        return maps.TOKENS, valid, (shape[2], 0, 0, 0)
    valid = valid.expand(shape)
    return maps.PAIRS, valid, valid.stride()
