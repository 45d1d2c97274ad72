"""The one place where kernels are launched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Launched:
    """What a kernel was launched with: arguments by position, constants by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Tensor | int, ...]
    warps: int
    registers: int | None
    stages: int | None
    constants: dict[str, Any]


_recorders: list[list[Launched]] = []


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Tensor | int,
    warps: int,
    registers: int | None = None,
    stages: int | None = None,
    **constants: Any,
) -> None:
    """Launch a kernel on the current device and stream.

    Args:
        registers: how many a thread may have. Left to itself the assembler may put values into memory for the sake of a thread
            more, which is no gain where memory is what is waited for.
        stages: how many blocks of a loop are on their way from memory, where that is not left to the compiler.
    """
    options = {"num_warps": warps, "maxnreg": registers} | ({} if stages is None else {"num_stages": stages})
    if _recorders:
        _recorders[-1].append(Launched(kernel, grid, arguments, warps, registers, stages, constants))
    else:
        kernel[grid](*arguments, **options, **constants)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launched]]:
    """Within this, launches are written down and not carried out: so they can be looked at, and compiled, without a device."""
    _recorders.append([])
    try:
        yield _recorders[-1]
    finally:
        _recorders.pop()
