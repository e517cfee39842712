"""Channels last: how a sample is cut, and the moments of its pieces."""

import numpy as np

from groupnorm._engines.cpu.compiler import inlined, jitted
from groupnorm._engines.cpu.groups import group_channels
from groupnorm._engines.cpu.memory import (
    FLOAT64,
    element_size,
    load,
    load_first,
    load_one,
    pointer,
    prefetch,
    store_first,
    zeros,
)
from groupnorm._engines.cpu.simd import LANES, any_of, first_lanes, fma, maximum, minimum, narrow, select, total, widen
from groupnorm._engines.cpu.statistics import (
    count_real,
    far,
    few_moments,
    fewer,
    is_far,
    is_real,
    moments_by_element,
    out_of_range,
)

__all__ = [
    "AHEAD",
    "APPLY",
    "MERGE",
    "MOMENTS",
    "SUMS",
    "TILE",
    "group_moments",
    "merge_units",
    "slab_channels",
    "slab_groups",
    "unit_moments",
]  # fmt: skip

MOMENTS = SUMS = 1  # what a launch does first
APPLY, MERGE = 2, 4

TILE = 16  # rows that are summed together, a strip of channels at a time; 8 took 1.1 to 1.2 times as long in cache
AHEAD = 32  # rows from a load to the place that is asked for with it; with 16 the moments took 1.1 times as long
STRIP = 4 * LANES  # channels of a strip
PIVOT_ROWS = 8  # rows whose mean is the pivot


@jitted
def _strip_sums(x, mask, at, mask_at, rows, step, work, work_at, C):
    """Add the sums of d and d*d of a strip of channels over the rows of a tile to work; pivots lie there already."""
    m0, m1 = narrow(load(work, work_at), zeros(x)), narrow(load(work, work_at + LANES), zeros(x))
    m2, m3 = narrow(load(work, work_at + 2 * LANES), zeros(x)), narrow(load(work, work_at + 3 * LANES), zeros(x))
    s0 = s1 = s2 = s3 = q0 = q1 = q2 = q3 = zeros(x)
    for r in range(rows):
        if is_real(mask, mask_at + r):
            j = at + r * step
            for i in range(0, STRIP, LANES):
                prefetch(x, j + AHEAD * step + i)
            d0 = load(x, j) - m0
            d1 = load(x, j + LANES) - m1
            d2 = load(x, j + 2 * LANES) - m2
            d3 = load(x, j + 3 * LANES) - m3
            s0 += d0
            s1 += d1
            s2 += d2
            s3 += d3
            q0 = fma(d0, d0, q0)
            q1 = fma(d1, d1, q1)
            q2 = fma(d2, d2, q2)
            q3 = fma(d3, d3, q3)
    _add_to(work, work_at + C, s0, q0, C, LANES)
    _add_to(work, work_at + C + LANES, s1, q1, C, LANES)
    _add_to(work, work_at + C + 2 * LANES, s2, q2, C, LANES)
    _add_to(work, work_at + C + 3 * LANES, s3, q3, C, LANES)


@jitted
def _vector_sums(x, mask, at, mask_at, rows, step, work, work_at, C, lanes):
    """The same for one vector, of which `lanes` channels are ours."""
    m = narrow(load_first(work, work_at, lanes), zeros(x))
    s = q = zeros(x)
    for r in range(rows):
        if is_real(mask, mask_at + r):
            d = load_first(x, at + r * step, lanes) - m
            s += d
            q = fma(d, d, q)
    _add_to(work, work_at + C, s, q, C, lanes)


@inlined
def _add_to(work, at, s, q, C, lanes):
    """Add to the planes s and q of some channels."""
    store_first(work, at, load_first(work, at, lanes) + widen(s), lanes)
    store_first(work, at + C, load_first(work, at + C, lanes) + widen(q), lanes)


@jitted
def _close_vector(x, work, at, C, count, lanes):
    """From planes pivot, s, q of a vector of channels to pivot, offset, m2; whether a pivot is far from its mean."""
    s, q = load_first(work, at + C, lanes), load_first(work, at + 2 * C, lanes)
    offset = s * (1.0 / count)
    m2 = fma(s, 0.0 - offset, q)
    m2 = select(m2 < 0.0, 0.0, m2)
    store_first(work, at + C, offset, lanes)
    store_first(work, at + 2 * C, m2, lanes)
    return any_of(is_far(offset, m2, count, far(x, count)))


@inlined
def _start(work, at, C, pivot, lanes):
    """Sums of a vector of channels start with this pivot."""
    store_first(work, at, pivot, lanes)
    store_first(work, at + C, zeros(work), lanes)
    store_first(work, at + 2 * C, zeros(work), lanes)


@inlined
def _eighth(x, mask, at, mask_at, rows, place, share, step, lanes):
    """An eighth of the vector that lies `share` 1024ths down the rows, or of the first row's if that is not real; of
    float64 that of row `place`.
    """
    row = place if element_size(x) == 8 else rows * share >> 10
    return load_first(x, at + (row if is_real(mask, mask_at + row) else 0) * step, lanes) * 0.125


@inlined
def _unit_pivot(x, mask, at, mask_at, rows, step, lanes):
    """The mean of eight rows all over the unit, of which the first is real; of fewer rows the first. What a pivot is
    off the mean the roundings of the sums grow by: one row of normal numbers is off by a standard deviation, eight by a
    third, and neighbours, which are alike in pictures, by as much as one. So are rows at equal distances that fit the
    picture's width; multiples of the golden section fit none. (Of float64, where a pivot that is off by half a
    deviation is not kept, the first eight.) Added up in pairs, which gives the value itself where all are equal: a
    constant channel has no deviations.
    """
    if rows < PIVOT_ROWS:
        return load_first(x, at, lanes)
    e0 = _eighth(x, mask, at, mask_at, rows, 0, 0, step, lanes)
    e1 = _eighth(x, mask, at, mask_at, rows, 1, 632, step, lanes)
    e2 = _eighth(x, mask, at, mask_at, rows, 2, 241, step, lanes)
    e3 = _eighth(x, mask, at, mask_at, rows, 3, 874, step, lanes)
    e4 = _eighth(x, mask, at, mask_at, rows, 4, 483, step, lanes)
    e5 = _eighth(x, mask, at, mask_at, rows, 5, 92, step, lanes)
    e6 = _eighth(x, mask, at, mask_at, rows, 6, 725, step, lanes)
    e7 = _eighth(x, mask, at, mask_at, rows, 7, 334, step, lanes)
    return ((e0 + e1) + (e2 + e3)) + ((e4 + e5) + (e6 + e7))


@jitted
def unit_moments(p, a, x, mask, n, slot, unit, c0, c1):
    """Moments of channels c0..c1 over a unit's rows, as pivot, offset and m2, into place `slot` of work. Rows from the
    first real one on make the pivot; vectors of channels of which one was far from its mean, see statistics.py, are
    read again with the means as pivots. (Vectors, and not all of c0..c1: how wide a slab is must not show in the bits.)
    With few rows there is nothing to do before `group_moments`.
    """
    if mask is None and p.few:
        return
    work = pointer(a.work, FLOAT64)
    work_at = (slot * p.units + unit) * 3 * p.C
    first = unit * p.unit
    last = minimum(first + p.unit, p.S)
    count = _unit_count(p, mask, n, unit)
    while first < last - 1 and not is_real(mask, n * p.S + first):  # no further than the last row, real or not
        first += 1
    for c in range(c0, c1, LANES):
        pivot = _unit_pivot(x, mask, n * p.x_n + first * p.x_s + c, n * p.S + first, last - first, p.x_s, c1 - c)
        _start(work, work_at + c, p.C, widen(pivot), c1 - c)
    for row in range(first, last, TILE):
        rows = minimum(TILE, last - row)
        at, mask_at = n * p.x_n + row * p.x_s, n * p.S + row
        c = c0
        while c + STRIP <= c1:
            _strip_sums(x, mask, at + c, mask_at, rows, p.x_s, work, work_at + c, p.C)
            c += STRIP
        while c < c1:
            _vector_sums(x, mask, at + c, mask_at, rows, p.x_s, work, work_at + c, p.C, c1 - c)
            c += LANES
    count = maximum(count, 1.0)
    tile = fewer(x, TILE)
    for c in range(c0, c1, LANES):
        lanes = c1 - c
        if _close_vector(x, work, work_at + c, p.C, count, lanes):
            pivot = load_first(work, work_at + c, lanes) + load_first(work, work_at + p.C + c, lanes)
            _start(work, work_at + c, p.C, widen(narrow(pivot, zeros(x))), lanes)
            for row in range(first, last, tile):
                _vector_sums(x, mask, n * p.x_n + row * p.x_s + c, n * p.S + row, minimum(tile, last - row), p.x_s,
                             work, work_at + c, p.C, lanes)  # fmt: skip
            _close_vector(x, work, work_at + c, p.C, count, lanes)


@inlined
def _merged(work, at, C, pivot, offset, m2, count, before, lanes):
    """The moments of `count` rows together with those of `before` rows in work. The pivot moves to the new mean, so
    that an outlier among the first rows does not stay the point that all offsets are measured from.
    """
    old_pivot, old_offset = load_first(work, at, lanes), load_first(work, at + C, lanes)
    fraction = count / (before + count)
    delta = (pivot - old_pivot) + offset - old_offset
    shift = fma(delta, fraction, old_offset)
    mean = old_pivot + shift
    m2 = fma(delta * delta, before * fraction, m2 + load_first(work, at + 2 * C, lanes))
    return mean, (old_pivot - mean) + shift, m2


@jitted
def _unit_count(p, mask, n, unit):
    """Real rows of a unit."""
    first = unit * p.unit
    rows = minimum(p.unit, p.S - first)
    if mask is None:
        return np.float64(rows)
    return count_real(mask, n * p.S + first, rows)


@jitted
def merge_units(p, a, x, mask, n, slot, c0, c1):
    """Merge the units of sample n into its first unit's place, per channel; returns the number of real rows."""
    if mask is None and p.few:
        return np.float64(p.S)
    work = pointer(a.work, FLOAT64)
    to = slot * p.units * 3 * p.C
    before = _unit_count(p, mask, n, 0)
    for unit in range(1, p.units):
        count = _unit_count(p, mask, n, unit)
        if count == 0.0:
            continue
        at = (slot * p.units + unit) * 3 * p.C
        for c in range(c0, c1, LANES):
            lanes = minimum(LANES, c1 - c)
            pivot, offset = load_first(work, at + c, lanes), load_first(work, at + p.C + c, lanes)
            m2 = load_first(work, at + 2 * p.C + c, lanes)
            if before > 0.0:
                pivot, offset, m2 = _merged(work, to + c, p.C, pivot, offset, m2, count, before, lanes)
            store_first(work, to + c, pivot, lanes)
            store_first(work, to + p.C + c, offset, lanes)
            store_first(work, to + 2 * p.C + c, m2, lanes)
        before += count
    return before


@jitted
def group_moments(p, a, x, mask, n, slot, g, rows):
    """Moments (count, pivot, offset, m2) of group g, whose channels all have `rows` elements."""
    if rows == 0.0:
        return 0.0, 0.0, 0.0, 0.0
    first, last = group_channels(p, g)
    if mask is None and p.few:
        found = few_moments(x, n * p.x_n + first, p.S, last - first, p.x_s)
    else:
        found = _of_channels(p, a, slot, first, last, rows)
    count, _, _, m2 = found
    if out_of_range(x, m2, count, p.eps):
        found = moments_by_element(x, mask, n * p.x_n + first, n * p.S, last - first, 1, p.S, p.x_s)
    return found


@inlined
def _of_channels(p, a, slot, first, last, rows):
    """The same from the moments of channels first to last.

    The mean of the first channel is the pivot. It cannot be far from the group's mean: with D channels the square of
    its distance is part of the variance, divided by D.
    """
    work = pointer(a.work, FLOAT64)
    at = slot * p.units * 3 * p.C
    pivot = load_one(work, at + first)
    s = q = zeros(work)
    for c in range(first, last, LANES):
        lanes = last - c
        d = (load_first(work, at + c, lanes) - pivot) + load_first(work, at + p.C + c, lanes)
        d = select(first_lanes(lanes), d, 0.0)
        s += d
        q += fma(d * rows, d, load_first(work, at + 2 * p.C + c, lanes))
    sum_d = total(s)
    offset = sum_d / (last - first)
    return rows * (last - first), pivot, offset, maximum(total(q) - offset * sum_d * rows, 0.0)


@jitted
def slab_channels(p, slab):
    """First channel of a slab, and the one after its last; the last slab takes what remains."""
    c0 = slab * p.slab
    return c0, p.C if c0 + 2 * p.slab > p.C else c0 + p.slab


@inlined
def slab_groups(p, c0, c1):
    """First group of channels c0..c1, and the one after the last."""
    return c0 // p.D, p.G if c1 == p.C else c1 // p.D
