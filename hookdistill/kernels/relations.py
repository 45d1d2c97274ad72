"""MiniLMv2's relations by Triton: what `fused.relations.relation_losses` does, with nothing of a relation written.

Three launches: which tiles hold anything, the sums of both softmaxes, and the value with the gradient.

A relation head is read where it stands, in part of a head or across several that stand joined, as ``[batch, tokens, heads *
width]`` seen as ``[batch, heads, tokens, width]`` has them. Heads that do not stand joined, as rotary embeddings leave them,
and of which a relation head takes several or an odd part, are copied to one joined buffer, as large as they.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..fused.relations import RelationLosses, RelationTask
from ..fused.rows import gradient_dtype
from . import maps
from .device import relations as kernels
from .device.maps import spans
from .launching import launch
from .maps import Blocks, Traits
from .tables import on_device

CHUNK = 128
"""Entries of a mask that are looked at together."""
LIFTED = 2.0**13
"""What slopes, which are at most 2, are multiplied by while they are float16, so that the smallest do not vanish."""
NEVER = float("-inf")


def relation_losses_triton(task: RelationTask, *, gradient: bool) -> RelationLosses:
    """Value and gradient, in the student's shape and dtype but for float16, whose gradient is float32."""
    where = task.student.device
    with torch.no_grad(), torch.cuda.device(where if where.type == "cuda" else -1):
        return _losses(task, gradient=gradient)


def _losses(task: RelationTask, *, gradient: bool) -> RelationLosses:
    student, teacher = (_Side.of(side, task.heads) for side in (task.student, task.teacher))
    batch, own_heads, tokens, own_width = task.student.shape
    heads, width = task.heads, student.traits.width
    dtype, device = gradient_dtype(task.student), task.student.device
    tile = block(student.traits, teacher.traits)
    blocks = -(-tokens // tile.rows)
    valid = None if task.valid is None else maps.as_bytes(task.valid).contiguous()
    joined = own_heads * own_width
    strides = (tokens * joined, width, joined)
    numbers = (heads, tokens, tokens, blocks, 0, tokens, 0, 0, 0, *strides, 0, 0, 0)
    table = on_device((*student.record, *teacher.record, *numbers), device)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    found = new(batch, blocks, 2, dtype=torch.int32)
    sums = [new(batch, heads, tokens) for _ in range(2)]
    part = new(batch * heads * blocks)
    slopes = new(batch, tokens, joined, dtype=dtype) if gradient else None

    mask = table if valid is None else valid
    sides: dict[str, Any] = {"S": student.traits, "T": teacher.traits, "WHICH": maps.ALL if valid is None else maps.TOKENS}
    both: dict[str, Any] = {"BOTH": True, "ROWS": tile.rows, "KEY_ROWS": tile.rows, "CHUNK": CHUNK}
    launch(spans, (batch * blocks,), table, table, table, mask, found, table, warps=4, **sides, **both)
    tiles = {**sides, "ROWS": tile.rows, "COLUMNS": tile.columns}
    options: dict[str, Any] = {"warps": tile.warps, "registers": maps.REGISTERS, "stages": maps.STAGES}
    read = (table, student.tensor, teacher.tensor, mask, found, *sums)
    launch(kernels.relation_sums, part.shape, *read, **options, **tiles)

    coefficient = maps.on_the_device(task.coefficient, device)
    counted = batch * tokens * heads if task.valid is None else task.valid.sum() * heads
    share = maps.share(counted) if task.mean else 1.0
    factor = maps.as_scalar(share * coefficient, device) if gradient else table
    constants: dict[str, Any] = {
        **tiles,
        "GRADIENT": gradient,
        "LIFT": LIFTED if task.student.dtype is torch.float16 else 1.0,
        "OUT_UNIT": 1 if slopes is None else maps.aligned([slopes], strides),
    }
    out = table if slopes is None else slopes
    launch(kernels.relation_slopes, part.shape, *read, factor, out, part, **options, **constants)
    value = part.sum() * share
    if slopes is not None:
        slopes = slopes.view(batch, tokens, own_heads, own_width).transpose(1, 2)
    return RelationLosses(value, value * coefficient, slopes)


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """One model's tensor, as kernels read it."""

    tensor: Tensor
    record: tuple[int, ...]
    traits: Traits

    @staticmethod
    def of(tensor: Tensor, heads: int) -> _Side:
        tensor, split, strides = regrouped(tensor.detach(), heads)
        width = tensor.shape[1] * tensor.shape[3] // heads
        traits = Traits.of(width, [tensor], strides if split == 1 else (*strides, width))
        record = maps.side_record(width**-0.5 * maps.LOG2_E, NEVER, split, *strides)
        return _Side(tensor, record, traits)


def regrouped(tensor: Tensor, heads: int) -> tuple[Tensor, int, tuple[int, int, int]]:
    """A tensor ``[batch, heads, tokens, width]``, or a copy of it, as so many relation heads: how many of them share one of its
    heads, and the strides of examples, of heads, and of tokens."""
    _, own_heads, _, own_width = tensor.shape
    width = own_heads * own_width // heads
    by_example, by_head, by_token, by_feature = tensor.stride()
    if by_feature == 1 or own_width == 1:
        if own_heads == 1 or by_head == own_width:
            return tensor, 1, (by_example, width, by_token)
        if own_width % width == 0:
            return tensor, own_width // width, (by_example, by_head, by_token)
    return regrouped(tensor.transpose(1, 2).contiguous().transpose(1, 2), heads)


def block(student: Traits, teacher: Traits) -> Blocks:
    """The largest tile in which no thread keeps anything in memory for want of registers."""
    widest = max(student.padded, teacher.padded)
    if student.exact or teacher.exact:
        return Blocks(32, 32 if widest <= 64 else 16, 8)
    if widest > 128:
        return Blocks(64, 16, 8)
    return Blocks(128, 32, 8) if widest > 64 else Blocks(64, 64, 4)
