"""Tensors kept as they are now, whatever is written over them later, and without copying those that nothing overwrites."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

# Copy-on-write on Apple's GPUs is said to be unsafe (pytorch #150569): a plain copy there.
twin_of: Callable[[Tensor], Tensor] = torch.clone if torch.backends.mps.is_available() else torch._lazy_clone
_address: Callable[[Tensor], int] = torch._C._data_address  # type: ignore[attr-defined]  # unlike data_ptr() it forces no copy

Kept = tuple[Tensor, int | None, Tensor | None]
"""A captured tensor: the reference itself, its version, and a copy-on-write twin.

The twin costs no memory until somebody writes. Reading gives the reference if nobody wrote, so that nothing downstream (a
compiled or Triton kernel that asks for the address) forces the copy; else the twin. The version stands in for a twin where
there can be none. A plain tuple, because one is made at every captured call.
"""


def keep(tensor: Tensor) -> Kept:
    """Keep ``tensor`` as it is now."""
    if is_dynamo_compiling():
        return tensor.clone(), None, None  # part of the graph, where a copy that nothing needs is fused away
    if type(tensor) is Tensor:
        try:
            return tensor, None, twin_of(tensor)
        except RuntimeError:  # sparse, nested, memory that torch did not allocate itself (numpy, shared), functorch wrappers
            pass
    if tensor.is_inference():
        return tensor.clone(), None, None  # without a version nobody could tell that it was overwritten
    return tensor, tensor._version, None


def read(kept: Kept) -> Tensor | None:
    """The tensor as it was when it was kept; ``None`` if it was overwritten and nothing true is left of it."""
    tensor, version, twin = kept
    if twin is None:
        return tensor if version is None or tensor._version == version else None
    if not _was_changed(tensor, twin):
        return tensor
    # Made under no_grad the twin carries no gradient, although the tensor itself came with one.
    return None if tensor.requires_grad and not twin.requires_grad else twin


def handed_over(tensor: Tensor) -> Kept:
    """From here on it is the caller's, and a kernel that asks for its address should not have to copy it: no twin."""
    return tensor, None if tensor.is_inference() else tensor._version, None


def _was_changed(tensor: Tensor, twin: Tensor) -> bool:
    """Whether ``tensor`` has other memory, another shape or less of a graph than when its copy-on-write twin was made.

    A write gives the writer memory of its own. Unlike the version counter this also sees writes through ``.data`` and those
    of inference mode.
    """
    return (
        _address(tensor) != _address(twin)
        or tensor.shape != twin.shape
        or tensor.stride() != twin.stride()
        or (twin.requires_grad and not tensor.requires_grad)
    )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class KeptRecord:
    """A dataclass that was captured whole, each of its tensors kept as it was."""

    record: Any
    tensors: Mapping[str, Kept]

    @staticmethod
    def of(record: Any) -> KeptRecord:
        """Keep ``record`` as it is now."""
        fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
        return KeptRecord(record, {name: keep(value) for name, value in fields.items() if isinstance(value, Tensor)})

    def read(self) -> Any:
        """The record as it was when it was kept; ``None`` if a tensor of it was overwritten and nothing true is left."""
        tensors = {name: read(kept) for name, kept in self.tensors.items()}
        gone = any(tensor is None for tensor in tensors.values())
        return None if gone else dataclasses.replace(self.record, **tensors)
