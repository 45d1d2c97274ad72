"""Tiles of maps, and which of them hold anything.

A tile is ``[queries, keys]``, or the other way round where the keys stay with a program: positions come as ``qpos`` and
``kpos`` with a dimension of size one each, so that everything here works for both. Scores are to base two, which is what the
hardware has exponentials for; where the score of a key is -inf a query does not attend to it.
"""

import triton
import triton.language as tl

from .. import maps

ADDED = tl.constexpr(maps.ADDED)
BLOCKS = tl.constexpr(maps.BLOCKS)
BOOL = tl.constexpr(maps.BOOL)
CAUSAL = tl.constexpr(maps.CAUSAL)
OPEN = tl.constexpr(maps.OPEN)
PAIRS = tl.constexpr(maps.PAIRS)
TOKENS = tl.constexpr(maps.TOKENS)
HEADS = tl.constexpr(maps.HEADS)
COUNTS = tl.constexpr(maps.COUNTS)
KEYS = tl.constexpr(maps.KEYS)
KEY_BLOCKS = tl.constexpr(maps.KEY_BLOCKS)
QUERIES = tl.constexpr(maps.QUERIES)
SEEN_S = tl.constexpr(maps.SEEN_S)
SEEN_T = tl.constexpr(maps.SEEN_T)
SIDE = tl.constexpr(maps.SIDE)
SIDE_MASK = tl.constexpr(maps.SIDE_MASK)
VALID = tl.constexpr(maps.VALID)
LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def number(at):
    """A float32 whose bits stand in a column."""
    return tl.load(at).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def size(at):
    return tl.load(at).to(tl.int32)


@triton.jit
def keys_of(table, UNIT: tl.constexpr):
    """The number of keys, known to be a multiple of ``UNIT``."""
    return tl.multiple_of(tl.load(table + KEYS), UNIT).to(tl.int32)


@triton.jit
def place(table):
    """Which block of queries of which head of which example a program does."""
    heads = tl.load(table + HEADS)
    blocks = size(table + BLOCKS)
    program = tl.program_id(0)
    pair = (program // blocks).to(tl.int64)
    return program % blocks, pair // heads, pair % heads


@triton.jit
def begin(tensor, view, example, head, UNIT: tl.constexpr):
    """Where a head of an example begins, strides of examples and heads being the columns of ``view``."""
    return tensor + example * tl.multiple_of(tl.load(view), UNIT) + head * tl.multiple_of(tl.load(view + 1), UNIT)


@triton.jit
def rows_of(start, step, first, load, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """The rows from ``first`` on that are to be loaded; zero elsewhere."""
    rows = tl.arange(0, load.shape[0])
    columns = tl.arange(0, PADDED)
    mask = load[:, None]
    if WIDTH != PADDED:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(start + first * step + rows[:, None] * step + columns[None, :], mask=mask, other=0.0)


@triton.jit
def write_rows(start, step, first, found, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Write the rows from ``first`` on that are inside."""
    rows = tl.arange(0, inside.shape[0])
    columns = tl.arange(0, PADDED)
    mask = inside[:, None]
    if WIDTH != PADDED:
        mask = mask & (columns < WIDTH)[None, :]
    at = start + first * step + rows[:, None] * step + columns[None, :]
    tl.store(at, found.to(start.dtype.element_ty), mask=mask)


@triton.jit
def product(a, b, EXACT: tl.constexpr):
    """A matrix product that sums in float32; EXACT also multiplies in it."""
    if EXACT:
        found = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        found = tl.dot(a, b)
    return found


@triton.jit
def operand(slopes, other, EXACT: tl.constexpr):
    """Slopes as a factor of a product with ``other``."""
    return slopes if EXACT else slopes.to(other.dtype)


@triton.jit
def masked(s, inside, mask, step, qpos, kpos, queries, keys, S: tl.constexpr, BITS: tl.constexpr):
    """Scores with the mask of their side: -inf where the query does not see the key.

    Args:
        inside: which keys any query sees.
        step: from the mask of one query to that of the next.
        keys: how many there are, as `keys_of` gives it for the mask's sake.
        BITS: what an added mask is multiplied by.
    """
    KEY_STEP: tl.constexpr = S.key_step
    if S.kind == CAUSAL:
        inside = inside & (kpos <= qpos)
    if S.kind == ADDED or (S.kind == BOOL and not (S.flat and S.shared)):
        if S.flat:
            found = tl.load(mask + kpos * KEY_STEP, mask=kpos < keys, other=0)
        else:
            found = tl.load(mask + qpos * step + kpos * KEY_STEP, mask=(kpos < keys) & (qpos < queries), other=0)
        if S.kind == BOOL:
            inside = inside & (found != 0)
        else:
            s += found.to(tl.float32) * BITS
    return tl.where(inside, s, float("-inf"))


@triton.jit
def pairs(table, valid, example, head, qpos, kpos, inside, WHICH: tl.constexpr):
    """Which of the entries of a tile that are inside count, where that is given for each."""
    if WHICH == PAIRS:
        valid += example * tl.load(table + VALID) + head * tl.load(table + VALID + 1)
        at = valid + qpos * tl.load(table + VALID + 2) + kpos * tl.load(table + VALID + 3)
        inside = inside & (tl.load(at, mask=inside, other=0) != 0)
    return inside


@triton.jit
def tokens(table, valid, example, positions, inside, WHICH: tl.constexpr):
    """Which positions hold tokens that count."""
    if WHICH == TOKENS:
        at = valid + example * tl.load(table + VALID) + positions
        inside = inside & (tl.load(at, mask=inside, other=0) != 0)
    return inside


@triton.jit
def of_keys(flags, example, kpos, keys, FLAGS: tl.constexpr):
    """What `spans` found of keys, if it may have found anything but that all are seen and count; zero behind the last.

    What a key holds that no query sees, NaN included, is not to be loaded.
    """
    if FLAGS:
        found = tl.load(flags + example * keys + kpos, mask=kpos < keys, other=0)
    else:
        found = tl.where(kpos < keys, SEEN_S + SEEN_T + COUNTS, 0)
    return found


@triton.jit
def has(flags, FLAG: tl.constexpr):
    return (flags & FLAG) != 0


@triton.jit
def finite(m):
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def more(s, m, z):
    """The running maxima and sums of exponentials of rows with a tile more."""
    new = tl.maximum(m, tl.max(s, 1))
    base = finite(new)
    return new, z * tl.exp2(m - base) + tl.sum(tl.exp2(s - base[:, None]), 1)


@triton.jit
def log_sum(m, z, never):
    """The log2 of the sum of rows; infinite where all keys are hidden, so that no key gets anything of it."""
    return tl.where((m <= never) & (z == z), float("inf"), finite(m) + tl.log2(z))


@triton.jit
def span(table, spans, example, block, COLUMNS: tl.constexpr):
    """The columns of a block from the first tile to behind the last that holds anything, as `spans` found. Blocks of keys stand
    behind those of queries."""
    at = spans + (example * (tl.load(table + BLOCKS) + tl.load(table + KEY_BLOCKS)) + block) * 2
    return tl.load(at) // COLUMNS * COLUMNS, tl.load(at + 1)


@triton.jit
def _ends(found, positions, low, high):
    """The first position found and the one behind the last, with those that were found before."""
    low = tl.minimum(low, tl.min(tl.where(found, positions, 2147483647), 0))
    return low, tl.maximum(high, tl.max(tl.where(found, positions + 1, 0), 0))


@triton.jit
def _of_mask(table, side, mask, example, first, S: tl.constexpr, BY_KEY: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """For a block of queries the keys that any of them sees, the first and the one behind the last; for one of keys the queries
    that see any; and which of the block's rows see or are seen."""
    MASK_UNIT: tl.constexpr = S.mask_unit
    queries = size(table + QUERIES)
    keys = size(table + KEYS)
    columns = queries if BY_KEY else keys
    seen = first + tl.arange(0, ROWS) < (keys if BY_KEY else queries)
    low = columns * 0
    high = columns
    if S.kind == CAUSAL:
        if BY_KEY:
            low = tl.minimum(first, columns)
        else:
            high = tl.minimum(first + ROWS, columns)
    if S.kind == BOOL:
        LINES: tl.constexpr = 1 if S.flat else (CHUNK if BY_KEY else ROWS)
        WIDE: tl.constexpr = ROWS if BY_KEY else CHUNK
        KEY_STEP: tl.constexpr = S.key_step
        by_head = tl.multiple_of(tl.load(side + SIDE_MASK + 1), MASK_UNIT)
        step = tl.multiple_of(tl.load(side + SIDE_MASK + 2), MASK_UNIT)
        limit = keys_of(table, MASK_UNIT)
        mask += example * tl.multiple_of(tl.load(side + SIDE_MASK), MASK_UNIT)
        heads = 1 if S.shared else size(table + HEADS)
        lines = tl.minimum(queries, 1) if S.flat else queries
        low = columns
        high = columns * 0
        seen = seen & (first < 0)
        for head in range(0, heads):
            for start in range(0, lines if BY_KEY else keys, LINES if BY_KEY else WIDE):
                qpos = tl.arange(0, LINES)
                if not S.flat:
                    qpos += start if BY_KEY else first
                kpos = (first if BY_KEY else start) + tl.arange(0, WIDE)
                inside = (qpos < lines)[:, None] & (kpos < limit)[None, :]
                at = mask + head * by_head + qpos[:, None] * step + kpos[None, :] * KEY_STEP
                found = (tl.load(at, mask=inside, other=0) != 0).to(tl.int32)
                if BY_KEY:
                    low, high = _ends(tl.max(found, 1) > 0, qpos, low, high)
                    seen = seen | (tl.max(found, 0) > 0)
                else:
                    low, high = _ends(tl.max(found, 0) > 0, kpos, low, high)
        if BY_KEY and S.flat:
            high = tl.where(high > 0, queries, 0)
    return low, high, seen


@triton.jit
def _of_tokens(table, valid, example, columns, CHUNK: tl.constexpr):
    """The first token that counts, and the one behind the last."""
    low = columns
    high = columns * 0
    for start in range(0, columns, CHUNK):
        positions = start + tl.arange(0, CHUNK)
        low, high = _ends(tokens(table, valid, example, positions, positions < columns, TOKENS), positions, low, high)
    return low, high


@triton.jit
def _span(
    table,
    mask_s,
    mask_t,
    valid,
    out,
    flags,
    example,
    first,
    S: tl.constexpr,
    T: tl.constexpr,
    WHICH: tl.constexpr,
    BOTH: tl.constexpr,
    BY_KEY: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    queries = size(table + QUERIES)
    keys = size(table + KEYS)
    columns = queries if BY_KEY else keys
    positions = first + tl.arange(0, ROWS)
    low, high, by_s = _of_mask(table, table, mask_s, example, first, S, BY_KEY, ROWS, CHUNK)
    low_t, high_t, by_t = _of_mask(table, table + SIDE, mask_t, example, first, T, BY_KEY, ROWS, CHUNK)
    low = tl.minimum(low, low_t)
    high = tl.maximum(high, high_t)
    rows = keys if BY_KEY else queries
    counted = tokens(table, valid, example, positions, positions < rows, WHICH)
    if WHICH == TOKENS:
        if BOTH or BY_KEY:
            low_v, high_v = _of_tokens(table, valid, example, columns, CHUNK)
            low = tl.maximum(low, low_v)
            high = tl.minimum(high, high_v)
        if BOTH or not BY_KEY:
            high = tl.where(tl.max(counted.to(tl.int32), 0) > 0, high, 0)
    tl.store(out, tl.minimum(low, high))
    tl.store(out + 1, high)
    if BY_KEY:
        found = tl.where(by_s, SEEN_S, 0) + tl.where(by_t, SEEN_T, 0) + tl.where(counted, COUNTS, 0)
        tl.store(flags + example * keys + positions, found, mask=positions < keys)


@triton.jit
def spans(
    table,
    mask_s,
    mask_t,
    valid,
    out,
    flags,
    S: tl.constexpr,
    T: tl.constexpr,
    WHICH: tl.constexpr,
    BOTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Of each example, for each block of queries the keys that matter to them, and for each of keys the queries that these
    matter to: the first, and the one behind the last.

    A key matters to a query that counts, and sees it on either side. BOTH: tokens count as keys too.
    """
    by_query = size(table + BLOCKS)
    every = by_query + size(table + KEY_BLOCKS)
    block = tl.program_id(0) % every
    example = (tl.program_id(0) // every).to(tl.int64)
    out += (example * every + block) * 2
    if block < by_query:
        first = block * ROWS
        _span(table, mask_s, mask_t, valid, out, flags, example, first, S, T, WHICH, BOTH, False, ROWS, CHUNK)
    else:
        first = (block - by_query) * KEY_ROWS
        _span(table, mask_s, mask_t, valid, out, flags, example, first, S, T, WHICH, BOTH, True, KEY_ROWS, CHUNK)
