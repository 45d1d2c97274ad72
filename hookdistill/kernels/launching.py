"""The one place where kernels are launched."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Tensor | int, warps: int, **constants: Any) -> None:
    """Launch a kernel on the current device and stream, with arguments by position and constants by name."""
    kernel[grid](*arguments, num_warps=warps, **constants)
