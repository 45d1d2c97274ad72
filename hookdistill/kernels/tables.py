"""Numbers for kernels, on the device: uploaded when they change, and never waited for."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

KEPT = 128
"""How many tables are remembered. A step with the same tensors at the same addresses uploads nothing."""
ARENA = 1 << 17
"""Numbers of host memory set aside for CUDA graphs, which read it whenever they are replayed: a step takes some hundred."""

_uploaded: OrderedDict[tuple[int, int, tuple[int, ...]], Tensor] = OrderedDict()


def on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """A tensor of 64-bit integers, in the current stream; it is not to be changed."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    if torch.cuda.is_current_stream_capturing():
        # An upload that is captured is not carried out now, so that nobody else can use it.
        return _arena.take(numbers).to(device, non_blocking=True)
    _arena.prepare()
    stream = torch.cuda.current_stream(device)
    key = (stream.device_index, stream.cuda_stream, numbers)
    table = _uploaded.get(key)
    if table is None:
        table = torch.tensor(numbers, dtype=torch.int64).pin_memory().to(device, non_blocking=True)
        _uploaded[key] = table
        if len(_uploaded) > KEPT:
            _uploaded.popitem(last=False)
    else:
        _uploaded.move_to_end(key)
    return table


class _Arena:
    """Pinned host memory that is never given back; it is there before a capture begins, in which it could not be made."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.full: list[Tensor] = []
        self.used = 0

    def prepare(self) -> None:
        if self.memory is None:
            self.memory = torch.empty(ARENA, dtype=torch.int64, pin_memory=True)

    def take(self, numbers: tuple[int, ...]) -> Tensor:
        if self.memory is None or self.used + len(numbers) > self.memory.numel():
            if self.memory is not None:
                self.full.append(self.memory)
            self.memory = torch.empty(max(ARENA, len(numbers)), dtype=torch.int64, pin_memory=True)
            self.used = 0
        taken = self.memory[self.used : self.used + len(numbers)]
        self.used += len(numbers)
        return taken.copy_(torch.tensor(numbers, dtype=torch.int64))


_arena = _Arena()
