"""What stands around the losses: how many positions count before them, and the sums of partial sums after, in a fixed order."""

import triton
import triton.language as tl

from .. import records
from .common import counted, number

COUNT = tl.constexpr(records.COUNT)
COUNT_MASK = tl.constexpr(records.COUNT_MASK)
COUNT_ROWS = tl.constexpr(records.COUNT_ROWS)
COUNT_TIMES = tl.constexpr(records.COUNT_TIMES)
TASK = tl.constexpr(records.TASK)
TASK_FIRST = tl.constexpr(records.TASK_FIRST)
TASK_LAST = tl.constexpr(records.TASK_LAST)
TERM = tl.constexpr(records.TERM)
TERM_COEFFICIENT = tl.constexpr(records.TERM_COEFFICIENT)
TERM_PART = tl.constexpr(records.TERM_PART)
TERM_PARTS = tl.constexpr(records.TERM_PARTS)
TERM_VALUE = tl.constexpr(records.TERM_VALUE)


@triton.jit
def shares(masks, out, BLOCK: tl.constexpr):
    """Program i writes the share of one position in the mean over those that mask i counts."""
    mask = masks + tl.program_id(0) * COUNT
    rows = tl.load(mask + COUNT_ROWS).to(tl.int32)
    counts = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, rows, BLOCK):
        at = start + tl.arange(0, BLOCK)
        counts += counted(mask + COUNT_MASK, at, at < rows, True).to(tl.int32)
    found = tl.sum(counts, 0).to(tl.int64) * tl.load(mask + COUNT_TIMES)
    tl.store(out + tl.program_id(0), 1.0 / tl.maximum(found, 1).to(tl.float32))


@triton.jit
def totals(tasks, terms, part, values, total, BLOCK: tl.constexpr):
    """Program i writes the values of the terms of task i, and their sum with the coefficients."""
    task = tasks + tl.program_id(0) * TASK
    whole = tl.load(task + TASK_FIRST).to(tl.float32) * 0.0
    for which in range(tl.load(task + TASK_FIRST).to(tl.int32), tl.load(task + TASK_LAST).to(tl.int32)):
        term = terms + which * TERM
        parts = part + tl.load(term + TERM_PART)
        count = tl.load(term + TERM_PARTS).to(tl.int32)
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            sums += tl.load(parts + at, mask=at < count, other=0.0)
        value = tl.sum(sums, 0)
        tl.store(values + tl.load(term + TERM_VALUE), value)
        whole += value * number(term + TERM_COEFFICIENT, 0)
    tl.store(total + tl.program_id(0), whole)
