"""How kernels are told about tensors and terms: records of 64-bit integers in one table.

A *view* (4 columns) is a tensor seen as rows: its address, then strides in elements. Row r stands at
``(r // size) * outer + (r % size) * inner``; that covers a slice of the tokens of a batch, and whatever is expanded.

A *number* (2 columns) is the address of a float32 on the device; where that is zero, the bits of the number itself.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

VIEW = 4
VIEW_OUTER, VIEW_INNER, VIEW_SIZE = 1, 2, 3

# A term.
TERM_MASK = 0  # a view: which rows count; all do where its address is zero
TERM_SHARE = 4  # a number: the share of a row in the mean
TERM_COEFFICIENT = 6  # a number
TERM_PART = 8  # where its partial sums go
TERM_PARTS = 9  # how many there are
TERM_KIND = 10  # which of the feature losses it is
TERM_CONSTANTS = 11  # four floats, as bits
TERM_OTHER = 15  # a view: the teacher's tensor; of feature losses only
TERM_VALUE = 19  # where its value goes
TERM_STRIDE = 20  # how far the share of a row is from that of the row before; of losses on logits only
TERM = 22

# A task.
TASK_STUDENT = 0  # a view
TASK_GRADIENT = 4  # where the gradient goes, as dense rows
TASK_ROWS = 5  # how many
TASK_FIRST = 6  # its terms are those from this number
TASK_LAST = 7  # to before this one
TASK = 8

# A launch on logits.
LAUNCH_STUDENT = 0  # a view
LAUNCH_TEACHER = 4  # a view
LAUNCH_LABELS = 8  # where they are, dense int64
LAUNCH_GRADIENT = 9  # where the gradient goes, as dense rows
LAUNCH_TEMPERATURE = 10  # a number
LAUNCH_TERMS = 12  # its terms by number
LAUNCH = 20

# A mask to be counted.
COUNT_MASK = 0  # a view
COUNT_ROWS = 4
COUNT_TIMES = 5  # how many positions each row stands for
COUNT = 6

# Feature losses. DISTANCE covers mse, l1, smooth_l1 and huber by four constants, see `features.distance_constants`.
DISTANCE, COSINE, NORMALIZED_MSE = 0, 1, 2

# What row starts have in common. ON_COLUMNS: all stand on 16 bytes. ON_ROWS: they do not, as with 30522 classes, but they are
# equally far from it in all tensors. ANYWHERE: neither.
ON_COLUMNS, ON_ROWS, ANYWHERE = 0, 1, 2

_FLOAT, _BITS = struct.Struct("<f"), struct.Struct("<i")


@functools.lru_cache(4096)
def bits(number: float) -> int:
    """A number as the 32 bits of a float32; infinite where it is too large for that."""
    try:
        packed = _FLOAT.pack(number)
    except OverflowError:
        packed = _FLOAT.pack(float("inf") if number > 0 else float("-inf"))
    return int(_BITS.unpack(packed)[0])


class Table:
    """Records, one after the other; each section begins on 16 bytes."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def add(self, records: Sequence[Sequence[int]]) -> int:
        """Where the section begins."""
        start = len(self.numbers)
        for record in records:
            self.numbers.extend(record)
        self.numbers.extend([0] * (len(self.numbers) % 2))
        return start
