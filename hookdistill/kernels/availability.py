"""Whether kernels can run, and if not, why. Asking imports Triton, but only where there is a device for it."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from ..fused.attention import AttentionTask
from ..fused.relations import RelationTask
from ..fused.rows import RowTask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)
MOST_ROWS = 2**31 - 1
WIDEST_HEAD = 128
"""More of a head does not fit into the registers of a program."""
WIDEST_EXACT = 64
"""The same in float32 with a mask for each pair of query and key."""
WIDEST_RELATION = 256
"""The same of relation heads in half precision, of which there are fewer tensors at a time."""


def unavailable(device: torch.device) -> str | None:
    """Why no kernel runs on tensors of ``device``, and what would help; ``None`` if one does."""
    if device.type == "cpu":
        if interpreted():
            return None
        return (
            "needs tensors on a CUDA device. On the CPU kernels run under Triton's interpreter alone, which is for tests: set "
            "TRITON_INTERPRET=1 in the environment before Python starts"
        )
    if device.type != "cuda":
        return f"needs tensors on a CUDA device, not on {device.type!r}"
    return _unavailable(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _unavailable(index: int) -> str | None:
    if torch.version.hip is not None:
        return "is not tried on AMD's devices"
    if torch.cuda.get_device_capability(index) < LEAST_CAPABILITY:
        name = torch.cuda.get_device_name(index)
        return f"needs a device of compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} (Ampere) or later, not {name}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"needs Triton, which cannot be imported ({error}): pip install 'hookdistill[triton]'"
    return None


@functools.cache
def interpreted() -> bool:
    """Whether kernels run under the interpreter; decided once, when Triton is imported."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    try:
        from triton.language import sum as of_triton
        from triton.runtime.interpreter import InterpretedFunction

        from .device.sums import totals
    except ImportError:
        return False
    return isinstance(of_triton, InterpretedFunction) and isinstance(totals, InterpretedFunction)


def unsuited(task: RowTask | AttentionTask | RelationTask) -> str | None:
    """Why this task is better left to the closed forms, if it is; no matter on which device."""
    if not isinstance(task, RowTask):
        return _unsuited_maps(task)
    student = task.student
    if not student.numel():
        return "empty"
    if student.dtype not in DTYPES:
        return _said(student.dtype)
    if any(_wide(term.other) for term in task.terms):
        return _said(torch.float64)
    if student.numel() // student.shape[task.dim] > MOST_ROWS or student.shape[task.dim] > MOST_ROWS:
        return "too many rows"
    return None


def _unsuited_maps(task: AttentionTask | RelationTask) -> str | None:
    """The same of losses between maps."""
    if isinstance(task, AttentionTask):
        pairs = [(side.query, side.key) for side in (task.student, task.teacher)]
        widths, heads, most = [query.shape[3] for query, _ in pairs], task.student.query.shape[1], WIDEST_HEAD
    else:
        pairs = [(side, side) for side in (task.student, task.teacher)]
        widths, heads = [side.shape[1] * side.shape[3] // task.heads for side, _ in pairs], task.heads
        most = WIDEST_HEAD if any(side.dtype is torch.float32 for side, _ in pairs) else WIDEST_RELATION
    for query, key in pairs:
        if query.dtype not in DTYPES:
            return _said(query.dtype)
        if key.dtype is not query.dtype:
            return f"queries in {_said(query.dtype)}, keys in {_said(key.dtype)}"
    if max(widths) > most:
        return f"heads wider than {most}"
    by_pairs = isinstance(task, AttentionTask) and task.valid is not None and task.valid.ndim != 2
    if by_pairs and max(widths) > WIDEST_EXACT and any(query.dtype is torch.float32 for query, _ in pairs):
        return f"a mask of pairs and heads wider than {WIDEST_EXACT} in float32"
    query, key = pairs[0]
    return "too many rows" if query.shape[0] * heads * max(query.shape[2], key.shape[2]) > MOST_ROWS else None


def _wide(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float64


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
