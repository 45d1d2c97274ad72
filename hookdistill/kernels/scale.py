"""Gradients times what comes from above, in one launch for all of a dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .availability import DTYPES
from .device.scale import scale
from .features import TYPES
from .launching import launch
from .layout import ALIGNMENT
from .tables import on_device

BLOCK = 4096
PROGRAMS_OF_A_PROCESSOR = 4
INTERPRETED_PROGRAMS = 3


def scale_triton(gradients: Sequence[Tensor], factor: Tensor, *, in_place: bool) -> list[Tensor]:
    """The gradients times ``factor``, a scalar on their device which the host does not read.

    In place the kernel returns at once where the factor is one. Tensors with gaps, of other dtypes or not on 16 bytes are left
    to PyTorch.
    """
    scaled = list(gradients)
    fit = [number for number, gradient in enumerate(gradients) if _fits(gradient)]
    rest = [number for number, gradient in enumerate(gradients) if not _fits(gradient)]
    if not in_place:
        for number in fit:
            scaled[number] = torch.empty_like(gradients[number])
    for device, dtype in dict.fromkeys((gradients[number].device, gradients[number].dtype) for number in fit):
        here = [number for number in fit if (gradients[number].device, gradients[number].dtype) == (device, dtype)]
        pairs = [(gradients[number], scaled[number]) for number in here]
        with torch.cuda.device(device if device.type == "cuda" else -1):
            _scale(pairs, factor.detach().to(device, torch.float32), dtype, copy=not in_place)
    for number in rest:
        by = factor.to(gradients[number].device)
        scaled[number] = gradients[number].mul_(by) if in_place else gradients[number] * by
    return scaled


def _scale(pairs: Sequence[tuple[Tensor, Tensor]], factor: Tensor, dtype: torch.dtype, *, copy: bool) -> None:
    device = factor.device
    programs = INTERPRETED_PROGRAMS
    if device.type == "cuda":
        programs = PROGRAMS_OF_A_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    numbers = [number for source, out in pairs for number in (source.data_ptr(), out.data_ptr(), source.numel())]
    table = on_device(tuple(numbers), device)
    launch(scale, (programs,), table, factor, len(pairs), warps=8, DTYPE=TYPES[dtype], BLOCK=BLOCK, COPY=copy)


def _fits(tensor: Tensor) -> bool:
    """Whether it is one dense piece of memory."""
    return tensor.dtype in DTYPES and tensor.data_ptr() % ALIGNMENT == 0 and _dense(tensor)


def _dense(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
