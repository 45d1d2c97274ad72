"""A number format as torch's dtype, as the tag in a safetensors header, and as numpy's numbers of the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import StoreError, listing

Array = np.ndarray[Any, np.dtype[Any]]

TAGS: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_TAG = {tag: dtype for dtype, tag in TAGS.items()}
_UNKNOWN_TO_NUMPY = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}


def tag_of(dtype: torch.dtype) -> str:
    """The tag of a dtype in a safetensors header.

    Raises:
        StoreError: safetensors knows no such numbers.
    """
    if dtype not in TAGS:
        raise StoreError(f"{dtype} cannot be stored; a store holds {listing(map(str, TAGS), most=len(TAGS))}")
    return TAGS[dtype]


def dtype_of(tag: str) -> torch.dtype:
    """The dtype that a tag stands for."""
    if tag not in _BY_TAG:
        raise StoreError(f"the dtype {tag!r} is not known here")
    return _BY_TAG[tag]


def raw_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Numpy's numbers that have the bits of ``dtype``: its own, or unsigned ones for formats that numpy does not know."""
    return torch.empty(0, dtype=_UNKNOWN_TO_NUMPY.get(dtype, dtype)).numpy().dtype


def raw(tensor: Tensor) -> Array:
    """The memory of a tensor on the CPU as numpy sees it, shared."""
    array: Array = tensor.detach().view(_UNKNOWN_TO_NUMPY.get(tensor.dtype, tensor.dtype)).numpy()
    return array


def cooked(array: Array, dtype: torch.dtype) -> Tensor:
    """The tensor whose bits a writable array of raw numbers holds, shared."""
    return torch.from_numpy(array).view(dtype)
