"""Losses between maps that are made of tensors of rows: how kernels are told of them, and in what blocks they go.

A map has a row for each query and a column for each key; of neither model is more of it than a tile ever in memory. What
kernels read of strides, sizes and scales stands in one table of 64-bit integers: a record for each side, then sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .availability import DTYPES, interpreted
from .layout import ALIGNMENT, unit
from .records import bits

# A side: what products are multiplied by and the threshold of what is hidden, as bits; query heads to a key head; and the
# strides of query and key (example, head, row) and of the mask (example, head, query, key), in elements.
SIDE_SCALE, SIDE_NEVER, SIDE_GROUPS, SIDE_QUERY, SIDE_KEY, SIDE_MASK = 0, 1, 2, 3, 6, 9
SIDE = 13

# Behind both sides: sizes, how many blocks of queries and of keys there are, the strides of the mask that says what counts, and
# those of the gradients by query and key.
HEADS, QUERIES, KEYS, BLOCKS, KEY_BLOCKS, VALID, BY_QUERY, BY_KEY = (2 * SIDE + column for column in (0, 1, 2, 3, 4, 5, 9, 12))

# What hides keys from queries, and what says which entries count.
OPEN, CAUSAL, BOOL, ADDED = 0, 1, 2, 3
ALL, TOKENS, PAIRS = 0, 1, 2

# What `device.maps.spans` says of keys: whether any query sees them on either side, and whether they count.
SEEN_S, SEEN_T, COUNTS = 1, 2, 4

# The losses between attentions.
KL, MSE, SCORES = 0, 1, 2

LOG2_E = 1.4426950408889634
"""Softmaxes are computed to base two."""
REGISTERS = 255
"""Of a thread: the assembler is not to keep anything in memory for the sake of more threads."""
STAGES = 2
"""Tiles that are on their way from memory: more do not fit on every device."""
LEAST_WIDTH = 16
"""What narrower heads are filled up to for the sake of tensor cores."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What is known of a side when a kernel is compiled.

    Attributes:
        kind: what hides keys.
        flat: all queries have the same mask.
        shared: all heads have that, too.
        key_step: from key to key of the mask, 0 or 1.
        unit: how many elements the strides of query and key are known to be multiples of.
        mask_unit: the same of the mask, and of the number of keys.
        width: of a head.
        padded: what that is filled up to.
        exact: whether products are of float32.
    """

    width: int
    padded: int
    unit: int
    exact: bool
    kind: int = OPEN
    flat: bool = True
    shared: bool = True
    key_step: int = 0
    mask_unit: int = 1

    @property
    def scattered(self) -> bool:
        """Whether a tile of the mask is read entry by entry."""
        return not self.flat and self.mask_unit == 1

    @staticmethod
    def of(width: int, tensors: Sequence[Tensor], strides: Sequence[int]) -> Traits:
        """Those of heads without a mask, which are parts of ``tensors``."""
        return Traits(width=width, padded=padded(width), unit=aligned(tensors, strides), exact=exact(tensors[0]))


@dataclass(frozen=True, slots=True)
class Blocks:
    """A tile of a map: ``rows`` stay with a program, which goes over the columns so many at a time."""

    rows: int
    columns: int
    warps: int


def padded(width: int) -> int:
    """The power of two that heads of this width are filled up to."""
    return max(LEAST_WIDTH, 1 << (width - 1).bit_length())


def exact(tensor: Tensor) -> bool:
    """Whether products are of float32: of float32, which would lose 13 bits on tensor cores; and in the interpreter, which
    multiplies the bits of bfloat16."""
    return tensor.dtype is torch.float32 or interpreted()


def aligned(tensors: Sequence[Tensor], strides: Sequence[int]) -> int:
    """How many elements all strides are known to be multiples of: those of a load of 16 bytes, or one."""
    step = unit(*(tensor.dtype for tensor in tensors))
    fits = all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors) and all(stride % step == 0 for stride in strides)
    return step if fits else 1


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its rows are not dense."""
    tensor = tensor.detach()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def as_bytes(mask: Tensor) -> Tensor:
    """The same memory as bytes."""
    return mask.detach().view(torch.uint8)


def readable_mask(mask: Tensor) -> Tensor:
    """A mask as bytes or of a dtype that kernels read; a copy of one that is not dense over the keys."""
    mask = as_bytes(mask) if mask.dtype is torch.bool else mask.detach()
    mask = mask if mask.dtype in (*DTYPES, torch.uint8) else mask.float()
    dense = not mask.ndim or mask.shape[-1] == 1 or mask.stride(-1) == 1
    return mask if dense else mask.contiguous()


def side_record(scale: float, never: float, groups: int, *strides: int) -> tuple[int, ...]:
    """The columns of a side; strides that it has none of are zero."""
    record = (bits(scale), bits(never), groups, *strides)
    return (*record, *[0] * (SIDE - len(record)))


def on_the_device(number: float | Tensor, device: torch.device) -> float | Tensor:
    """A number as it is, but that no device waits for one of the host."""
    if isinstance(number, Tensor):
        return float(number) if number.device.type == "cpu" and device.type != "cpu" else number.detach().to(device)
    return number


def as_scalar(number: float | Tensor, device: torch.device) -> Tensor:
    """A float32 on the device."""
    if isinstance(number, Tensor):
        return number.to(torch.float32)
    return torch.full((), number, dtype=torch.float32, device=device)


def share(count: float | Tensor) -> float | Tensor:
    """Of one in a mean over so many."""
    return 1 / count.clamp_min(1) if isinstance(count, Tensor) else 1 / max(count, 1)
