"""Losses between attention maps, from queries and keys, by tiles.

With x = log2 q of the student and y = log2 p of the teacher, whose sums of exponentials are found first (`log_sums`), the slope
of a loss by the student's score is a - q · rest, the softmax's Jacobian, for

    kl    a = q - p, rest = 1 - Σ p,  with p over the keys that count and that the student does not rule out
    mse   a = 2 (q - p) q, rest = Σ a
    scores mse, by the scores themselves: a = 2 (s - t), rest = 0

so that where both sides are near each other both a and rest are small, and lose nothing when they are rounded for the tensor
cores. A query that does not count, or that sees no key, has sums of infinity: all of its q, or p, are zero.

`by_query` goes over the keys for each block of queries: the value, ``rest``, and the gradient by the query. `by_key` goes over
the queries for each block of keys, of all heads that share them: the gradient by the key. Nothing is added up by two programs.
"""

import triton
import triton.language as tl

from ...fused.scores import HIDDEN as NO_SCORE
from .. import maps
from .maps import (
    begin,
    has,
    keys_of,
    log_sum,
    masked,
    more,
    number,
    of_keys,
    operand,
    pairs,
    place,
    product,
    rows_of,
    size,
    span,
    tokens,
    write_rows,
)

ALL = tl.constexpr(maps.ALL)
BLOCKS = tl.constexpr(maps.BLOCKS)
BOOL = tl.constexpr(maps.BOOL)
BY_KEY = tl.constexpr(maps.BY_KEY)
BY_QUERY = tl.constexpr(maps.BY_QUERY)
COUNTS = tl.constexpr(maps.COUNTS)
HEADS = tl.constexpr(maps.HEADS)
HIDDEN = tl.constexpr(NO_SCORE)
KEYS = tl.constexpr(maps.KEYS)
KEY_BLOCKS = tl.constexpr(maps.KEY_BLOCKS)
KL = tl.constexpr(maps.KL)
LEAST = tl.constexpr(-126.0)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MSE = tl.constexpr(maps.MSE)
PAIRS = tl.constexpr(maps.PAIRS)
QUERIES = tl.constexpr(maps.QUERIES)
SCORES = tl.constexpr(maps.SCORES)
SEEN_S = tl.constexpr(maps.SEEN_S)
SEEN_T = tl.constexpr(maps.SEEN_T)
SIDE = tl.constexpr(maps.SIDE)
SIDE_GROUPS = tl.constexpr(maps.SIDE_GROUPS)
SIDE_KEY = tl.constexpr(maps.SIDE_KEY)
SIDE_MASK = tl.constexpr(maps.SIDE_MASK)
SIDE_NEVER = tl.constexpr(maps.SIDE_NEVER)
SIDE_QUERY = tl.constexpr(maps.SIDE_QUERY)
SIDE_SCALE = tl.constexpr(maps.SIDE_SCALE)
TOKENS = tl.constexpr(maps.TOKENS)


@triton.jit
def _key_head(side, head):
    return head // tl.load(side + SIDE_GROUPS)


@triton.jit
def _step(view, UNIT: tl.constexpr):
    return tl.multiple_of(tl.load(view + 2), UNIT)


@triton.jit
def _log_sums(
    table,
    side,
    query,
    key,
    mask,
    flags,
    example,
    head,
    first,
    counted,
    low,
    high,
    S: tl.constexpr,
    SEEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    UNIT: tl.constexpr = S.unit
    MASK_UNIT: tl.constexpr = S.mask_unit
    WIDTH: tl.constexpr = S.width
    PADDED: tl.constexpr = S.padded
    EXACT: tl.constexpr = S.exact
    queries = size(table + QUERIES)
    keys = size(table + KEYS)
    rows = first + tl.arange(0, ROWS)
    query = begin(query, side + SIDE_QUERY, example, head, UNIT)
    key = begin(key, side + SIDE_KEY, example, _key_head(side, head), UNIT)
    mask = begin(mask, side + SIDE_MASK, example, head, MASK_UNIT)
    key_step = _step(side + SIDE_KEY, UNIT)
    mask_step = _step(side + SIDE_MASK, MASK_UNIT)
    limit = keys_of(table, MASK_UNIT)
    q = rows_of(query, _step(side + SIDE_QUERY, UNIT), first, counted, WIDTH, PADDED)
    scale = number(side + SIDE_SCALE)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    z = tl.zeros((ROWS,), tl.float32)
    for start in range(low, high, COLUMNS):
        kpos = start + tl.arange(0, COLUMNS)
        seen = has(of_keys(flags, example, kpos, keys, S.kind == BOOL), SEEN)
        k = rows_of(key, key_step, start, seen, WIDTH, PADDED)
        s = product(q, tl.trans(k), EXACT) * scale
        s = masked(s, seen[None, :], mask, mask_step, rows[:, None], kpos[None, :], queries, limit, S, LOG2_E)
        m, z = more(s, m, z)
    return tl.where(counted, log_sum(m, z, number(side + SIDE_NEVER)), float("inf"))


@triton.jit
def log_sums(
    table,
    q_s,
    k_s,
    mask_s,
    q_t,
    k_t,
    mask_t,
    valid,
    spans,
    flags,
    sums_s,
    sums_t,
    S: tl.constexpr,
    T: tl.constexpr,
    WHICH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write log2 of the sum of exponentials over the keys, for each query of both sides."""
    block, example, head = place(table)
    queries = size(table + QUERIES)
    first = block * ROWS
    rows = first + tl.arange(0, ROWS)
    counted = tokens(table, valid, example, rows, rows < queries, WHICH)
    low, high = span(table, spans, example, block, COLUMNS)
    at = (example * tl.load(table + HEADS) + head) * queries + rows
    line = (example, head, first, counted, low, high)
    found = _log_sums(table, table, q_s, k_s, mask_s, flags, *line, S, SEEN_S, ROWS, COLUMNS)
    tl.store(sums_s + at, found, mask=rows < queries)
    found = _log_sums(table, table + SIDE, q_t, k_t, mask_t, flags, *line, T, SEEN_T, ROWS, COLUMNS)
    tl.store(sums_t + at, found, mask=rows < queries)


@triton.jit
def _kept(x, p, entries, WHICH: tl.constexpr):
    """What of p has a slope: of entries that count, and that the student gives any weight."""
    alive = (x < LEAST) == 0
    if WHICH != ALL:
        alive = alive & entries
    return tl.where(alive, p, 0.0)


@triton.jit
def _pull(s, t, sum_s, sum_t, entries, WHICH: tl.constexpr, LOSS: tl.constexpr):
    """For a tile of scores q, a, the values of entries, and of kl p and what is kept of it; see above."""
    if LOSS == SCORES:
        entries = entries & ((s > HIDDEN) | (t > HIDDEN))
        q = s
        p = t
        kept = t
        d = tl.where(entries, s - t, 0.0)
        value = d * d
        a = tl.where(s == float("-inf"), 0.0, 2.0 * d)
    else:
        x = s - sum_s
        y = t - sum_t
        q = tl.exp2(x)
        p = tl.exp2(y)
        kept = p
        if LOSS == KL:
            kept = _kept(x, p, entries, WHICH)
            value = p * (tl.where(y < LEAST, LEAST, y) - tl.where(x < LEAST, LEAST, x)) * LN_2
            a = q - kept
        else:
            d = q - p
            value = d * d
            a = 2.0 * d * q
        if WHICH != ALL:
            value = tl.where(entries, value, 0.0)
            if LOSS == MSE:
                a = tl.where(entries, a, 0.0)
    return q, a, value, p, kept, entries


@triton.jit
def by_query(
    table,
    q_s,
    k_s,
    mask_s,
    q_t,
    k_t,
    mask_t,
    valid,
    spans,
    flags,
    sums_s,
    sums_t,
    rests,
    factor,
    out,
    part,
    numbers,
    S: tl.constexpr,
    T: tl.constexpr,
    WHICH: tl.constexpr,
    LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    LIFT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the value of each block of queries, how many entries of scores count, and with GRADIENT the gradient by the query
    and ``rests``."""
    BITS: tl.constexpr = 1.0 if LOSS == SCORES else LOG2_E
    FLAGS: tl.constexpr = S.kind == BOOL or T.kind == BOOL or WHICH == TOKENS
    UNIT_S: tl.constexpr = S.unit
    UNIT_T: tl.constexpr = T.unit
    MASK_UNIT_S: tl.constexpr = S.mask_unit
    MASK_UNIT_T: tl.constexpr = T.mask_unit
    WIDTH_S: tl.constexpr = S.width
    WIDTH_T: tl.constexpr = T.width
    PADDED_S: tl.constexpr = S.padded
    PADDED_T: tl.constexpr = T.padded
    EXACT_S: tl.constexpr = S.exact
    EXACT_T: tl.constexpr = T.exact
    block, example, head = place(table)
    queries = size(table + QUERIES)
    keys = size(table + KEYS)
    theirs = table + SIDE
    first = block * ROWS
    rows = first + tl.arange(0, ROWS)
    counted = tokens(table, valid, example, rows, rows < queries, WHICH)
    low, high = span(table, spans, example, block, COLUMNS)

    q = rows_of(
        begin(q_s, table + SIDE_QUERY, example, head, UNIT_S),
        _step(table + SIDE_QUERY, UNIT_S),
        first,
        counted,
        WIDTH_S,
        PADDED_S,
    )
    their_q = rows_of(
        begin(q_t, theirs + SIDE_QUERY, example, head, UNIT_T),
        _step(theirs + SIDE_QUERY, UNIT_T),
        first,
        counted,
        WIDTH_T,
        PADDED_T,
    )
    key = begin(k_s, table + SIDE_KEY, example, _key_head(table, head), UNIT_S)
    their_key = begin(k_t, theirs + SIDE_KEY, example, _key_head(theirs, head), UNIT_T)
    key_step = _step(table + SIDE_KEY, UNIT_S)
    their_key_step = _step(theirs + SIDE_KEY, UNIT_T)
    mask = begin(mask_s, table + SIDE_MASK, example, head, MASK_UNIT_S)
    their_mask = begin(mask_t, theirs + SIDE_MASK, example, head, MASK_UNIT_T)
    mask_step = _step(table + SIDE_MASK, MASK_UNIT_S)
    their_mask_step = _step(theirs + SIDE_MASK, MASK_UNIT_T)
    limit = keys_of(table, MASK_UNIT_S)
    their_limit = keys_of(table, MASK_UNIT_T)
    scale = number(table + SIDE_SCALE)
    their_scale = number(theirs + SIDE_SCALE)
    at = (example * tl.load(table + HEADS) + head) * queries + rows
    sum_s = tl.zeros((ROWS,), tl.float32)
    sum_t = sum_s
    if LOSS != SCORES:
        sum_s = tl.load(sums_s + at, mask=rows < queries, other=float("inf"))
        sum_t = tl.load(sums_t + at, mask=rows < queries, other=float("inf"))

    value = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS,), tl.int32)
    mass = tl.zeros((ROWS,), tl.float32)
    rest = tl.zeros((ROWS,), tl.float32)
    slope = tl.zeros((ROWS, PADDED_S), tl.float32)
    mean = tl.zeros((ROWS, PADDED_S), tl.float32)
    for start in range(low, high, COLUMNS):
        kpos = start + tl.arange(0, COLUMNS)
        found_of = of_keys(flags, example, kpos, keys, FLAGS)
        seen = has(found_of, SEEN_S)
        their_seen = has(found_of, SEEN_T)
        k = rows_of(key, key_step, start, seen, WIDTH_S, PADDED_S)
        their_k = rows_of(their_key, their_key_step, start, their_seen, WIDTH_T, PADDED_T)
        s = product(q, tl.trans(k), EXACT_S)
        t = product(their_q, tl.trans(their_k), EXACT_T)
        at_q = rows[:, None]
        at_k = kpos[None, :]
        s = masked(s * scale, seen[None, :], mask, mask_step, at_q, at_k, queries, limit, S, BITS)
        t = masked(t * their_scale, their_seen[None, :], their_mask, their_mask_step, at_q, at_k, queries, their_limit, T, BITS)
        entries = has(found_of, COUNTS)[None, :]
        if LOSS == SCORES or WHICH == PAIRS:
            entries = pairs(table, valid, example, head, at_q, at_k, entries & counted[:, None], WHICH)
        weight, a, values, p, kept, entries = _pull(s, t, sum_s[:, None], sum_t[:, None], entries, WHICH, LOSS)
        value += tl.sum(values, 1)
        if LOSS == SCORES:
            found += tl.sum(entries.to(tl.int32), 1)
        if GRADIENT:
            slope += product(operand(a * LIFT, k, EXACT_S), k, EXACT_S)
            if LOSS == KL:
                mass += tl.sum(kept, 1)
                rest += tl.sum(p - kept, 1)
            if LOSS == MSE:
                rest += tl.sum(a, 1)
                mean += product(operand(weight * LIFT, k, EXACT_S), k, EXACT_S)
    tl.store(part + tl.program_id(0), tl.sum(value, 0))
    if LOSS == SCORES:
        tl.store(numbers + tl.program_id(0), tl.sum(found, 0))
    if GRADIENT:
        if LOSS == KL:
            # Where nothing is left of p the sums of q and p need not be one to the last digit for the slope to be none.
            rest = tl.where(mass == 0, 1.0, rest)
            rest = tl.where(sum_s == float("inf"), 0.0, rest)
            if tl.max(rest, 0) > 0:
                for start in range(low, high, COLUMNS):
                    kpos = start + tl.arange(0, COLUMNS)
                    seen = has(of_keys(flags, example, kpos, keys, S.kind == BOOL), SEEN_S)
                    k = rows_of(key, key_step, start, seen, WIDTH_S, PADDED_S)
                    s = product(q, tl.trans(k), EXACT_S) * scale
                    s = masked(s, seen[None, :], mask, mask_step, rows[:, None], kpos[None, :], queries, limit, S, BITS)
                    weight = tl.exp2(s - sum_s[:, None])
                    mean += product(operand(weight * LIFT, k, EXACT_S), k, EXACT_S)
        if LOSS != SCORES:
            slope -= rest[:, None] * mean
            tl.store(rests + at, rest, mask=rows < queries)
        slope *= tl.load(factor) * scale * (1.0 / (BITS * LIFT))
        to = begin(out, table + BY_QUERY, example, head, OUT_UNIT)
        write_rows(to, _step(table + BY_QUERY, OUT_UNIT), first, slope, rows < queries, WIDTH_S, PADDED_S)


@triton.jit
def by_key(
    table,
    q_s,
    k_s,
    mask_s,
    q_t,
    k_t,
    mask_t,
    valid,
    spans,
    flags,
    sums_s,
    sums_t,
    rests,
    factor,
    out,
    S: tl.constexpr,
    T: tl.constexpr,
    WHICH: tl.constexpr,
    LOSS: tl.constexpr,
    LIFT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the gradient by the key, of ``ROWS`` keys with ``COLUMNS`` queries at a time."""
    BITS: tl.constexpr = 1.0 if LOSS == SCORES else LOG2_E
    FLAGS: tl.constexpr = S.kind == BOOL or T.kind == BOOL or WHICH == TOKENS
    UNIT_S: tl.constexpr = S.unit
    UNIT_T: tl.constexpr = T.unit
    MASK_UNIT_S: tl.constexpr = S.mask_unit
    MASK_UNIT_T: tl.constexpr = T.mask_unit
    WIDTH_S: tl.constexpr = S.width
    WIDTH_T: tl.constexpr = T.width
    PADDED_S: tl.constexpr = S.padded
    PADDED_T: tl.constexpr = T.padded
    EXACT_S: tl.constexpr = S.exact
    EXACT_T: tl.constexpr = T.exact
    heads = tl.load(table + HEADS)
    groups = tl.load(table + SIDE_GROUPS)
    blocks = size(table + KEY_BLOCKS)
    block = tl.program_id(0) % blocks
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    example = pair // (heads // groups)
    key_head = pair % (heads // groups)
    queries = size(table + QUERIES)
    keys = size(table + KEYS)
    theirs = table + SIDE
    first = block * ROWS
    rows = first + tl.arange(0, ROWS)
    low, high = span(table, spans, example, tl.load(table + BLOCKS) + block, COLUMNS)

    key = begin(k_s, table + SIDE_KEY, example, key_head, UNIT_S)
    found_of = of_keys(flags, example, rows, keys, FLAGS)
    seen = has(found_of, SEEN_S)
    their_seen = has(found_of, SEEN_T)
    k = rows_of(key, _step(table + SIDE_KEY, UNIT_S), first, seen, WIDTH_S, PADDED_S)
    their_key_step = _step(theirs + SIDE_KEY, UNIT_T)
    query_step = _step(table + SIDE_QUERY, UNIT_S)
    their_query_step = _step(theirs + SIDE_QUERY, UNIT_T)
    mask_step = _step(table + SIDE_MASK, MASK_UNIT_S)
    their_mask_step = _step(theirs + SIDE_MASK, MASK_UNIT_T)
    limit = keys_of(table, MASK_UNIT_S)
    their_limit = keys_of(table, MASK_UNIT_T)
    scale = number(table + SIDE_SCALE)
    their_scale = number(theirs + SIDE_SCALE)
    slope = tl.zeros((ROWS, PADDED_S), tl.float32)
    for member in range(0, groups.to(tl.int32)):
        head = key_head * groups + member
        their_key = begin(k_t, theirs + SIDE_KEY, example, _key_head(theirs, head), UNIT_T)
        their_k = rows_of(their_key, their_key_step, first, their_seen, WIDTH_T, PADDED_T)
        query = begin(q_s, table + SIDE_QUERY, example, head, UNIT_S)
        their_query = begin(q_t, theirs + SIDE_QUERY, example, head, UNIT_T)
        mask = begin(mask_s, table + SIDE_MASK, example, head, MASK_UNIT_S)
        their_mask = begin(mask_t, theirs + SIDE_MASK, example, head, MASK_UNIT_T)
        line = (example * heads + head) * queries
        for start in range(low, high, COLUMNS):
            qpos = start + tl.arange(0, COLUMNS)
            counted = tokens(table, valid, example, qpos, qpos < queries, WHICH)
            q = rows_of(query, query_step, start, counted, WIDTH_S, PADDED_S)
            their_q = rows_of(their_query, their_query_step, start, counted, WIDTH_T, PADDED_T)
            s = product(k, tl.trans(q), EXACT_S)
            t = product(their_k, tl.trans(their_q), EXACT_T)
            at_q = qpos[None, :]
            at_k = rows[:, None]
            s = masked(s * scale, seen[:, None], mask, mask_step, at_q, at_k, queries, limit, S, BITS)
            t = masked(
                t * their_scale, their_seen[:, None], their_mask, their_mask_step, at_q, at_k, queries, their_limit, T, BITS
            )
            sum_s = tl.zeros((COLUMNS,), tl.float32)
            sum_t = sum_s
            rest = sum_s
            if LOSS != SCORES:
                sum_s = tl.load(sums_s + line + qpos, mask=qpos < queries, other=float("inf"))
                sum_t = tl.load(sums_t + line + qpos, mask=qpos < queries, other=float("inf"))
                rest = tl.load(rests + line + qpos, mask=qpos < queries, other=0.0)
            entries = has(found_of, COUNTS)[:, None]
            if LOSS == SCORES or WHICH == PAIRS:
                entries = pairs(table, valid, example, head, at_q, at_k, entries & counted[None, :], WHICH)
            weight, a, _, _, _, _ = _pull(s, t, sum_s[None, :], sum_t[None, :], entries, WHICH, LOSS)
            if LOSS != SCORES:
                a -= weight * rest[None, :]
            slope += product(operand(a * LIFT, q, EXACT_S), q, EXACT_S)
    slope *= tl.load(factor) * scale * (1.0 / (BITS * LIFT))
    to = begin(out, table + BY_KEY, example, key_head, OUT_UNIT)
    write_rows(to, _step(table + BY_KEY, OUT_UNIT), first, slope, rows < keys, WIDTH_S, PADDED_S)
