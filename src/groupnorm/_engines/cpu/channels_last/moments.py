"""Channels last: how a sample is cut, and the moments of its pieces."""

import numpy as np

from groupnorm._engines.cpu.compiler import inlined, jitted
from groupnorm._engines.cpu.groups import group_channels
from groupnorm._engines.cpu.memory import (
    FLOAT64,
    load,
    load_first,
    load_one,
    pointer,
    prefetch,
    store_first,
    zeros,
)  # fmt: skip
from groupnorm._engines.cpu.simd import LANES, fma, narrow, select, widen
from groupnorm._engines.cpu.statistics import count_real, is_real, moments_by_element, out_of_range

__all__ = [
    "APPLY",
    "BLOCK",
    "MERGE",
    "MOMENTS",
    "SUMS",
    "SUMS_BLOCK",
    "TILE",
    "group_moments",
    "merge_units",
    "slab_channels",
    "unit_moments",
]  # fmt: skip

MOMENTS = SUMS = 1  # what a launch does first
APPLY, MERGE = 2, 4

BLOCK = 64  # rows of a block: few enough for sums in float32 lanes, many enough for a merge in float64 to cost little
SUMS_BLOCK = 8  # the same for the sums of backward, which are only added up
TILE = 16  # rows that are written together, a strip of channels at a time, with the strip's numbers in registers


@inlined
def _pivot(work, at, C, s, before, count, lanes):
    """The pivot of a block: the mean of the unit so far, or of the block itself if there were not as many rows yet."""
    if before >= count:
        return narrow(load_first(work, at, lanes) + load_first(work, at + C, lanes), s)
    return s / count


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
def _merge_block(work, at, C, m, s, q, count, before, lanes):
    """Merge a block of `count` rows into the moments of a unit that has seen `before`: planes pivot, offset, m2."""
    offset = widen(s) / count
    m2 = fma(offset * offset, 0.0 - count, widen(q))
    m2 = select(m2 < 0.0, 0.0, m2)
    pivot = widen(m)
    if before > 0.0:
        pivot, offset, m2 = _merged(work, at, C, pivot, offset, m2, count, before, lanes)
    store_first(work, at, pivot, lanes)
    store_first(work, at + C, offset, lanes)
    store_first(work, at + 2 * C, m2, lanes)


@jitted
def _block_two(x, mask, at, mask_at, rows, step, count, work, work_at, C, before):
    """Moments of two vectors of channels over a block of rows, merged into work."""
    s0 = s1 = zeros(x)
    if before < count:
        for r in range(rows):
            if is_real(mask, mask_at + r):
                j = at + r * step
                s0 += load(x, j)
                s1 += load(x, j + LANES)
    m0 = _pivot(work, work_at, C, s0, before, count, LANES)
    m1 = _pivot(work, work_at + LANES, C, s1, before, count, LANES)
    s0 = s1 = q0 = q1 = zeros(x)
    for r in range(rows):
        if is_real(mask, mask_at + r):
            j = at + r * step
            prefetch(x, j + BLOCK * step)
            prefetch(x, j + LANES + BLOCK * step)
            d0, d1 = load(x, j) - m0, load(x, j + LANES) - m1
            s0 += d0
            s1 += d1
            q0 = fma(d0, d0, q0)
            q1 = fma(d1, d1, q1)
    _merge_block(work, work_at, C, m0, s0, q0, count, before, LANES)
    _merge_block(work, work_at + LANES, C, m1, s1, q1, count, before, LANES)


@jitted
def _block_one(x, mask, at, mask_at, rows, step, count, work, work_at, C, before, lanes):
    """The same for one vector, of which `lanes` channels are ours."""
    s0 = zeros(x)
    if before < count:
        for r in range(rows):
            if is_real(mask, mask_at + r):
                s0 += load_first(x, at + r * step, lanes)
    m = _pivot(work, work_at, C, s0, before, count, lanes)
    s0 = q0 = zeros(x)
    for r in range(rows):
        if is_real(mask, mask_at + r):
            d = load_first(x, at + r * step, lanes) - m
            s0 += d
            q0 = fma(d, d, q0)
    _merge_block(work, work_at, C, m, s0, q0, count, before, lanes)


@jitted
def _unit_count(p, mask, n, unit):
    """Real rows of a unit."""
    first = unit * p.unit
    rows = min(p.unit, p.S - first)
    if mask is None:
        return np.float64(rows)
    return count_real(mask, n * p.S + first, rows)


@jitted
def unit_moments(p, a, x, mask, n, unit, c0, c1):
    """Moments of channels c0..c1 over a unit's rows, as pivot, offset and m2, into work."""
    work = pointer(a.work, FLOAT64)
    work_at = (n * p.units + unit) * 3 * p.C
    first = unit * p.unit
    last = min(first + p.unit, p.S)
    before = 0.0
    for row in range(first, last, p.chunk):
        rows = min(p.chunk, last - row)
        count = np.float64(rows)
        if mask is not None:
            count = count_real(mask, n * p.S + row, rows)
        if count == 0.0:
            continue
        at = n * p.x_n + row * p.x_s
        c = c0
        while c + 2 * LANES <= c1:
            _block_two(x, mask, at + c, n * p.S + row, rows, p.x_s, count, work, work_at + c, p.C, before)
            c += 2 * LANES
        while c < c1:
            _block_one(x, mask, at + c, n * p.S + row, rows, p.x_s, count, work, work_at + c, p.C,
            before,
                       min(LANES, c1 - c))  # fmt: skip
            c += LANES
        before += count


@jitted
def merge_units(p, a, x, mask, n, c0, c1):
    """Merge the units of sample n into its first unit's place, per channel; returns the number of real rows."""
    work = pointer(a.work, FLOAT64)
    to = n * p.units * 3 * p.C
    before = _unit_count(p, mask, n, 0)
    for unit in range(1, p.units):
        count = _unit_count(p, mask, n, unit)
        if count == 0.0:
            continue
        at = (n * p.units + unit) * 3 * p.C
        for c in range(c0, c1, LANES):
            lanes = min(LANES, c1 - c)
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
def group_moments(p, a, x, mask, n, g, rows):
    """Moments (count, pivot, offset, m2) of group g from those of its channels, which all have `rows` elements."""
    if rows == 0.0:
        return 0.0, 0.0, 0.0, 0.0
    work = pointer(a.work, FLOAT64)
    at = n * p.units * 3 * p.C
    first, last = group_channels(p, g)
    pivot = load_one(work, at + first)
    s = 0.0
    for c in range(first, last):
        s += (load_one(work, at + c) - pivot) + load_one(work, at + p.C + c)
    offset = s / (last - first)
    m2 = s = 0.0
    for c in range(first, last):
        d = (load_one(work, at + c) - pivot) + load_one(work, at + p.C + c) - offset
        s += d
        m2 += load_one(work, at + 2 * p.C + c) + rows * d * d
    offset += s / (last - first)
    count = rows * (last - first)
    if out_of_range(x, m2, count, p.eps):
        return moments_by_element(x, mask, n * p.x_n + first, n * p.S, last - first, 1, p.S, p.x_s)
    return count, pivot, offset, m2


@jitted
def slab_channels(p, slab):
    """First channel of a slab, and the one after its last; the last slab takes what remains."""
    c0 = slab * p.slab
    return c0, p.C if c0 + 2 * p.slab > p.C else c0 + p.slab
