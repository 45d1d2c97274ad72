"""Feature losses, value and gradient in one pass: all terms of all student tensors of one width and dtype in one launch.

    distance    near = |d| <= c0;  value = near ? c1 d² : c2 (|d| - c3);  slope = near ? 2 c1 d : c2 sign(d)
    cosine      value = 1 - u·v;   slope = (free (u·v) u - v) / |s|
    normalized  value = |u - v|²;  slope = 2 ((1 - free (u·u - u·v)) u - v) / |s|

with d = s - t and the unit vectors u = s / |s| and v = t / |t|. Lengths below ZERO_NORM are taken for that, and then free = 0,
otherwise 1. Distances are divided by the number of features, which stands in their constants. Nothing comes of s = t = 0, which
takes the place of all that is not loaded: rows that do not count, columns beyond the width.

SQUARES, LINES, ANGLES say which kinds there are in a launch: mse, the other distances, cosine or normalized.
"""

import triton
import triton.language as tl

from ...losses.features import ZERO_NORM
from .. import records
from .common import counted, number, offsets

ANGLE_FROM = tl.constexpr(records.COSINE)
NORMALIZED = tl.constexpr(records.NORMALIZED_MSE)
TASK = tl.constexpr(records.TASK)
TASK_FIRST = tl.constexpr(records.TASK_FIRST)
TASK_GRADIENT = tl.constexpr(records.TASK_GRADIENT)
TASK_LAST = tl.constexpr(records.TASK_LAST)
TASK_ROWS = tl.constexpr(records.TASK_ROWS)
TERM = tl.constexpr(records.TERM)
TERM_COEFFICIENT = tl.constexpr(records.TERM_COEFFICIENT)
TERM_CONSTANTS = tl.constexpr(records.TERM_CONSTANTS)
TERM_KIND = tl.constexpr(records.TERM_KIND)
TERM_MASK = tl.constexpr(records.TERM_MASK)
TERM_OTHER = tl.constexpr(records.TERM_OTHER)
TERM_PART = tl.constexpr(records.TERM_PART)
TERM_PARTS = tl.constexpr(records.TERM_PARTS)
TERM_SHARE = tl.constexpr(records.TERM_SHARE)
SHORTEST = tl.constexpr(ZERO_NORM**2)


@triton.jit
def _constant(term, which: tl.constexpr):
    return tl.load(term + TERM_CONSTANTS + which).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _start(view, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    start = tl.load(view).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(start, 16) if ALIGNED else start


@triton.jit
def _tile(view, rows, columns, load, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, SPLIT: tl.constexpr):
    """Some rows of a view in float32, zero where they are not to be loaded."""
    step = offsets(view, rows, 128 // DTYPE.primitive_bitwidth if ALIGNED else 1, SPLIT)
    at = _start(view, DTYPE, ALIGNED) + step[:, None] + columns[None, :]
    return tl.load(at, mask=load, other=0.0).to(tl.float32)


@triton.jit
def _distance(term, s, t, weight, LINES: tl.constexpr):
    """Values of rows, and the slopes of single features times ``weight``."""
    d = s - t
    square = _constant(term, 1)
    value = tl.sum(d * d, 1) * square
    slope = d * (2.0 * weight * square)
    if LINES:
        size = tl.abs(d)
        near = size <= _constant(term, 0)
        line = _constant(term, 2)
        value = tl.sum(tl.where(near, square * d * d, line * (size - _constant(term, 3))), 1)
        side = tl.where(d > 0, line, tl.where(d < 0, -line, 0.0))
        slope = tl.where(near, slope, side * weight)
    return value, slope


@triton.jit
def _angle(kind, ss, tt, st):
    """From squared lengths and product of vectors: what makes both unit vectors, the product of these, and a and b of the slope
    a s - b t."""
    over_s = tl.rsqrt(tl.maximum(ss, SHORTEST))
    over_t = tl.rsqrt(tl.maximum(tt, SHORTEST))
    free = tl.where(ss >= SHORTEST, 1.0, 0.0)
    dot = st * over_s * over_t
    along = dot * free
    factor = over_s
    if kind == NORMALIZED:
        along = 1.0 - free * (ss * over_s * over_s - dot)
        factor = 2.0 * over_s
    return over_s, over_t, dot, along * over_s * factor, over_t * factor


@triton.jit
def _apart(s, t, over_s, over_t):
    w = s * over_s - t * over_t
    return tl.sum(w * w, 1)


@triton.jit
def narrow_rows(
    tasks,
    terms,
    part,
    units,
    UNIT: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr,
    SQUARES: tl.constexpr,
    LINES: tl.constexpr,
    ANGLES: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """Program (i, j) does rows ``ROWS i …`` of task j, whole rows at once. Partial sum i of each of its terms is its own.

    Rows are ``units * UNIT`` wide, so that the compiler knows what the width is a multiple of.
    """
    width = units * UNIT
    block = tl.program_id(0)
    task = tasks + tl.program_id(1) * TASK
    count = tl.load(task + TASK_ROWS).to(tl.int32)
    if block * ROWS < count:
        rows = block * ROWS + tl.arange(0, ROWS)
        columns = tl.arange(0, WIDTH)
        inside = rows < count
        within = columns < width
        slopes = tl.zeros((ROWS, WIDTH), tl.float32)
        for which in range(tl.load(task + TASK_FIRST).to(tl.int32), tl.load(task + TASK_LAST).to(tl.int32)):
            term = terms + which * TERM
            valid = counted(term + TERM_MASK, rows, inside, SPLIT)
            load = valid[:, None] & within[None, :]
            s = _tile(task, rows, columns, load, S, ALIGNED, SPLIT)
            t = _tile(term + TERM_OTHER, rows, columns, load, T, ALIGNED, SPLIT)
            share = number(term + TERM_SHARE, 0)
            weight = share * number(term + TERM_COEFFICIENT, 0)
            kind = tl.load(term + TERM_KIND)
            if (not ANGLES) | ((SQUARES or LINES) & (kind < ANGLE_FROM)):
                values, slope = _distance(term, s, t, weight, LINES)
            else:
                over_s, over_t, dot, a, b = _angle(kind, tl.sum(s * s, 1), tl.sum(t * t, 1), tl.sum(s * t, 1))
                slope = s * (a * weight)[:, None] - t * (b * weight)[:, None]
                if kind == NORMALIZED:
                    values = _apart(s, t, over_s[:, None], over_t[:, None])
                else:
                    values = tl.where(valid, 1.0 - dot, 0.0)
            tl.store(part + tl.load(term + TERM_PART) + block, tl.sum(values, 0) * share)
            slopes += slope
        if GRADIENT:
            out = _start(task + TASK_GRADIENT, G, ALIGNED) + rows.to(tl.int64)[:, None] * width + columns[None, :]
            tl.store(out, slopes.to(G), mask=inside[:, None] & within[None, :])


@triton.jit
def _lengths(tasks, terms, part, row, width, chunks, S, T, WIDTH: tl.constexpr, ALIGNED: tl.constexpr, SPLIT: tl.constexpr):
    """Squared lengths and product of a row for each angle of its task, left behind the partial sums, three for each row."""
    rows = row + tl.arange(0, 1)
    for which in range(tl.load(tasks + TASK_FIRST).to(tl.int32), tl.load(tasks + TASK_LAST).to(tl.int32)):
        term = terms + which * TERM
        if tl.load(term + TERM_KIND) >= ANGLE_FROM:
            valid = counted(term + TERM_MASK, rows, rows >= 0, SPLIT)
            ss = tl.zeros((1, WIDTH), tl.float32)
            tt = tl.zeros((1, WIDTH), tl.float32)
            st = tl.zeros((1, WIDTH), tl.float32)
            for chunk in range(0, chunks):
                columns = chunk * WIDTH + tl.arange(0, WIDTH)
                load = valid[:, None] & (columns < width)[None, :]
                s = _tile(tasks, rows, columns, load, S, ALIGNED, SPLIT)
                t = _tile(term + TERM_OTHER, rows, columns, load, T, ALIGNED, SPLIT)
                ss += s * s
                tt += t * t
                st += s * t
            at = part + tl.load(term + TERM_PART) + tl.load(term + TERM_PARTS) + row.to(tl.int64) * 3
            tl.store(at, tl.sum(tl.sum(ss, 1), 0))
            tl.store(at + 1, tl.sum(tl.sum(tt, 1), 0))
            tl.store(at + 2, tl.sum(tl.sum(st, 1), 0))


@triton.jit
def wide_rows(
    tasks,
    terms,
    part,
    units,
    chunks,
    UNIT: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    G: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr,
    SQUARES: tl.constexpr,
    LINES: tl.constexpr,
    ANGLES: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """The same for rows too wide for a program to hold: program (i, j) does chunk ``i % chunks`` of row ``i // chunks`` of task
    j; with angles it does all of row i, in two sweeps. There is a partial sum for each chunk of each row."""
    width = units * UNIT
    task = tasks + tl.program_id(1) * TASK
    row = tl.program_id(0)
    first = 0
    last = chunks
    if not ANGLES:
        first = row % chunks
        last = first + 1
        row = row // chunks
    if row < tl.load(task + TASK_ROWS):
        if ANGLES:
            _lengths(task, terms, part, row, width, chunks, S, T, WIDTH, ALIGNED, SPLIT)
            tl.debug_barrier()
        rows = row + tl.arange(0, 1)
        for step in range(first, last):
            # Backwards: what the first sweep read last is still in the cache.
            chunk = first + last - 1 - step
            columns = chunk * WIDTH + tl.arange(0, WIDTH)
            within = columns < width
            slopes = tl.zeros((1, WIDTH), tl.float32)
            for which in range(tl.load(task + TASK_FIRST).to(tl.int32), tl.load(task + TASK_LAST).to(tl.int32)):
                term = terms + which * TERM
                valid = counted(term + TERM_MASK, rows, rows >= 0, SPLIT)
                load = valid[:, None] & within[None, :]
                s = _tile(task, rows, columns, load, S, ALIGNED, SPLIT)
                t = _tile(term + TERM_OTHER, rows, columns, load, T, ALIGNED, SPLIT)
                share = number(term + TERM_SHARE, 0)
                weight = share * number(term + TERM_COEFFICIENT, 0)
                kind = tl.load(term + TERM_KIND)
                at = part + tl.load(term + TERM_PART)
                if (not ANGLES) | ((SQUARES or LINES) & (kind < ANGLE_FROM)):
                    values, slope = _distance(term, s, t, weight, LINES)
                else:
                    found = at + tl.load(term + TERM_PARTS) + row.to(tl.int64) * 3
                    over_s, over_t, dot, a, b = _angle(kind, tl.load(found), tl.load(found + 1), tl.load(found + 2))
                    slope = s * (a * weight) - t * (b * weight)
                    if kind == NORMALIZED:
                        values = _apart(s, t, over_s, over_t)
                    else:
                        values = tl.where(valid & (chunk == 0), 1.0 - dot, 0.0)
                tl.store(at + row.to(tl.int64) * chunks + chunk, tl.sum(values, 0) * share)
                slopes += slope
            if GRADIENT:
                out = _start(task + TASK_GRADIENT, G, ALIGNED) + rows.to(tl.int64)[:, None] * width + columns[None, :]
                tl.store(out, slopes.to(G), mask=within[None, :])
