"""How kernels are told about tensors and terms: records of 64-bit integers in one table.

A *view* (4 columns) is a tensor seen as rows: its address, then strides in elements. Row r stands at
``(r // size) * outer + (r % size) * inner``; that covers a slice of the tokens of a batch, and whatever is expanded.

A *number* (2 columns) is the address of a float32 on the device; where that is zero, the bits of the number itself.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

VIEW = 4
VIEW_OUTER, VIEW_INNER, VIEW_SIZE = 1, 2, 3

# A term: which rows count (address zero: all do), its share in the mean, its coefficient, where its partial sums go and how
# many there are, which loss of its family it is, that loss's constants, the teacher's view (features only), and where its value
# goes.
TERM_MASK, TERM_SHARE, TERM_COEFFICIENT, TERM_PART, TERM_PARTS, TERM_KIND, TERM_CONSTANTS, TERM_OTHER = (
    0,
    4,
    6,
    8,
    9,
    10,
    11,
    15,
)
TERM_VALUE = 19
TERM = 20

# A task: the student's view, where the gradient goes (rows are dense), how many rows, and the terms from FIRST to before LAST.
TASK_STUDENT, TASK_GRADIENT, TASK_ROWS, TASK_FIRST, TASK_LAST = 0, 4, 5, 6, 7
TASK = 8

# A launch on logits: the views of student and teacher, the labels (dense int64), where the gradient goes, the temperature, and
# the terms in it by number.
LAUNCH_STUDENT, LAUNCH_TEACHER, LAUNCH_LABELS, LAUNCH_GRADIENT, LAUNCH_TEMPERATURE, LAUNCH_TERMS = 0, 4, 8, 9, 10, 12
LAUNCH = 20

# A mask to be counted: its view, its rows, and how many positions each of them stands for.
COUNT_MASK, COUNT_ROWS, COUNT_TIMES = 0, 4, 5
COUNT = 6

# Feature losses. DISTANCE covers mse, l1, smooth_l1 and huber by four constants, see `features.distance_constants`.
DISTANCE, COSINE, NORMALIZED_MSE = 0, 1, 2

# What row starts have in common. ON_COLUMNS: all stand on 16 bytes. ON_ROWS: they do not, as with 30522 classes, but they are
# equally far from it in all tensors. ANYWHERE: neither.
ON_COLUMNS, ON_ROWS, ANYWHERE = 0, 1, 2

_FLOAT, _BITS = struct.Struct("<f"), struct.Struct("<i")


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
