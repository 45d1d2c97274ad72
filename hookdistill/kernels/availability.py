"""Whether kernels can run, and if not, why. Asking imports Triton, but only where there is a device for it."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from ..fused.rows import RowTask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)
MOST_ROWS = 2**31 - 1


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


def unsuited(task: RowTask) -> str | None:
    """Why this task is better left to the closed forms, if it is; no matter on which device."""
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


def _wide(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float64


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
