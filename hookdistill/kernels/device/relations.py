"""Relations softmax(X Xᵀ / √d) of tokens, by tiles.

Their scores are symmetric, so that with the sums l of the softmax's rows at hand the gradient of all rows by x_i is

    Σ_j [(q_ij - p_ij) + (q_ji - p_ji)] x_j / √d,    q_ij = exp(S_ij - l_i), q_ji = exp(S_ij - l_j)

one product for each tile: nothing is transposed, and nothing added up by two programs. Slopes of both rows are small where
student and teacher are near each other, and lose nothing when they are rounded for the tensor cores.
"""

import triton
import triton.language as tl

from .. import maps
from .maps import begin, log_sum, more, number, operand, place, product, rows_of, size, span, tokens, write_rows

BY_QUERY = tl.constexpr(maps.BY_QUERY)
HEADS = tl.constexpr(maps.HEADS)
LN_2 = tl.constexpr(0.6931471805599453)
QUERIES = tl.constexpr(maps.QUERIES)
SIDE = tl.constexpr(maps.SIDE)
SIDE_QUERY = tl.constexpr(maps.SIDE_QUERY)
SIDE_SCALE = tl.constexpr(maps.SIDE_SCALE)
SIDE_SPLIT = tl.constexpr(maps.SIDE_GROUPS)


@triton.jit
def _start(x, side, example, head, S: tl.constexpr):
    """Where a relation head begins, of which several may share a head."""
    UNIT: tl.constexpr = S.unit
    WIDTH: tl.constexpr = S.width
    split = tl.load(side + SIDE_SPLIT)
    return begin(x, side + SIDE_QUERY, example, head // split, UNIT) + (head % split) * WIDTH


@triton.jit
def _step(side, S: tl.constexpr):
    UNIT: tl.constexpr = S.unit
    return tl.multiple_of(tl.load(side + SIDE_QUERY + 2), UNIT)


@triton.jit
def _sums(
    table,
    side,
    x,
    valid,
    example,
    head,
    first,
    counted,
    low,
    high,
    S: tl.constexpr,
    WHICH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    WIDTH: tl.constexpr = S.width
    PADDED: tl.constexpr = S.padded
    EXACT: tl.constexpr = S.exact
    count = size(table + QUERIES)
    start = _start(x, side, example, head, S)
    step = _step(side, S)
    scale = number(side + SIDE_SCALE)
    here = rows_of(start, step, first, counted, WIDTH, PADDED)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    z = tl.zeros((ROWS,), tl.float32)
    for column in range(low, high, COLUMNS):
        at = column + tl.arange(0, COLUMNS)
        counts = tokens(table, valid, example, at, at < count, WHICH)
        s = product(here, tl.trans(rows_of(start, step, column, counts, WIDTH, PADDED)), EXACT) * scale
        m, z = more(tl.where(counts[None, :], s, float("-inf")), m, z)
    return tl.where(counted, log_sum(m, z, float("-inf")), float("inf"))


@triton.jit
def relation_sums(
    table,
    x_s,
    x_t,
    valid,
    spans,
    sums_s,
    sums_t,
    S: tl.constexpr,
    T: tl.constexpr,
    WHICH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write log2 of the sum of exponentials of each row, for both sides; infinity for tokens that do not count."""
    block, example, head = place(table)
    count = size(table + QUERIES)
    first = block * ROWS
    rows = first + tl.arange(0, ROWS)
    counted = tokens(table, valid, example, rows, rows < count, WHICH)
    low, high = span(table, spans, example, block, COLUMNS)
    at = (example * tl.load(table + HEADS) + head) * count + rows
    found = _sums(table, table, x_s, valid, example, head, first, counted, low, high, S, WHICH, ROWS, COLUMNS)
    tl.store(sums_s + at, found, mask=rows < count)
    found = _sums(table, table + SIDE, x_t, valid, example, head, first, counted, low, high, T, WHICH, ROWS, COLUMNS)
    tl.store(sums_t + at, found, mask=rows < count)


@triton.jit
def relation_slopes(
    table,
    x_s,
    x_t,
    valid,
    spans,
    sums_s,
    sums_t,
    factor,
    out,
    part,
    S: tl.constexpr,
    T: tl.constexpr,
    WHICH: tl.constexpr,
    GRADIENT: tl.constexpr,
    LIFT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the value of each block of rows, and the gradient."""
    WIDTH_S: tl.constexpr = S.width
    WIDTH_T: tl.constexpr = T.width
    PADDED_S: tl.constexpr = S.padded
    PADDED_T: tl.constexpr = T.padded
    EXACT_S: tl.constexpr = S.exact
    EXACT_T: tl.constexpr = T.exact
    block, example, head = place(table)
    count = size(table + QUERIES)
    first = block * ROWS
    rows = first + tl.arange(0, ROWS)
    counted = tokens(table, valid, example, rows, rows < count, WHICH)
    low, high = span(table, spans, example, block, COLUMNS)
    start = _start(x_s, table, example, head, S)
    their_start = _start(x_t, table + SIDE, example, head, T)
    step = _step(table, S)
    their_step = _step(table + SIDE, T)
    scale = number(table + SIDE_SCALE)
    their_scale = number(table + SIDE + SIDE_SCALE)
    here = rows_of(start, step, first, counted, WIDTH_S, PADDED_S)
    their_here = rows_of(their_start, their_step, first, counted, WIDTH_T, PADDED_T)
    line = (example * tl.load(table + HEADS) + head) * count
    sum_s = tl.load(sums_s + line + rows, mask=rows < count, other=float("inf"))
    sum_t = tl.load(sums_t + line + rows, mask=rows < count, other=float("inf"))
    value = tl.zeros((ROWS,), tl.float32)
    slope = tl.zeros((ROWS, PADDED_S), tl.float32)
    for column in range(low, high, COLUMNS):
        at = column + tl.arange(0, COLUMNS)
        counts = tokens(table, valid, example, at, at < count, WHICH)
        there = rows_of(start, step, column, counts, WIDTH_S, PADDED_S)
        their_there = rows_of(their_start, their_step, column, counts, WIDTH_T, PADDED_T)
        s = product(here, tl.trans(there), EXACT_S)
        t = product(their_here, tl.trans(their_there), EXACT_T)
        column_s = tl.load(sums_s + line + at, mask=at < count, other=float("inf"))
        column_t = tl.load(sums_t + line + at, mask=at < count, other=float("inf"))
        hidden = (column_s == float("inf"))[None, :]
        s = tl.where(hidden, float("-inf"), s * scale)
        t = tl.where(hidden, float("-inf"), t * their_scale)
        x = s - sum_s[:, None]
        y = t - sum_t[:, None]
        p = tl.exp2(y)
        value += tl.sum(tl.where(p == 0, 0.0, p * (y - x)), 1)
        if GRADIENT:
            of_row = tl.exp2(x) - p
            of_column = tl.exp2(s - column_s[None, :]) - tl.exp2(t - column_t[None, :])
            slope += product(operand((of_row + of_column) * LIFT, there, EXACT_S), there, EXACT_S)
    tl.store(part + tl.program_id(0), tl.sum(value, 0) * LN_2)
    if GRADIENT:
        slope = tl.where(counted[:, None], slope * (tl.load(factor) * scale * (LN_2 / LIFT)), 0.0)
        to = begin(out, table + BY_QUERY, example, head, OUT_UNIT)
        step = tl.multiple_of(tl.load(table + BY_QUERY + 2), OUT_UNIT)
        write_rows(to, step, first, slope, rows < count, WIDTH_S, PADDED_S)
