"""Channels first, backward: equations (9) to (14) but for the parameters' gradients."""

from functools import cache
from typing import Any

from groupnorm._engines.cpu.channels_first.moments import APPLY, MERGE, SUMS, group_moments, unit_extent
from groupnorm._engines.cpu.compiler import compiled, inlined, merged
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
    following,
    given_moments,
    given_statistics,
    put_moments,
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
    repeat,
    scratch,
    shifted,
    store,
    store_first,
    store_one,
    store_totals,
    to_line,
    write,
    zeros,
)  # fmt: skip
from groupnorm._engines.cpu.records import DZ, DZH, FROM_MOMENTS, GIVEN, H, call_at, channel_affine, plan_at, sums_at
from groupnorm._engines.cpu.simd import LANES, first_lanes, fma, minimum, narrow, select, total, widen

__all__ = ["backward_kernel"]

SUMS_CHUNK = 512  # elements summed in float32: 16 to a lane, which lose less than rounding dz*xhat itself


@inlined
def _dz_vector(h, dy, residual, mask, act, ya, ra, ma, count, a, b):
    """dz of up to LANES elements, equation (9), from h = xhat."""
    dz = load_first(dy, ya, count)
    if act is not None:
        z = fma(h, a, b)
        if residual is not None:
            z = z + load_first(residual, ra, count)
        dz = dz * slope(act, z)
    if mask is not None:
        dz = select(load_first(mask, ma, count), dz, 0.0)
    return dz


@inlined
def _xhat(x, mask, xa, ma, count, m, r):
    """xhat of up to LANES elements, 0 where there is no element or the mask does not hold. Sums are taken of dz*xhat
    and not of dz*(x - mean), which could leave float32's range.
    """
    h = (load_first(x, xa, count) - m) * r
    if mask is not None:
        return select(load_first(mask, ma, count), h, 0.0)
    return select(first_lanes(count), h, 0.0)


@inlined
def _dx_vector(x, dy, dresidual, residual, mask, kept, act, xa, ya, sa, ra, ma, ka, count, m, r, a, b, k1, k2, k3):
    """dx of up to LANES elements, equation (14) as dz*k1 + xhat*k2 + k3; writes dresidual on the way."""
    h = (load_first(x, xa, count) - m) * r
    if kept is None:
        dz = _dz_vector(h, dy, residual, mask, act, ya, ra, ma, count, a, b)
    else:
        dz = load_first(kept, ka, count)
    if dresidual is not None:
        store_first(dresidual, sa, dz, count)
    dx = fma(dz, k1, fma(h, k2, k3))
    if mask is not None:
        dx = select(load_first(mask, ma, count), dx, 0.0)
    return dx


@inlined
def _coefficients(p, a, x, n, c, lanes, rest, r):
    """For some channels: a and b of z = h*a + b, where the mean lacks `rest`, and k1 of equation (14), in lane type."""
    factor, summand = channel_affine(p, a, n, c, lanes)
    like = zeros(x)
    return narrow(factor, like), narrow(fma(factor, -rest * r, summand), like), narrow(factor * r, like)


@inlined
def _keep(kept, at, dz, count):
    """Keep dz for `_dx_vector`, where there is a place for it."""
    if kept is not None:
        store_first(kept, at, dz, count)


@inlined
def _unit_sums(p, a, x, dy, residual, mask, kept, act, n, g, unit, m, rest, r):
    """Write the sums of dz and dz*xhat of each channel of a unit, and that of xhat of all, at its first channel."""
    sums = pointer(a.sums, FLOAT64)
    c, channels, start, length = unit_extent(p, g, unit)
    lane_m, lane_r = one_lane(x, m), one_lane(x, r)
    slopes, shifts, dzs, dzhs = scratch(x), scratch(x), scratch(x), scratch(x)
    short = length <= SUMS_CHUNK
    part = unit % p.parts
    of_dz, of_dzh, of_h = sums_at(p, n, part, DZ), sums_at(p, n, part, DZH), sums_at(p, n, part, H)
    s_h = widen(zeros(x))
    x_c, dy_c, residual_c, dense = p.x_c, p.dy_c, p.residual_c, p.dense  # read once, see forward.py
    xa, ya = n * p.x_n + c * x_c + start, n * p.dy_n + c * dy_c + start
    ra, ma = n * p.residual_n + c * residual_c + start, n * p.S + start
    ka = (c - g * p.D) * p.S + start
    for first in range(c, c + channels, LANES):
        lanes = minimum(c + channels - first, LANES)
        slope_, shift, _ = _coefficients(p, a, x, n, first, lanes, rest, r)
        if mask is None and dense and length == 1:  # lanes can be channels
            h = _xhat(x, mask, xa, ma, lanes, lane_m, lane_r)
            dz = _dz_vector(h, dy, residual, mask, act, ya, ra, ma, lanes, slope_, shift)
            _keep(kept, ka, dz, lanes)
            store_first(sums, of_dz + first, widen(dz), lanes)
            store_first(sums, of_dzh + first, widen(dz * h), lanes)
            s_h += widen(h)
            xa, ya, ra, ka = xa + LANES, ya + LANES, ra + LANES, ka + LANES
            continue
        store(slopes, 0, slope_)
        store(shifts, 0, shift)
        e_h = zeros(x)
        for lane in range(lanes):
            s_dz = s_dzh = 0.0
            for i in range(0, length, SUMS_CHUNK):
                p_dz, p_dzh, p_h = _chunk_sums(x, dy, residual, mask, kept, act, xa + i, ya + i, ra + i, ma + i, ka + i,
                                               minimum(SUMS_CHUNK, length - i), lane_m, lane_r, load_one(slopes, lane),
                                               load_one(shifts, lane))  # fmt: skip
                if short:  # the lanes of all channels are added up together
                    store(dzs, lane * LANES, p_dz)
                    store(dzhs, lane * LANES, p_dzh)
                    e_h += p_h
                else:
                    s_dz += total(p_dz)
                    s_dzh += total(p_dzh)
                    s_h += widen(p_h)
            if not short:
                store_one(sums, of_dz + first + lane, s_dz)
                store_one(sums, of_dzh + first + lane, s_dzh)
            xa, ya, ra, ka = xa + x_c, ya + dy_c, ra + residual_c, ka + p.S
        if short:
            s_h += widen(e_h)
            store_totals(sums, of_dz + first, dzs, lanes)
            store_totals(sums, of_dzh + first, dzhs, lanes)
    if channels > 0:
        store_one(sums, of_h + c, total(s_h))


@inlined
def _chunk_sums(x, dy, residual, mask, kept, act, xa, ya, ra, ma, ka, length, m, r, a, b):
    """The sums of dz, dz*xhat and xhat over at most SUMS_CHUNK elements of a channel, as vectors."""
    p0 = p1 = q0 = q1 = e0 = e1 = zeros(x)
    done = 0
    while done + 2 * LANES <= length:
        h = _xhat(x, mask, xa + done, ma + done, LANES, m, r)
        dz = _dz_vector(h, dy, residual, mask, act, ya + done, ra + done, ma + done, LANES, a, b)
        _keep(kept, ka + done, dz, LANES)
        p0 += dz
        q0 = fma(dz, h, q0)
        e0 += h
        done += LANES
        h = _xhat(x, mask, xa + done, ma + done, LANES, m, r)
        dz = _dz_vector(h, dy, residual, mask, act, ya + done, ra + done, ma + done, LANES, a, b)
        _keep(kept, ka + done, dz, LANES)
        p1 += dz
        q1 = fma(dz, h, q1)
        e1 += h
        done += LANES
    while done < length:
        tail = length - done
        h = _xhat(x, mask, xa + done, ma + done, tail, m, r)
        dz = _dz_vector(h, dy, residual, mask, act, ya + done, ra + done, ma + done, tail, a, b)
        _keep(kept, ka + done, dz, tail)
        p0 += dz
        q0 = fma(dz, h, q0)
        e0 += h
        done += LANES
    return p0 + p1, q0 + q1, e0 + e1


@inlined
def _backward_unit(p, a, x, dy, dx, dresidual, residual, mask, kept, act, n, g, unit, m, rest, r, k2, k3):
    """dx of a unit."""
    c, channels, start, length = unit_extent(p, g, unit)
    lane_m, lane_r = one_lane(x, m), one_lane(x, r)
    lane_k2, lane_k3 = one_lane(x, k2), one_lane(x, k3)
    slopes, shifts, factors = scratch(x), scratch(x), scratch(x)
    x_c, dy_c, dx_c, residual_c, dresidual_c = p.x_c, p.dy_c, p.dx_c, p.residual_c, p.dresidual_c
    ahead_x, ahead_dy, way, dense = p.ahead * x_c, p.ahead * dy_c, a.way, p.dense
    xa, ya = n * p.x_n + c * x_c + start, n * p.dy_n + c * dy_c + start
    da, sa = n * p.dx_n + c * dx_c + start, n * p.dresidual_n + c * dresidual_c + start
    ra, ma = n * p.residual_n + c * residual_c + start, n * p.S + start
    ka = (c - g * p.D) * p.S + start
    for first in range(c, c + channels, LANES):
        lanes = minimum(c + channels - first, LANES)
        slope_, shift, k1 = _coefficients(p, a, x, n, first, lanes, rest, r)
        if mask is None and dense:
            repeat(slopes, slope_, lanes, length)
            repeat(shifts, shift, lanes, length)
            repeat(factors, k1, lanes, length)
            for i in range(0, lanes * length, LANES):
                tail = lanes * length - i
                affine = load(slopes, i), load(shifts, i), load(factors, i)
                v = _dx_vector(x, dy, dresidual, residual, mask, kept, act, xa + i, ya + i, sa + i, ra + i, ma, ka + i,
                               tail, lane_m, lane_r, *affine, lane_k2, lane_k3)  # fmt: skip
                store_first(dx, da + i, v, tail)
            xa, ya, da = xa + LANES * x_c, ya + LANES * dy_c, da + LANES * dx_c
            sa, ra, ka = sa + LANES * dresidual_c, ra + LANES * residual_c, ka + LANES * p.S
            continue
        store(slopes, 0, slope_)
        store(shifts, 0, shift)
        store(factors, 0, k1)
        for lane in range(lanes):
            _backward_run(x, dy, dx, dresidual, residual, mask, kept, act, xa, ya, da, sa, ra, ma, ka, length,
                          way, ahead_x, ahead_dy, lane_m, lane_r, load_one(slopes, lane), load_one(shifts, lane),
                          load_one(factors, lane), lane_k2, lane_k3)  # fmt: skip
            xa, ya, da = xa + x_c, ya + dy_c, da + dx_c
            sa, ra, ka = sa + dresidual_c, ra + residual_c, ka + p.S


@inlined
def _backward_run(
    x, dy, dx, dresidual, residual, mask, kept, act, xa, ya, da, sa, ra, ma, ka, length, way, ahead_x, ahead_dy,
    m, r, a, b, k1, k2, k3,
):  # fmt: skip
    """dx of a run of one channel."""
    done = 0
    if way == PAST:
        head = minimum(elements_to_line(dx, da), length)
        if head >= LANES:
            way = THROUGH
        if 0 < head < LANES:
            v = _dx_vector(x, dy, dresidual, residual, mask, kept, act, xa, ya, sa, ra, ma, ka, head, m, r, a, b, k1,
                           k2, k3)  # fmt: skip
            store_first(dx, da, v, head)
            done = head
    written_ahead = elements_ahead(dx, 1, 1)
    while done + LANES <= length:
        if act is not None:
            prefetch(x, xa + done + ahead_x)
            prefetch(dy, ya + done + ahead_dy)
        v = _dx_vector(x, dy, dresidual, residual, mask, kept, act, xa + done, ya + done, sa + done, ra + done,
                       ma + done, ka + done, LANES, m, r, a, b, k1, k2, k3)  # fmt: skip
        write(dx, da + done, v, way, written_ahead)
        done += LANES
    if done < length:
        tail = length - done
        v = _dx_vector(x, dy, dresidual, residual, mask, kept, act, xa + done, ya + done, sa + done, ra + done,
                       ma + done, ka + done, tail, m, r, a, b, k1, k2, k3)  # fmt: skip
        store_first(dx, da + done, v, tail)


@inlined
def _kept_at(p, kept, worker, i):
    """Where a thread keeps dz of group i of those that go through the phases together."""
    return shifted(kept, (worker * (p.block // p.units) + i) * p.kept)


@merged
def _backward(p, a, x, dy, dx, dresidual, residual, mask, kept, act, mean, rstd, task, worker):
    work, sums = pointer(a.work, FLOAT64), pointer(a.sums, FLOAT64)
    room = scratch(work)
    start = task * p.per_task
    end = minimum(start + p.per_task, p.N * p.G * p.units)
    for first in range(start, end, p.block):
        last = minimum(first + p.block, end)
        group, unit = first // p.units, first % p.units
        groups = (last - 1) // p.units - group + 1
        n, g = group // p.G, group % p.G
        if p.stats == GIVEN:
            given_statistics(mean, rstd, group, groups, room)
        else:
            n_, g_ = n, g
            for i in range(groups):
                if p.stats == FROM_MOMENTS:
                    found = given_moments(a, group + i)
                else:
                    found = settled(group_moments(p, a, x, mask, n_, g_))
                put_moments(room, i, found)
                n_, g_ = following(p, n_, g_)
            close_moments(p, x, room, groups)
        if p.phase & SUMS:
            i, n_, g_, unit_ = 0, n, g, unit
            for _ in range(first, last):
                _unit_sums(p, a, x, dy, residual, mask, _kept_at(p, kept, worker, i), act, n_, g_, unit_,
                           load_one(room, MEAN + i), load_one(room, REST + i), load_one(room, RSTD + i))  # fmt: skip
                unit_ += 1
                if unit_ == p.units:
                    unit_, i = 0, i + 1
                    n_, g_ = following(p, n_, g_)
        if p.phase & MERGE:
            n_, g_ = n, g
            for i in range(groups):
                s_h = 0.0
                for u in range(p.units):
                    c, channels, _, _ = unit_extent(p, g_, u)
                    if channels > 0:
                        s_h += load_one(sums, sums_at(p, n_, u % p.parts, H) + c)
                store_one(room, H_SUM + i, s_h)
                n_, g_ = following(p, n_, g_)
            close_sums(p, a, x, mask, n, g, groups, room)
            if p.phase == MERGE:
                store_one(work, group * 2, load_one(room, K2))
                store_one(work, group * 2 + 1, load_one(room, K3))
        if p.phase & APPLY:
            if p.phase == APPLY:
                store_one(room, K2, load_one(work, group * 2))
                store_one(room, K3, load_one(work, group * 2 + 1))
            i = 0
            for _ in range(first, last):
                _backward_unit(p, a, x, dy, dx, dresidual, residual, mask, _kept_at(p, kept, worker, i), act, n, g,
                               unit, load_one(room, MEAN + i), load_one(room, REST + i), load_one(room, RSTD + i),
                               load_one(room, K2 + i), load_one(room, K3 + i))  # fmt: skip
                unit += 1
                if unit == p.units:
                    unit, i = 0, i + 1
                    n, g = following(p, n, g)
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
            pointer(a.mean, lane_element), pointer(a.rstd, lane_element), task, worker,
        )  # fmt: skip

    return compiled(kernel, f"first_backward_{element}_{act}_{residual:d}_{mask:d}_{kept:d}")
