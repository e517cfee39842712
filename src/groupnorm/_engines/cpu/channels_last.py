"""Channels-last kernels: the channels of a position are neighbours, so lanes are channels and a group is a strip of each row.

How a sample is cut depends on its shape alone, never on the batch or on threads, so results do not either:

- a *block* is BLOCK rows (positions) by two vectors of channels: its moments are taken per channel, as statistics.py says for
  chunks, and merged per channel in float64;
- a *unit* is `p.unit` rows; the moments of its channels, relative to the sample's first row, are kept in `work`;
- a *slab* is `p.slab` channels, whole groups of them; slabs do not depend on each other;
- a *task* is one slab of one sample, doing everything while the slab is in cache, or `p.per_task` units of all samples, doing one
  phase: MOMENTS (SUMS for backward), MERGE, which is one task a sample, and APPLY.

What each channel needs in APPLY lies in `rows`, as planes of C numbers of lane type: m, a, b, and for backward k2, k3.
"""

from functools import cache
from typing import Any

import numpy as np

from groupnorm._engines.cpu.channels_first import APPLY, MERGE, MOMENTS, SUMS
from groupnorm._engines.cpu.compiler import compiled, inlined, jitted, merged
from groupnorm._engines.cpu.epilogue import activate, activation, slope
from groupnorm._engines.cpu.groups import close_sums, group_channels, real_positions
from groupnorm._engines.cpu.memory import (
    BOOL, FLOAT32, FLOAT64, NONE, elements_to_line, fence, load, load_first, load_one, one_lane, pointer, store_first,
    store_one, write, zeros,
)  # fmt: skip
from groupnorm._engines.cpu.records import call_at, channel_affine, plan_at
from groupnorm._engines.cpu.simd import LANES, fma, narrow, select, widen
from groupnorm._engines.cpu.statistics import count_real, moments_by_element, out_of_range

__all__ = ["BLOCK", "FORWARD_PLANES", "BACKWARD_PLANES", "MERGE", "PLANES", "backward_kernel", "forward_kernel"]

PLANES = 8  # PLANES: backward in phases, before SUMS
BLOCK = 128  # rows of a block: few enough for sums in float32 lanes, many enough for a merge in float64 to cost little
TILE = 16  # rows that are written together, a strip of channels at a time, with the strip's numbers in registers
FORWARD_PLANES, BACKWARD_PLANES = 3, 5


# ---- moments ---------------------------------------------------------------------------------------------------------


@jitted
def _is_real(mask, at):  # type: ignore[no-untyped-def]
    if mask is None:
        return True
    return load_one(mask, at)


@jitted
def _merge_block(work, at, C, pivot, s, q, origin, count, before, lanes):  # type: ignore[no-untyped-def]  # noqa: N803
    """Merge a block of `count` rows into the moments of a unit that has seen `before` rows: planes offset and m2."""
    offset = widen(s) / count
    m2 = fma(offset * offset, 0.0 - count, widen(q))
    m2 = select(m2 < 0.0, 0.0, m2)
    offset = (widen(pivot) - widen(origin)) + offset
    if before > 0.0:
        fraction = count / (before + count)
        old = load_first(work, at, lanes)
        delta = offset - old
        offset = fma(delta, fraction, old)
        m2 = fma(delta * delta, before * fraction, m2 + load_first(work, at + C, lanes))
    store_first(work, at, offset, lanes)
    store_first(work, at + C, m2, lanes)


@inlined
def _pivot(work, at, s, share, origin, before, lanes):  # type: ignore[no-untyped-def]
    """The pivot of a block: the mean of the unit so far, or of the block itself if it is the first."""
    if before > 0.0:
        return narrow(load_first(work, at, lanes) + widen(origin), origin)
    return s * share


@jitted
def _block_two(x, mask, at, mask_at, rows, step, count, origin_at, work, work_at, C, before):  # type: ignore[no-untyped-def]  # noqa: N803
    """Moments of two vectors of channels over a block of rows, merged into work."""
    s0 = s1 = zeros(x)
    if before == 0.0:
        for r in range(rows):
            if _is_real(mask, mask_at + r):
                j = at + r * step
                s0 += load(x, j)
                s1 += load(x, j + LANES)
    share = one_lane(x, 1.0 / count)
    origin0, origin1 = load(x, origin_at), load(x, origin_at + LANES)
    m0 = _pivot(work, work_at, s0, share, origin0, before, LANES)
    m1 = _pivot(work, work_at + LANES, s1, share, origin1, before, LANES)
    s0 = s1 = q0 = q1 = zeros(x)
    for r in range(rows):
        if _is_real(mask, mask_at + r):
            j = at + r * step
            d0, d1 = load(x, j) - m0, load(x, j + LANES) - m1
            s0 += d0
            s1 += d1
            q0 = fma(d0, d0, q0)
            q1 = fma(d1, d1, q1)
    _merge_block(work, work_at, C, m0, s0, q0, origin0, count, before, LANES)
    _merge_block(work, work_at + LANES, C, m1, s1, q1, origin1, count, before, LANES)


@jitted
def _block_one(x, mask, at, mask_at, rows, step, count, origin_at, work, work_at, C, before, lanes):  # type: ignore[no-untyped-def]  # noqa: N803
    """The same for one vector, of which `lanes` channels are ours."""
    s0 = zeros(x)
    if before == 0.0:
        for r in range(rows):
            if _is_real(mask, mask_at + r):
                s0 += load_first(x, at + r * step, lanes)
    origin = load_first(x, origin_at, lanes)
    m = _pivot(work, work_at, s0, one_lane(x, 1.0 / count), origin, before, lanes)
    s0 = q0 = zeros(x)
    for r in range(rows):
        if _is_real(mask, mask_at + r):
            d = load_first(x, at + r * step, lanes) - m
            s0 += d
            q0 = fma(d, d, q0)
    _merge_block(work, work_at, C, m, s0, q0, origin, count, before, lanes)


@jitted
def _origin(p, mask, n):  # type: ignore[no-untyped-def]
    """Index in x of the first real row of sample n, without its channel: offsets are relative to that row."""
    row = 0
    while row < p.S and not _is_real(mask, n * p.S + row):
        row += 1
    return n * p.x_n + min(row, p.S - 1) * p.x_s


@jitted
def _unit_count(p, mask, n, unit):  # type: ignore[no-untyped-def]
    """Real rows of a unit."""
    first = unit * p.unit
    rows = min(p.unit, p.S - first)
    if mask is None:
        return np.float64(rows)
    return count_real(mask, n * p.S + first, rows)


@jitted
def _unit_moments(p, a, x, mask, n, unit, c0, c1):  # type: ignore[no-untyped-def]
    """Moments of channels c0..c1 over a unit's rows, as offsets from the first real row and m2, into work."""
    work = pointer(a.work, FLOAT64)
    work_at = (n * p.units + unit) * 2 * p.C
    origin_at = _origin(p, mask, n)
    first = unit * p.unit
    last = min(first + p.unit, p.S)
    before = 0.0
    for row in range(first, last, BLOCK):
        rows = min(BLOCK, last - row)
        count = np.float64(rows)
        if mask is not None:
            count = count_real(mask, n * p.S + row, rows)
        if count == 0.0:
            continue
        at = n * p.x_n + row * p.x_s
        c = c0
        while c + 2 * LANES <= c1:
            _block_two(x, mask, at + c, n * p.S + row, rows, p.x_s, count, origin_at + c, work, work_at + c, p.C, before)
            c += 2 * LANES
        while c < c1:
            _block_one(x, mask, at + c, n * p.S + row, rows, p.x_s, count, origin_at + c, work, work_at + c, p.C, before,
                       min(LANES, c1 - c))  # fmt: skip
            c += LANES
        before += count


@jitted
def _merge_units(p, a, x, mask, n, c0, c1):  # type: ignore[no-untyped-def]
    """Merge the units of sample n into its first unit's place, per channel; returns the number of real rows."""
    work = pointer(a.work, FLOAT64)
    to = n * p.units * 2 * p.C
    before = _unit_count(p, mask, n, 0)
    for unit in range(1, p.units):
        count = _unit_count(p, mask, n, unit)
        if count == 0.0:
            continue
        at = (n * p.units + unit) * 2 * p.C
        fraction = count / (before + count)
        for c in range(c0, c1, LANES):
            lanes = min(LANES, c1 - c)
            offset, m2 = load_first(work, at + c, lanes), load_first(work, at + p.C + c, lanes)
            if before > 0.0:
                old = load_first(work, to + c, lanes)
                delta = offset - old
                offset = fma(delta, fraction, old)
                m2 = fma(delta * delta, before * fraction, m2 + load_first(work, to + p.C + c, lanes))
            store_first(work, to + c, offset, lanes)
            store_first(work, to + p.C + c, m2, lanes)
        before += count
    return before


@jitted
def _group_moments(p, a, x, mask, n, g, rows):  # type: ignore[no-untyped-def]
    """Moments (count, pivot, offset, m2) of group g from those of its channels, which all have `rows` elements."""
    if rows == 0.0:
        return 0.0, 0.0, 0.0, 0.0
    work = pointer(a.work, FLOAT64)
    at = n * p.units * 2 * p.C
    origin_at = _origin(p, mask, n)
    first, last = group_channels(p, g)
    pivot = np.float64(load_one(x, origin_at + first))
    s = 0.0
    for c in range(first, last):
        s += (np.float64(load_one(x, origin_at + c)) - pivot) + load_one(work, at + c)
    offset = s / (last - first)
    m2 = s = 0.0
    for c in range(first, last):
        d = (np.float64(load_one(x, origin_at + c)) - pivot) + load_one(work, at + c) - offset
        s += d
        m2 += load_one(work, at + p.C + c) + rows * d * d
    offset += s / (last - first)
    count = rows * (last - first)
    if out_of_range(m2, count, p.eps):
        return moments_by_element(x, mask, n * p.x_n + first, n * p.S, last - first, 1, p.S, p.x_s)
    return count, pivot, offset, m2


# ---- forward ---------------------------------------------------------------------------------------------------------


@jitted
def _merge(p, a, x, mask, mean, rstd, rows_, n, c0, c1):  # type: ignore[no-untyped-def]
    """From the units' moments (or given ones) to mean, rstd and the planes m, a, b of channels c0..c1."""
    moments = pointer(a.moments, FLOAT64)
    rows = 0.0
    if not p.stats:
        rows = _merge_units(p, a, x, mask, n, c0, c1)
    for g in range(c0 // p.D, p.G):
        first, last = group_channels(p, g)
        if first >= c1:
            break
        group = n * p.G + g
        if p.stats:
            count, pivot = load_one(moments, group * 3), load_one(moments, group * 3 + 1)
            offset, m2 = 0.0, load_one(moments, group * 3 + 2)
        else:
            count, pivot, offset, m2 = _group_moments(p, a, x, mask, n, g, rows)
            if a.moments != 0:
                store_one(moments, group * 3, count)
                store_one(moments, group * 3 + 1, pivot + offset)
                store_one(moments, group * 3 + 2, m2)
        m = np.float64(one_lane(x, pivot + offset))
        rest = (pivot - m) + offset
        r = 1.0 / np.sqrt(m2 / max(count, 1.0) + p.eps)
        if a.mean != 0:
            store_one(mean, group, one_lane(mean, m + rest))
            store_one(rstd, group, one_lane(rstd, r))
        if a.y != 0:
            at = n * FORWARD_PLANES * p.C
            for c in range(first, last):
                factor, summand = channel_affine(p, a, n, c)
                slope_ = one_lane(rows_, factor * r)
                store_one(rows_, at + c, one_lane(rows_, m))
                store_one(rows_, at + p.C + c, slope_)
                store_one(rows_, at + 2 * p.C + c, one_lane(rows_, summand - rest * np.float64(slope_)))


@inlined
def _forward_vector(p, x, residual, mask, act, n, row, c, m, a, b, lanes):  # type: ignore[no-untyped-def]
    """y of up to LANES channels of a row: equations (5) to (8)."""
    z = fma(load_first(x, n * p.x_n + row * p.x_s + c, lanes) - m, a, b)
    if residual is not None:
        z = z + load_first(residual, n * p.residual_n + row * p.residual_s + c, lanes)
    if act is not None:
        z = activate(act, z)
    if mask is not None:
        z = select(load_one(mask, n * p.S + row), z, 0.0)
    return z


@jitted
def _forward_rows(p, a, x, y, residual, mask, act, rows_, n, first, last, c0, c1):  # type: ignore[no-untyped-def]
    """y of channels c0..c1 of rows first..last, in tiles, the last tile first: it is the one that is still in cache."""
    streaming = a.stream != 0 and elements_to_line(y, n * p.y_n + c0) == 0 and p.y_s % LANES == 0
    end = last
    while end > first:
        start = max(end - TILE, first)
        c = c0
        while c < c1:
            plane = n * FORWARD_PLANES * p.C + c
            lanes = min(LANES, c1 - c)
            m0, a0, b0 = (load_first(rows_, plane, lanes), load_first(rows_, plane + p.C, lanes),
                          load_first(rows_, plane + 2 * p.C, lanes))  # fmt: skip
            if c + 2 * LANES <= c1:
                plane += LANES
                m1, a1, b1 = load(rows_, plane), load(rows_, plane + p.C), load(rows_, plane + 2 * p.C)
                for row in range(start, end):
                    at = n * p.y_n + row * p.y_s + c
                    v0 = _forward_vector(p, x, residual, mask, act, n, row, c, m0, a0, b0, LANES)
                    v1 = _forward_vector(p, x, residual, mask, act, n, row, c + LANES, m1, a1, b1, LANES)
                    write(y, at, v0, streaming)
                    write(y, at + LANES, v1, streaming)
                c += 2 * LANES
            else:
                for row in range(start, end):
                    v0 = _forward_vector(p, x, residual, mask, act, n, row, c, m0, a0, b0, lanes)
                    store_first(y, n * p.y_n + row * p.y_s + c, v0, lanes)
                c += LANES
        end = start


@jitted
def slab_channels(p, slab):  # type: ignore[no-untyped-def]
    """First channel of a slab, and the one after its last; the last slab takes what remains."""
    c0 = slab * p.slab
    return c0, p.C if c0 + 2 * p.slab > p.C else c0 + p.slab


@merged
def _forward(p, a, x, y, residual, mask, act, mean, rstd, rows_, task):  # type: ignore[no-untyped-def]
    if p.phase == MOMENTS + MERGE + APPLY:  # a slab of a sample
        slabs = max(p.C // p.slab, 1)
        n = task // slabs
        c0, c1 = slab_channels(p, task % slabs)
        if not p.stats:
            for unit in range(p.units):
                _unit_moments(p, a, x, mask, n, unit, c0, c1)
        _merge(p, a, x, mask, mean, rstd, rows_, n, c0, c1)
        if a.y != 0:
            _forward_rows(p, a, x, y, residual, mask, act, rows_, n, 0, p.S, c0, c1)
    elif p.phase == MERGE:
        _merge(p, a, x, mask, mean, rstd, rows_, task, 0, p.C)
    else:
        first = task * p.per_task
        for k in range(first, min(first + p.per_task, p.N * p.units)):
            if p.phase == MOMENTS:
                _unit_moments(p, a, x, mask, k // p.units, k % p.units, 0, p.C)
            else:
                index = p.N * p.units - 1 - k
                n, unit = index // p.units, index % p.units
                last = min((unit + 1) * p.unit, p.S)
                _forward_rows(p, a, x, y, residual, mask, act, rows_, n, unit * p.unit, last, 0, p.C)
    fence()


@cache
def forward_kernel(element: int, act: int, residual: bool, mask: bool) -> Any:
    """The compiled forward for these element and activation codes."""
    residual_element, mask_element = element if residual else NONE, BOOL if mask else NONE
    lane_element = FLOAT64 if element == FLOAT64 else FLOAT32

    def kernel(plan, call, task):  # type: ignore[no-untyped-def]
        p, a = plan_at(plan), call_at(call)
        _forward(
            p, a, pointer(a.x, element), pointer(a.y, element), pointer(a.residual, residual_element),
            pointer(a.mask, mask_element), activation(act), pointer(a.mean, lane_element), pointer(a.rstd, lane_element),
            pointer(a.rows, lane_element), task,
        )  # fmt: skip

    return compiled(kernel, f"last_forward_{element}_{act}_{residual:d}_{mask:d}")


# ---- backward --------------------------------------------------------------------------------------------------------


@inlined
def _dz_vector(p, dy, residual, act, d, n, row, c, a, b, lanes):  # type: ignore[no-untyped-def]
    """dz of up to LANES channels of a row, equation (9), from d = x - mean; the mask is the caller's."""
    dz = load_first(dy, n * p.dy_n + row * p.dy_s + c, lanes)
    if act is not None:
        z = fma(d, a, b)
        if residual is not None:
            z = z + load_first(residual, n * p.residual_n + row * p.residual_s + c, lanes)
        dz = dz * slope(act, z)
    return dz


@jitted
def _unit_sums(p, a, x, dy, residual, mask, act, rows_, n, unit, c0, c1):  # type: ignore[no-untyped-def]
    """The sums of dz, dz*d and d of channels c0..c1 over a unit's rows, d = x - mean; by blocks in lanes, then in float64."""
    sums = pointer(a.sums, FLOAT64)
    first = unit * p.unit
    last = min(first + p.unit, p.S)
    for start in range(first, last, BLOCK):
        end = min(start + BLOCK, last)
        c = c0
        while c < c1:
            plane = n * BACKWARD_PLANES * p.C + c
            to = n * p.sum_n + unit * p.sum_part + c
            lanes = min(LANES, c1 - c)
            m0, a0, b0 = (load_first(rows_, plane, lanes), load_first(rows_, plane + p.C, lanes),
                          load_first(rows_, plane + 2 * p.C, lanes))  # fmt: skip
            p0 = p1 = q0 = q1 = e0 = e1 = zeros(x)
            if c + 2 * LANES <= c1:
                plane += LANES
                m1, a1, b1 = load(rows_, plane), load(rows_, plane + p.C), load(rows_, plane + 2 * p.C)
                for row in range(start, end):
                    if _is_real(mask, n * p.S + row):
                        at = n * p.x_n + row * p.x_s + c
                        d0, d1 = load(x, at) - m0, load(x, at + LANES) - m1
                        z0 = _dz_vector(p, dy, residual, act, d0, n, row, c, a0, b0, LANES)
                        z1 = _dz_vector(p, dy, residual, act, d1, n, row, c + LANES, a1, b1, LANES)
                        p0 += z0
                        p1 += z1
                        q0 = fma(z0, d0, q0)
                        q1 = fma(z1, d1, q1)
                        e0 += d0
                        e1 += d1
                _add_sums(sums, to + LANES, p.sum_next, p1, q1, e1, start == first, LANES)
                c += LANES
            else:
                for row in range(start, end):
                    if _is_real(mask, n * p.S + row):
                        d0 = load_first(x, n * p.x_n + row * p.x_s + c, lanes) - m0
                        z0 = _dz_vector(p, dy, residual, act, d0, n, row, c, a0, b0, lanes)
                        p0 += z0
                        q0 = fma(z0, d0, q0)
                        e0 += d0
            _add_sums(sums, to, p.sum_next, p0, q0, e0, start == first, lanes)
            c += LANES


@jitted
def _add_sums(sums, at, next_, s_dz, s_dzd, s_d, starts, lanes):  # type: ignore[no-untyped-def]
    """Add a block's sums to a unit's, or start the unit with them."""
    wide_dz, wide_dzd, wide_d = widen(s_dz), widen(s_dzd), widen(s_d)
    if not starts:
        wide_dz = wide_dz + load_first(sums, at, lanes)
        wide_dzd = wide_dzd + load_first(sums, at + next_, lanes)
        wide_d = wide_d + load_first(sums, at + 2 * next_, lanes)
    store_first(sums, at, wide_dz, lanes)
    store_first(sums, at + next_, wide_dzd, lanes)
    store_first(sums, at + 2 * next_, wide_d, lanes)


@jitted
def _backward_planes(p, a, x, mask, mean, rstd, rows_, n, c0, c1):  # type: ignore[no-untyped-def]
    """The planes m, a, b of channels c0..c1; without given statistics from the units' moments."""
    rows = 0.0
    if not p.stats:
        rows = _merge_units(p, a, x, mask, n, c0, c1)
    at = n * BACKWARD_PLANES * p.C
    for g in range(c0 // p.D, p.G):
        first, last = group_channels(p, g)
        if first >= c1:
            break
        m, r = _mean_rstd(p, a, x, mask, mean, rstd, n, g, rows)
        for c in range(first, last):
            factor, summand = channel_affine(p, a, n, c)
            store_one(rows_, at + c, one_lane(rows_, m))
            store_one(rows_, at + p.C + c, one_lane(rows_, factor * r))
            store_one(rows_, at + 2 * p.C + c, one_lane(rows_, summand))


@jitted
def _mean_rstd(p, a, x, mask, mean, rstd, n, g, rows):  # type: ignore[no-untyped-def]
    """mean and rstd of a group, rounded to the statistics' type whether given or computed, so that both give the same bits."""
    if p.stats:
        return np.float64(load_one(mean, n * p.G + g)), np.float64(load_one(rstd, n * p.G + g))
    count, pivot, offset, m2 = _group_moments(p, a, x, mask, n, g, rows)
    r = 1.0 / np.sqrt(m2 / max(count, 1.0) + p.eps)
    return np.float64(one_lane(mean, pivot + offset)), np.float64(one_lane(mean, r))


@jitted
def _backward_merge(p, a, x, mask, mean, rstd, rows_, n, c0, c1):  # type: ignore[no-untyped-def]
    """Close the sums of the groups in channels c0..c1, and fill their planes k2 and k3."""
    at = n * BACKWARD_PLANES * p.C
    for g in range(c0 // p.D, p.G):
        first, last = group_channels(p, g)
        if first >= c1:
            break
        _, r = _mean_rstd(p, a, x, mask, mean, rstd, n, g, real_positions(p, mask, n))
        k2, k3 = close_sums(p, a, mask, n, g, r)
        for c in range(first, last):
            store_one(rows_, at + 3 * p.C + c, one_lane(rows_, k2))
            store_one(rows_, at + 4 * p.C + c, one_lane(rows_, k3))


@inlined
def _dx_vector(p, x, dy, dresidual, residual, mask, act, n, row, c, m, a, b, k2, k3, lanes):  # type: ignore[no-untyped-def]
    """dx of up to LANES channels of a row, equation (14) as dz*a + (x - mean)*k2 + k3; writes dresidual on the way."""
    d = load_first(x, n * p.x_n + row * p.x_s + c, lanes) - m
    dz = _dz_vector(p, dy, residual, act, d, n, row, c, a, b, lanes)
    dx = fma(dz, a, fma(d, k2, k3))
    if mask is not None:
        real = load_one(mask, n * p.S + row)
        dz, dx = select(real, dz, 0.0), select(real, dx, 0.0)
    if dresidual is not None:
        store_first(dresidual, n * p.dresidual_n + row * p.dresidual_s + c, dz, lanes)
    return dx


@jitted
def _backward_rows(p, a, x, dy, dx, dresidual, residual, mask, act, rows_, n, first, last, c0, c1):  # type: ignore[no-untyped-def]
    """dx of channels c0..c1 of rows first..last, in tiles, the last tile first: it is the one that is still in cache."""
    streaming = a.stream != 0 and elements_to_line(dx, n * p.dx_n + c0) == 0 and p.dx_s % LANES == 0
    end = last
    while end > first:
        start = max(end - TILE, first)
        for c in range(c0, c1, LANES):
            plane = n * BACKWARD_PLANES * p.C + c
            lanes = min(LANES, c1 - c)
            m0, a0, b0 = (load_first(rows_, plane, lanes), load_first(rows_, plane + p.C, lanes),
                          load_first(rows_, plane + 2 * p.C, lanes))  # fmt: skip
            k2, k3 = load_first(rows_, plane + 3 * p.C, lanes), load_first(rows_, plane + 4 * p.C, lanes)
            if lanes == LANES:
                for row in range(start, end):
                    v = _dx_vector(p, x, dy, dresidual, residual, mask, act, n, row, c, m0, a0, b0, k2, k3, LANES)
                    write(dx, n * p.dx_n + row * p.dx_s + c, v, streaming)
            else:
                for row in range(start, end):
                    v = _dx_vector(p, x, dy, dresidual, residual, mask, act, n, row, c, m0, a0, b0, k2, k3, lanes)
                    store_first(dx, n * p.dx_n + row * p.dx_s + c, v, lanes)
        end = start


@merged
def _backward(p, a, x, dy, dx, dresidual, residual, mask, act, mean, rstd, rows_, task):  # type: ignore[no-untyped-def]
    if p.phase == SUMS + MERGE + APPLY:  # a slab of a sample
        slabs = max(p.C // p.slab, 1)
        n = task // slabs
        c0, c1 = slab_channels(p, task % slabs)
        if not p.stats:
            for unit in range(p.units):
                _unit_moments(p, a, x, mask, n, unit, c0, c1)
        _backward_planes(p, a, x, mask, mean, rstd, rows_, n, c0, c1)
        for unit in range(p.units):
            _unit_sums(p, a, x, dy, residual, mask, act, rows_, n, unit, c0, c1)
        _backward_merge(p, a, x, mask, mean, rstd, rows_, n, c0, c1)
        _backward_rows(p, a, x, dy, dx, dresidual, residual, mask, act, rows_, n, 0, p.S, c0, c1)
    elif p.phase == PLANES:
        _backward_planes(p, a, x, mask, mean, rstd, rows_, task, 0, p.C)
    elif p.phase == MERGE:
        _backward_merge(p, a, x, mask, mean, rstd, rows_, task, 0, p.C)
    else:
        first = task * p.per_task
        for k in range(first, min(first + p.per_task, p.N * p.units)):
            if p.phase == SUMS:
                _unit_sums(p, a, x, dy, residual, mask, act, rows_, k // p.units, k % p.units, 0, p.C)
            else:
                index = p.N * p.units - 1 - k
                n, unit = index // p.units, index % p.units
                last = min((unit + 1) * p.unit, p.S)
                _backward_rows(p, a, x, dy, dx, dresidual, residual, mask, act, rows_, n, unit * p.unit, last, 0, p.C)
    fence()


@cache
def backward_kernel(element: int, act: int, residual: bool, mask: bool) -> Any:
    """The compiled backward for these element and activation codes; with a residual it also writes dresidual."""
    residual_element, mask_element = element if residual else NONE, BOOL if mask else NONE
    lane_element = FLOAT64 if element == FLOAT64 else FLOAT32

    def kernel(plan, call, task):  # type: ignore[no-untyped-def]
        p, a = plan_at(plan), call_at(call)
        _backward(
            p, a, pointer(a.x, element), pointer(a.dy, element), pointer(a.dx, element),
            pointer(a.dresidual, residual_element), pointer(a.residual, residual_element), pointer(a.mask, mask_element),
            activation(act), pointer(a.mean, lane_element), pointer(a.rstd, lane_element), pointer(a.rows, lane_element),
            task,
        )  # fmt: skip

    return compiled(kernel, f"last_backward_{element}_{act}_{residual:d}_{mask:d}")
