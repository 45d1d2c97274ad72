"""Losses on logits: all terms of one student and one teacher at one temperature, and cross-entropy with labels, in one kernel.

One program does one row. It sweeps over the classes, in alternating directions, since what a sweep read last is still in the
cache:

    1  the largest logits and the sums of exponentials, of both sides; for reverse KL, whose gradient needs it, its value too
    2  only for js, skew_kl and tvd: the sums that their gradients need, and their values
    3  the gradient, and the other values

The mathematics is that of `hookdistill.fused.forms`, with logarithms to base two, which is what the hardware has: x = log2 q
and y = log2 p at the temperature, x1 = log2 q1 at one. Row maxima are subtracted before anything is scaled, so that logits of
ten thousand lose no digit. A class beyond the row's ends is like one that is excluded: x = -inf and q = 0. Log ratios y - x are
held within 115, beyond which p or q is nothing, and with it whatever it multiplies.

Loads are ``[LANES, UNIT]``, a UNIT being 16 bytes. Running maxima are ``[LANES]``, so that a new one costs a thread one
exponential
for each of its UNITs, not one for each class.
"""

import triton
import triton.language as tl

from .. import records
from .common import counted, number, offsets

LAUNCH_GRADIENT = tl.constexpr(records.LAUNCH_GRADIENT)
LAUNCH_LABELS = tl.constexpr(records.LAUNCH_LABELS)
LAUNCH_STUDENT = tl.constexpr(records.LAUNCH_STUDENT)
LAUNCH_TEACHER = tl.constexpr(records.LAUNCH_TEACHER)
LAUNCH_TEMPERATURE = tl.constexpr(records.LAUNCH_TEMPERATURE)
LAUNCH_TERMS = tl.constexpr(records.LAUNCH_TERMS)
ON_COLUMNS = tl.constexpr(records.ON_COLUMNS)
ON_ROWS = tl.constexpr(records.ON_ROWS)
ANYWHERE = tl.constexpr(records.ANYWHERE)
TERM = tl.constexpr(records.TERM)
TERM_COEFFICIENT = tl.constexpr(records.TERM_COEFFICIENT)
TERM_CONSTANTS = tl.constexpr(records.TERM_CONSTANTS)
TERM_MASK = tl.constexpr(records.TERM_MASK)
TERM_PART = tl.constexpr(records.TERM_PART)
TERM_SHARE = tl.constexpr(records.TERM_SHARE)
TERM_STRIDE = tl.constexpr(records.TERM_STRIDE)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _finite(m):
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _log2(x, EXACT: tl.constexpr):
    """The hardware's logarithm: its error is 2^-22 around one, less than that of a difference of two log-probabilities."""
    if EXACT:
        log = tl.log2(x)
    else:
        log = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return log


@triton.jit
def _row(view, offset, lead, DTYPE: tl.constexpr, UNIT: tl.constexpr, ALIGN: tl.constexpr):
    """Where a row is read from: ``lead`` classes before its start, which is on 16 bytes unless rows stand anywhere."""
    start = tl.load(view).to(tl.pointer_type(DTYPE))
    if ALIGN != ANYWHERE:
        start = tl.multiple_of(start, 16)
    if ALIGN == ON_ROWS:
        offset = tl.multiple_of(offset - lead, UNIT)
    return start + offset


@triton.jit
def _units(block, LANES: tl.constexpr, UNIT: tl.constexpr):
    return block * (LANES * UNIT) + tl.arange(0, LANES)[:, None] * UNIT


@triton.jit
def _logits(row, block, blocks, lead, classes, LANES: tl.constexpr, UNIT: tl.constexpr, ALIGN: tl.constexpr):
    """A block of a row, -inf beyond its ends.

    Units on 16 bytes are loaded whole if they hold any class of the row, which never leaves the memory that the tensor is in,
    and what they hold of other rows is dropped. So all loads are 16 bytes wide.
    """
    unit = _units(block, LANES, UNIT)
    at = unit + tl.arange(0, UNIT)[None, :]
    if ALIGN == ANYWHERE:
        logits = tl.load(row + at, mask=at < classes, other=float("-inf")).to(tl.float32)
    else:
        logits = tl.load(row + at, mask=unit < lead + classes, other=float("-inf")).to(tl.float32)
    if ALIGN == ON_ROWS:
        if (block == 0) | (block == blocks - 1):
            logits = tl.where((at >= lead) & (at < lead + classes), logits, float("-inf"))
    return logits


@triton.jit
def _write(row, block, blocks, lead, classes, slope, UNIT: tl.constexpr, ALIGN: tl.constexpr, ADD: tl.constexpr):
    """Write a block of the gradient of a row: whole units at once, and what is left at both ends one by one."""
    unit = _units(block, slope.shape[0], UNIT)
    at = unit + tl.arange(0, UNIT)[None, :]
    inside = (at >= lead) & (at < lead + classes)
    if ADD:
        slope += tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
    slope = slope.to(row.dtype.element_ty)
    if ALIGN == ANYWHERE:
        tl.store(row + at, slope, mask=inside)
    elif ALIGN == ON_COLUMNS:
        tl.store(row + at, slope, mask=unit < classes)
    else:
        whole = (unit >= lead) & (unit + UNIT <= lead + classes)
        tl.store(row + at, slope, mask=whole)
        if (block == 0) | (block == blocks - 1):
            tl.store(row + at, slope, mask=inside & (whole == 0))


@triton.jit
def _exponentials(logits, m, z, heat2):
    """The running maximum and sum of exponentials with a block more, what is left of the old sum, and the exponentials."""
    new = tl.maximum(m, tl.max(logits, 1))
    base = _finite(new)
    keep = tl.exp2((m - base) * heat2)
    e = tl.exp2((logits - base[:, None]) * heat2)
    return new, z * keep + tl.sum(e, 1), keep, e


@triton.jit
def _together(m, z, heat2):
    """Maximum and log2 of the sum over all lanes, and what is left of each lane's sum."""
    top = tl.max(m, 0)
    keep = tl.exp2((m - _finite(top)) * heat2)
    return top, tl.log2(tl.sum(z * keep, 0)), keep


@triton.jit
def _weight(launch, terms, which: tl.constexpr, row):
    """Of a term: its record, whether the row counts in it, the row's share, and that times the coefficient."""
    term = terms + tl.load(launch + LAUNCH_TERMS + which) * TERM
    share = number(term + TERM_SHARE, row.to(tl.int64) * tl.load(term + TERM_STRIDE))
    valid = counted(term + TERM_MASK, row, share != 0, True)
    share = tl.where(valid, share, 0.0)
    return term, valid, share, share * number(term + TERM_COEFFICIENT, 0)


@triton.jit
def _constant(term):
    return tl.load(term + TERM_CONSTANTS).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _store(part, term, row, valid, value, share):
    tl.store(part + tl.load(term + TERM_PART) + row, tl.where(valid, value * share, 0.0))


@triton.jit
def _mixture(x, y, share):
    """m / q for m = share p + (1 - share) q, one where p is q; and p's log ratio to q."""
    d = tl.minimum(tl.maximum(y, -290.0) - tl.maximum(x, -290.0), 115.0)
    return 1.0 + share * (tl.exp2(d) - 1.0), d


@triton.jit
def _counts(valid, slope, SOLO: tl.constexpr):
    """A slope where its term counts; NaN times zero is NaN. Of a row that counts in no term nothing is read at all."""
    return slope if SOLO else tl.where(valid, slope, 0.0)


@triton.jit
def distribution_rows(
    launch,
    terms,
    part,
    units,
    their_units,
    width_units,
    MULTIPLE: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    G: tl.constexpr,
    LANES: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    KL: tl.constexpr,
    REVERSE: tl.constexpr,
    JS: tl.constexpr,
    SKEW: tl.constexpr,
    TVD: tl.constexpr,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    SOLO: tl.constexpr,
    ONE: tl.constexpr,
    GRADIENT: tl.constexpr,
    ADD: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Program i does row i. The student is compared in ``units * MULTIPLE`` classes, so that the compiler knows what their
    number is a multiple of, and the teacher in ``their_units * MULTIPLE``. Rows of the gradient are ``width_units * MULTIPLE``
    wide; beyond the classes that are compared they are not written.

    KL, REVERSE and so on are the places of their terms in the launch, -1 where there is none; SOLO: it has one only. ONE: the
    temperature is known to be one, so that labels share the student's softmax. ADD: to the gradient that is there. EXACT: no
    inline assembly, which the interpreter does not know.
    """
    row = tl.program_id(0)
    classes = units * MULTIPLE
    their_classes = their_units * MULTIPLE
    TEACHER: tl.constexpr = (KL >= 0) | (REVERSE >= 0) | (JS >= 0) | (SKEW >= 0) | (TVD >= 0) | (SOFT >= 0)
    TWICE: tl.constexpr = (JS >= 0) | (SKEW >= 0) | (TVD >= 0)
    COLD: tl.constexpr = (HARD >= 0) & (TEACHER & (not ONE))
    heat = number(launch + LAUNCH_TEMPERATURE, 0)
    heat2 = LOG2_E / heat
    scale = heat * heat * LN_2

    live = row < 0
    if KL >= 0:
        kl, kl_valid, kl_share, kl_weight = _weight(launch, terms, KL, row)
        live = live | kl_valid
    if REVERSE >= 0:
        reverse, reverse_valid, reverse_share, reverse_weight = _weight(launch, terms, REVERSE, row)
        live = live | reverse_valid
    if JS >= 0:
        js, js_valid, js_share, js_weight = _weight(launch, terms, JS, row)
        beta = _constant(js)
        live = live | js_valid
    if SKEW >= 0:
        skew, skew_valid, skew_share, skew_weight = _weight(launch, terms, SKEW, row)
        alpha = _constant(skew)
        live = live | skew_valid
    if TVD >= 0:
        tvd, tvd_valid, tvd_share, tvd_weight = _weight(launch, terms, TVD, row)
        live = live | tvd_valid
    if SOFT >= 0:
        soft, soft_valid, soft_share, soft_weight = _weight(launch, terms, SOFT, row)
        live = live | soft_valid
    if HARD >= 0:
        hard, hard_valid, hard_share, hard_weight = _weight(launch, terms, HARD, row)
        smoothing = _constant(hard)
        live = live | hard_valid

    ours_offset = offsets(launch + LAUNCH_STUDENT, row, MULTIPLE, True)
    lead = 0
    if ALIGN == ON_ROWS:
        lead = (ours_offset % UNIT).to(tl.int32)
    ours = _row(launch + LAUNCH_STUDENT, ours_offset, lead, S, UNIT, ALIGN)
    if TEACHER:
        theirs = _row(launch + LAUNCH_TEACHER, offsets(launch + LAUNCH_TEACHER, row, MULTIPLE, True), lead, T, UNIT, ALIGN)
    out = _row(launch + LAUNCH_GRADIENT, row.to(tl.int64) * (width_units * MULTIPLE), lead, G, UNIT, ALIGN)
    blocks = tl.cdiv(lead + tl.maximum(classes, their_classes), LANES * UNIT)
    sweep = tl.where(live, blocks, 0)

    # Sweep 1, forwards.
    ms = tl.full((LANES,), float("-inf"), tl.float32)
    mt = ms
    zs = tl.zeros((LANES,), tl.float32)
    zt = zs
    z1 = zs
    far = zs
    for block in range(0, sweep):
        s = _logits(ours, block, blocks, lead, classes, LANES, UNIT, ALIGN)
        base_s, base_t, old = _finite(ms), _finite(mt), zs
        if COLD:
            new = _finite(tl.maximum(ms, tl.max(s, 1)))
            z1 = z1 * tl.exp2((ms - new) * LOG2_E) + tl.sum(tl.exp2((s - new[:, None]) * LOG2_E), 1)
        ms, zs, keep, e = _exponentials(s, ms, zs, heat2)
        if TEACHER:
            t = _logits(theirs, block, blocks, lead, their_classes, LANES, UNIT, ALIGN)
            mt, zt, keep_t, e_t = _exponentials(t, mt, zt, heat2)
            if REVERSE >= 0:  # the sum of e times the log ratio, both relative to the running maxima
                move = (base_s - _finite(ms)) - (base_t - _finite(mt))
                d = (s - _finite(ms)[:, None]) - (t - _finite(mt)[:, None])
                far = tl.where(keep == 0, 0.0, keep * (far + old * move)) + tl.sum(tl.where(e == 0, 0.0, e * d), 1)
    top_s, log_zs, keep = _together(ms, zs, heat2)
    if TEACHER:
        top_t, log_zt, keep_t = _together(mt, zt, heat2)
    if REVERSE >= 0:
        move = (_finite(ms) - _finite(top_s)) - (_finite(mt) - _finite(top_t))
        far = tl.where(keep == 0, 0.0, keep * (far + zs * move))
        reverse_kl = tl.sum(far, 0) / tl.sum(zs * keep, 0) * heat2 + log_zt - log_zs
        _store(part, reverse, row, reverse_valid, reverse_kl * scale, reverse_share)
    if COLD:
        top_1, log_z1, keep_1 = _together(ms, z1, LOG2_E)

    # Sweep 2, backwards.
    if TWICE:
        js_q = tl.zeros((LANES,), tl.float32)
        js_p = js_q
        skew_pull = js_q
        skew_p = js_q
        tvd_pull = js_q
        tvd_apart = js_q
        for step in range(0, sweep):
            block = blocks - 1 - step
            x = (_logits(ours, block, blocks, lead, classes, LANES, UNIT, ALIGN) - top_s) * heat2 - log_zs
            y = (_logits(theirs, block, blocks, lead, their_classes, LANES, UNIT, ALIGN) - top_t) * heat2 - log_zt
            q = tl.exp2(x)
            p = tl.exp2(y)
            if JS >= 0:
                mixture, d = _mixture(x, y, beta)
                over = _log2(mixture, EXACT)
                js_q -= tl.sum(q * over, 1)
                js_p += tl.sum(p * (d - over), 1)
            if SKEW >= 0:
                mixture, d = _mixture(x, y, alpha)
                skew_pull += tl.sum(tl.where(q == 0, 0.0, p / mixture), 1)
                skew_p += tl.sum(p * (d - _log2(mixture, EXACT)), 1)
            if TVD >= 0:
                apart = q - p
                tvd_pull += tl.sum(tl.where(apart > 0, q, tl.where(apart < 0, -q, 0.0)), 1)
                tvd_apart += tl.sum(tl.abs(apart), 1)
        if JS >= 0:
            js_kl = tl.sum(js_q, 0)
            _store(part, js, row, js_valid, (beta * tl.sum(js_p, 0) + (1.0 - beta) * js_kl) * scale, js_share)
        if SKEW >= 0:
            skew_mean = tl.sum(skew_pull, 0)
            _store(part, skew, row, skew_valid, tl.sum(skew_p, 0) * scale, skew_share)
        if TVD >= 0:
            tvd_mean = tl.sum(tvd_pull, 0)
            _store(part, tvd, row, tvd_valid, 0.5 * tl.sum(tvd_apart, 0) * heat * heat, tvd_share)

    # Sweep 3, the other way.
    if HARD >= 0:
        label = tl.load(tl.load(launch + LAUNCH_LABELS).to(tl.pointer_type(tl.int64)) + row)
        known = (label >= 0) & (label < classes)
        # A label that is no class makes loss and gradient NaN; a read beyond the row would make them anything.
        chosen = tl.load(ours + lead + tl.where(known, label, 0), mask=live & known, other=float("nan")).to(tl.float32)
        hard_weight = tl.where(known, hard_weight, float("nan"))
        hit = 1.0 - smoothing
        every = smoothing / classes
    if GRADIENT | ((KL >= 0) | ((SOFT >= 0) | (HARD >= 0))):
        kl_sum = tl.zeros((LANES,), tl.float32)
        soft_sum = kl_sum
        hard_sum = kl_sum
        for step in range(0, sweep):
            block = step if TWICE else blocks - 1 - step
            at = _units(block, LANES, UNIT) + tl.arange(0, UNIT)[None, :]
            s = _logits(ours, block, blocks, lead, classes, LANES, UNIT, ALIGN) - top_s
            slope = tl.zeros((LANES, UNIT), tl.float32)
            if TEACHER:
                x = s * heat2 - log_zs
                y = (_logits(theirs, block, blocks, lead, their_classes, LANES, UNIT, ALIGN) - top_t) * heat2 - log_zt
                q = tl.exp2(x)
                p = tl.exp2(y)
            if KL >= 0:
                kl_sum += tl.sum(tl.where(p == 0, 0.0, p * (y - x)), 1)
                slope += _counts(kl_valid, (q - p) * (kl_weight * heat), SOLO)
            if SOFT >= 0:
                soft_sum -= tl.sum(tl.where(p == 0, 0.0, p * x), 1)
                slope += _counts(soft_valid, (q - p) * (soft_weight * heat), SOLO)
            if REVERSE >= 0:
                terms_of_kl = tl.where(q == 0, 0.0, q * (x - y))
                slope += _counts(reverse_valid, (terms_of_kl - q * reverse_kl) * (reverse_weight * heat * LN_2), SOLO)
            if JS >= 0:
                mixture, d = _mixture(x, y, beta)
                pull = q * (_log2(mixture, EXACT) + js_kl)
                slope -= _counts(js_valid, pull * ((1.0 - beta) * js_weight * heat * LN_2), SOLO)
            if SKEW >= 0:
                mixture, d = _mixture(x, y, alpha)
                pull = tl.where(q == 0, 0.0, p / mixture) - q * skew_mean
                slope -= _counts(skew_valid, pull * ((1.0 - alpha) * skew_weight * heat), SOLO)
            if TVD >= 0:
                apart = q - p
                pull = tl.where(apart > 0, 1.0, tl.where(apart < 0, -1.0, 0.0)) - tvd_mean
                slope += _counts(tvd_valid, q * pull * (0.5 * tvd_weight * heat), SOLO)
            if HARD >= 0:
                if COLD:
                    x1 = s * LOG2_E - log_z1
                    q1 = tl.exp2(x1)
                elif TEACHER:
                    x1 = x
                    q1 = q
                else:
                    x1 = s * LOG2_E - log_zs
                    q1 = tl.exp2(x1)
                if smoothing != 0:
                    hard_sum += tl.sum(tl.where((at >= lead) & (at < lead + classes), x1, 0.0), 1)
                target = tl.where(at == lead + label, hit, 0.0) + every
                slope += _counts(hard_valid, (q1 - target) * hard_weight, SOLO)
            if GRADIENT:
                _write(out, block, blocks, lead, classes, slope, UNIT, ALIGN, ADD)
        if KL >= 0:
            _store(part, kl, row, kl_valid, tl.sum(kl_sum, 0) * scale, kl_share)
        if SOFT >= 0:
            _store(part, soft, row, soft_valid, tl.sum(soft_sum, 0) * scale, soft_share)
        if HARD >= 0:
            log_z = log_z1 if COLD else log_zs
            value = hit * (log_z * LN_2 - (chosen - top_s))
            if smoothing != 0:
                value -= every * LN_2 * tl.sum(hard_sum, 0)
            _store(part, hard, row, hard_valid, value, hard_share)
    if GRADIENT & (not ADD):
        for block in range(sweep, blocks):
            _write(out, block, blocks, lead, classes, tl.zeros((LANES, UNIT), tl.float32), UNIT, ALIGN, ADD)
