"""How kernels read the records of `hookdistill.kernels.records`."""

import triton
import triton.language as tl

from .. import records

VIEW_OUTER = tl.constexpr(records.VIEW_OUTER)
VIEW_INNER = tl.constexpr(records.VIEW_INNER)
VIEW_SIZE = tl.constexpr(records.VIEW_SIZE)


@triton.jit
def number(at, step):
    """A number of a record: its bits, or the float32 at its address; ``step`` elements further if there is one for each row."""
    address = tl.load(at)
    itself = tl.load(at + 1).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.load(address.to(tl.pointer_type(tl.float32)) + step, mask=address != 0, other=itself)


@triton.jit
def offsets(view, rows, UNIT: tl.constexpr, SPLIT: tl.constexpr):
    """Where rows of a view stand, in elements from its address, the strides being multiples of ``UNIT``.

    ``SPLIT``: some view has two strides. ``rows`` are 32 bits wide, which division is fast for.
    """
    # The compiler keeps what it is told of a load, and forgets it of what a function returns.
    inner = tl.multiple_of(tl.load(view + VIEW_INNER), UNIT)
    if SPLIT:
        outer = tl.multiple_of(tl.load(view + VIEW_OUTER), UNIT)
        size = tl.load(view + VIEW_SIZE).to(tl.int32)
        step = (rows // size).to(tl.int64) * outer + (rows % size).to(tl.int64) * inner
    else:
        step = rows.to(tl.int64) * inner
    return step


@triton.jit
def counted(view, rows, inside, SPLIT: tl.constexpr):
    """Which of the rows count by a mask of bytes: all that are inside where its address is zero."""
    address = tl.load(view)
    bytes_at = address.to(tl.pointer_type(tl.int8)) + offsets(view, rows, 1, SPLIT)
    return inside & (tl.load(bytes_at, mask=inside & (address != 0), other=1) != 0)
