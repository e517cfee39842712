"""Channels last, backward: equations (9) to (14) but for the parameters' gradients."""

from functools import cache
from typing import Any

import numpy as np

from groupnorm._engines.cpu.channels_last.moments import (
    AHEAD,
    APPLY,
    MERGE,
    SUMS,
    TILE,
    group_moments,
    merge_units,
    slab_channels,
    slab_groups,
    unit_moments,
)  # fmt: skip
from groupnorm._engines.cpu.compiler import compiled, inlined, jitted, merged
from groupnorm._engines.cpu.epilogue import activation, slope
from groupnorm._engines.cpu.groups import (
    H_SUM,
    K2,
    K3,
    MEAN,
    REST,
    RSTD,
    close_moments,
    close_sums,
    given_moments,
    given_statistics,
    group_channels,
    put_moments,
    real_positions,
    settled,
)  # fmt: skip
from groupnorm._engines.cpu.memory import (
    BOOL,
    FLOAT32,
    FLOAT64,
    NONE,
    PAST,
    THROUGH,
    elements_ahead,
    elements_to_line,
    fence,
    load,
    load_first,
    load_one,
    one_lane,
    pointer,
    prefetch,
    scratch,
    shifted,
    store_first,
    store_one,
    to_line,
    write,
    zeros,
)  # fmt: skip
from groupnorm._engines.cpu.records import DZ, FROM_MOMENTS, GIVEN, H, call_at, channel_affine, plan_at, sums_at
from groupnorm._engines.cpu.simd import LANES, fma, maximum, minimum, narrow, select, total, widen
from groupnorm._engines.cpu.statistics import is_real

__all__ = ["BACKWARD_PLANES", "PLANES", "backward_kernel"]

PLANES = 8  # a phase before SUMS
BACKWARD_PLANES = 6  # m, r, a, b, k2, k3


@inlined
def _dz_vector(dy, residual, act, h, ya, ra, a, b, lanes):
    """dz of up to LANES channels of a row, equation (9), from h = xhat; the mask is the caller's."""
    dz = load_first(dy, ya, lanes)
    if act is not None:
        z = fma(h, a, b)
        if residual is not None:
            z = z + load_first(residual, ra, lanes)
        dz = dz * slope(act, z)
    return dz


@inlined
def _fetch_two(p, at):
    """Ask for two vectors that will be needed in the next tile."""
    prefetch(p, at)
    prefetch(p, at + LANES)


@inlined
def _four(rows_, plane, C, lanes):
    """The numbers m, r, a, b of a vector of channels."""
    return (
        load_first(rows_, plane, lanes), load_first(rows_, plane + C, lanes), load_first(rows_, plane + 2 * C, lanes),
        load_first(rows_, plane + 3 * C, lanes),
    )  # fmt: skip


@inlined
def _keep(kept, at, dz, lanes):
    """Keep dz for `_dx_vector`, where there is a place for it."""
    if kept is not None:
        store_first(kept, at, dz, lanes)


@jitted
def _unit_sums(p, a, x, dy, residual, mask, kept, act, rows_, n, slot, unit, c0, c1):
    """The sums of dz, dz*xhat and xhat of channels c0..c1 over a unit's rows; by tiles in lanes, then in
    float64.
    """
    sums = pointer(a.sums, FLOAT64)
    first = unit * p.unit
    last = minimum(first + p.unit, p.S)
    x_n, dy_n, residual_n = n * p.x_n, n * p.dy_n, n * p.residual_n  # read once, see channels_first/forward.py
    x_s, dy_s, residual_s, kept_s = p.x_s, p.dy_s, p.residual_s, c1 - c0
    for start in range(first, last, TILE):
        end = minimum(start + TILE, last)
        c = c0
        while c < c1:
            plane = slot * BACKWARD_PLANES * p.C + c
            to = sums_at(p, n, unit, DZ) + c
            lanes = minimum(LANES, c1 - c)
            m0, r0, a0, b0 = _four(rows_, plane, p.C, lanes)
            p0 = p1 = q0 = q1 = e0 = e1 = zeros(x)
            if c + 2 * LANES <= c1:
                plane += LANES
                m1, r1, a1, b1 = _four(rows_, plane, p.C, LANES)
                for row in range(start, end):
                    if is_real(mask, n * p.S + row):
                        xa, ya, ra = x_n + row * x_s + c, dy_n + row * dy_s + c, residual_n + row * residual_s + c
                        _fetch_two(x, xa + AHEAD * x_s)
                        _fetch_two(dy, ya + AHEAD * dy_s)
                        h0, h1 = (load(x, xa) - m0) * r0, (load(x, xa + LANES) - m1) * r1
                        z0 = _dz_vector(dy, residual, act, h0, ya, ra, a0, b0, LANES)
                        z1 = _dz_vector(dy, residual, act, h1, ya + LANES, ra + LANES, a1, b1, LANES)
                        _keep(kept, row * kept_s + c - c0, z0, LANES)
                        _keep(kept, row * kept_s + c - c0 + LANES, z1, LANES)
                        p0 += z0
                        p1 += z1
                        q0 = fma(z0, h0, q0)
                        q1 = fma(z1, h1, q1)
                        e0 += h0
                        e1 += h1
                _add_sums(sums, to + LANES, p.C, p1, q1, e1, start == first, LANES)
                c += LANES
            else:
                for row in range(start, end):
                    if is_real(mask, n * p.S + row):
                        xa, ya, ra = x_n + row * x_s + c, dy_n + row * dy_s + c, residual_n + row * residual_s + c
                        h0 = (load_first(x, xa, lanes) - m0) * r0
                        z0 = _dz_vector(dy, residual, act, h0, ya, ra, a0, b0, lanes)
                        _keep(kept, row * kept_s + c - c0, z0, lanes)
                        p0 += z0
                        q0 = fma(z0, h0, q0)
                        e0 += h0
            _add_sums(sums, to, p.C, p0, q0, e0, start == first, lanes)
            c += LANES


@jitted
def _add_sums(sums, at, next_, s_dz, s_dzh, s_h, starts, lanes):
    """Add a tile's sums to a unit's, or start the unit with them."""
    wide_dz, wide_dzh, wide_h = widen(s_dz), widen(s_dzh), widen(s_h)
    if not starts:
        wide_dz = wide_dz + load_first(sums, at, lanes)
        wide_dzh = wide_dzh + load_first(sums, at + next_, lanes)
        wide_h = wide_h + load_first(sums, at + 2 * next_, lanes)
    store_first(sums, at, wide_dz, lanes)
    store_first(sums, at + next_, wide_dzh, lanes)
    store_first(sums, at + 2 * next_, wide_h, lanes)


@inlined
def _statistics(p, a, x, mask, mean, rstd, n, slot, start, groups, rows, room):
    """Mean, what rounding it lost, and rstd of some groups, given or from their `rows` real rows."""
    if p.stats == GIVEN:
        given_statistics(mean, rstd, n * p.G + start, groups, room)
        return
    for i in range(groups):
        if p.stats == FROM_MOMENTS:
            found = given_moments(a, n * p.G + start + i)
        else:
            found = settled(group_moments(p, a, x, mask, n, slot, start + i, rows))
        put_moments(room, i, found)
    close_moments(p, x, room, groups)


@jitted
def _backward_planes(p, a, x, mask, mean, rstd, rows_, n, slot, c0, c1):
    """The planes m, r, a, b of channels c0..c1; without given statistics from the units' moments."""
    room = scratch(pointer(a.work, FLOAT64))
    at = slot * BACKWARD_PLANES * p.C
    rows = 0.0
    if not p.stats:
        rows = merge_units(p, a, x, mask, n, slot, c0, c1)
    g0, g1 = slab_groups(p, c0, c1)
    for start in range(g0, g1, LANES):
        groups = minimum(LANES, g1 - start)
        _statistics(p, a, x, mask, mean, rstd, n, slot, start, groups, rows, room)
        for i in range(groups):
            first, last = group_channels(p, start + i)
            m, rest, r = load_one(room, MEAN + i), load_one(room, REST + i), load_one(room, RSTD + i)
            for c in range(first, last, LANES):
                factor, summand = channel_affine(p, a, n, c, last - c)
                store_first(rows_, at + c, zeros(rows_) + one_lane(rows_, m), last - c)
                store_first(rows_, at + p.C + c, zeros(rows_) + one_lane(rows_, r), last - c)
                store_first(rows_, at + 2 * p.C + c, narrow(factor, zeros(rows_)), last - c)
                store_first(rows_, at + 3 * p.C + c, narrow(fma(factor, -rest * r, summand), zeros(rows_)), last - c)


@jitted
def _backward_merge(p, a, x, mask, mean, rstd, rows_, n, slot, c0, c1):
    """Close the sums of the groups in channels c0..c1, and fill their planes k2 and k3."""
    sums, room = pointer(a.sums, FLOAT64), scratch(pointer(a.work, FLOAT64))
    at = slot * BACKWARD_PLANES * p.C
    g0, g1 = slab_groups(p, c0, c1)
    for start in range(g0, g1, LANES):
        groups = minimum(LANES, g1 - start)
        _statistics(p, a, x, mask, mean, rstd, n, slot, start, groups, real_positions(p, mask, n), room)
        for i in range(groups):
            first, last = group_channels(p, start + i)
            s_h = zeros(sums)
            for part in range(p.parts):
                for c in range(first, last, LANES):
                    s_h += load_first(sums, sums_at(p, n, part, H) + c, last - c)
            store_one(room, H_SUM + i, total(s_h))
        close_sums(p, a, x, mask, n, start, groups, room)
        for i in range(groups):
            first, last = group_channels(p, start + i)
            for c in range(first, last, LANES):
                store_first(rows_, at + 4 * p.C + c, zeros(rows_) + one_lane(rows_, load_one(room, K2 + i)), last - c)
                store_first(rows_, at + 5 * p.C + c, zeros(rows_) + one_lane(rows_, load_one(room, K3 + i)), last - c)


@inlined
def _dx_vector(x, dy, dresidual, residual, mask, kept, act, planes, C, xa, ya, sa, ra, ma, ka, c, lanes):
    """dx of up to LANES channels of a row, equation (14) as dz*a*r + xhat*k2 + k3; writes dresidual on the way."""
    m, r = load_first(planes, c, lanes), load_first(planes, C + c, lanes)
    a, b = load_first(planes, 2 * C + c, lanes), load_first(planes, 3 * C + c, lanes)
    k2, k3 = load_first(planes, 4 * C + c, lanes), load_first(planes, 5 * C + c, lanes)
    h = (load_first(x, xa + c, lanes) - m) * r
    if kept is None:
        dz = _dz_vector(dy, residual, act, h, ya + c, ra + c, a, b, lanes)
    else:
        dz = load_first(kept, ka + c, lanes)
    dx = fma(dz, a * r, fma(h, k2, k3))
    if mask is not None:
        real = load_one(mask, ma)
        dz, dx = select(real, dz, 0.0), select(real, dx, 0.0)
    if dresidual is not None:
        store_first(dresidual, sa + c, dz, lanes)
    return dx


@jitted
def _backward_rows(p, a, x, dy, dx, dresidual, residual, mask, kept, act, rows_, n, slot, first, last, c0, c1):
    """dx of channels c0..c1 of rows first..last, in the order of memory."""
    way, ahead = a.way, elements_ahead(dx, c1 - c0, p.dx_s)
    if way == PAST and (elements_to_line(dx, n * p.dx_n + c0) != 0 or p.dx_s % LANES != 0):
        way = THROUGH
    planes = shifted(rows_, slot * BACKWARD_PLANES * p.C)
    # Read once: after each store the compiler would read a record's fields again.
    C, x_s, dy_s, dx_s, residual_s, dresidual_s = p.C, p.x_s, p.dy_s, p.dx_s, p.residual_s, p.dresidual_s
    xa, ya, da = n * p.x_n + first * x_s, n * p.dy_n + first * dy_s, n * p.dx_n + first * dx_s
    ra, sa = n * p.residual_n + first * residual_s, n * p.dresidual_n + first * dresidual_s
    ka = first * (c1 - c0) - c0
    for ma in range(n * p.S + first, n * p.S + last):
        c = c0
        while c + LANES <= c1:
            v = _dx_vector(x, dy, dresidual, residual, mask, kept, act, planes, C, xa, ya, sa, ra, ma, ka, c, LANES)
            write(dx, da + c, v, way, ahead)
            c += LANES
        if c < c1:
            v = _dx_vector(x, dy, dresidual, residual, mask, kept, act, planes, C, xa, ya, sa, ra, ma, ka, c, c1 - c)
            store_first(dx, da + c, v, c1 - c)
        xa, ya, da, ra, sa = xa + x_s, ya + dy_s, da + dx_s, ra + residual_s, sa + dresidual_s
        ka += c1 - c0


@merged
def _backward(p, a, x, dy, dx, dresidual, residual, mask, kept, act, mean, rstd, rows_, task, worker):
    c0, c1 = np.int64(0), p.C
    kept = shifted(kept, worker * p.kept)
    start = task * p.per_task
    if p.phase == SUMS + MERGE + APPLY:  # slabs of samples, one after the other in the same place of work and rows
        slabs = maximum(p.C // p.slab, 1)
        for k in range(start, minimum(start + p.per_task, p.N * slabs)):
            n = k // slabs
            c0, c1 = slab_channels(p, k % slabs)
            if not p.stats:
                for unit in range(p.units):
                    unit_moments(p, a, x, mask, n, task, unit, c0, c1)
            _backward_planes(p, a, x, mask, mean, rstd, rows_, n, task, c0, c1)
            for unit in range(p.units):
                _unit_sums(p, a, x, dy, residual, mask, kept, act, rows_, n, task, unit, c0, c1)
            _backward_merge(p, a, x, mask, mean, rstd, rows_, n, task, c0, c1)
            for unit in range(p.units - 1, -1, -1):  # the unit read last is the one that is still in cache
                first, last = unit * p.unit, minimum((unit + 1) * p.unit, p.S)
                _backward_rows(p, a, x, dy, dx, dresidual, residual, mask, kept, act, rows_, n, task, first, last, c0,
                               c1)  # fmt: skip
    elif p.phase == PLANES:
        _backward_planes(p, a, x, mask, mean, rstd, rows_, task, task, c0, c1)
    elif p.phase == MERGE:
        _backward_merge(p, a, x, mask, mean, rstd, rows_, task, task, c0, c1)
    else:
        for k in range(start, minimum(start + p.per_task, p.N * p.units)):
            if p.phase == SUMS:
                n = k // p.units
                _unit_sums(p, a, x, dy, residual, mask, kept, act, rows_, n, n, k % p.units, c0, c1)
            else:
                index = p.N * p.units - 1 - k
                n, unit = index // p.units, index % p.units
                first, last = unit * p.unit, minimum((unit + 1) * p.unit, p.S)
                _backward_rows(p, a, x, dy, dx, dresidual, residual, mask, kept, act, rows_, n, n, first, last, c0, c1)
    fence()


@cache
def backward_kernel(element: int, act: int, residual: bool, mask: bool, kept: bool) -> Any:
    """The compiled backward for these element and activation codes; with a residual it also writes dresidual. kept: dz
    is computed once and kept, else twice.
    """
    residual_element, mask_element = element if residual else NONE, BOOL if mask else NONE
    lane_element = FLOAT64 if element == FLOAT64 else FLOAT32
    kept_element = lane_element if kept else NONE

    def kernel(plan, call, task, worker):
        p, a = plan_at(plan), call_at(call)
        _backward(
            p, a, pointer(a.x, element), pointer(a.dy, element), pointer(a.dx, element),
            pointer(a.dresidual, residual_element), pointer(a.residual, residual_element),
            pointer(a.mask, mask_element), pointer(to_line(a.kept), kept_element), activation(act, FLOAT32),
            pointer(a.mean, lane_element), pointer(a.rstd, lane_element), pointer(a.rows, lane_element), task, worker,
        )  # fmt: skip

    return compiled(kernel, f"last_backward_{element}_{act}_{residual:d}_{mask:d}_{kept:d}")
