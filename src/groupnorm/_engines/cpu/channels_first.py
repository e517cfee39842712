"""Channels-first kernels: the positions of a channel are neighbours, so a group is a few long runs.

How a group is cut depends on its shape alone, never on the batch or on threads, so results do not either:

- a *part* is one channel's positions, or a piece of them when there are more than PART;
- a *unit* is `p.unit` channels (as many as make UNIT elements) of one part; statistics are merged unit by unit;
- a *task* is `p.per_task` units, numbered through all groups. With whole groups as tasks one launch does everything while a group
  is in cache; with few large groups, one launch takes the moments of the units and a second applies them.

The matching phases are MOMENTS and APPLY for forward, SUMS, MERGE (by group) and APPLY for backward; their sum, in one launch, is
the road of whole groups.
"""

from functools import cache
from typing import Any

import numpy as np

from groupnorm._engines.cpu.compiler import compiled, inlined, jitted, merged
from groupnorm._engines.cpu.epilogue import activate, activation, slope
from groupnorm._engines.cpu.groups import close_sums, group_channels
from groupnorm._engines.cpu.memory import (
    BOOL, FLOAT32, FLOAT64, NONE, elements_to_line, fence, load_first, load_one, one_lane, pointer, store_first, store_one,
    write, zeros,
)  # fmt: skip
from groupnorm._engines.cpu.records import call_at, channel_affine, plan_at
from groupnorm._engines.cpu.simd import LANES, first_lanes, fma, select, sum_lanes
from groupnorm._engines.cpu.statistics import chunk_moments, merge, moments_by_element, out_of_range

__all__ = ["APPLY", "MERGE", "MOMENTS", "SUMS", "backward_kernel", "forward_kernel"]

MOMENTS = SUMS = 1  # what a launch does first
APPLY, MERGE = 2, 4


# ---- how a group is cut ----------------------------------------------------------------------------------------------


@jitted
def unit_extent(p, g, unit):  # type: ignore[no-untyped-def]
    """First channel, channels, first position and positions of a unit of group g; no channels if g has not so many units."""
    first, last = group_channels(p, g)
    part = unit % p.parts
    c = first + unit // p.parts * p.unit
    length = ((p.S + p.parts - 1) // p.parts + LANES - 1) // LANES * LANES
    start = part * length
    return c, max(min(p.unit, last - c), 0), start, max(min(length, p.S - start), 0)


# ---- moments ---------------------------------------------------------------------------------------------------------


@jitted
def unit_moments(p, x, mask, n, g, unit):  # type: ignore[no-untyped-def]
    """Moments of a unit, chunk by chunk."""
    c, channels, start, length = unit_extent(p, g, unit)
    at = n * p.x_n + c * p.x_c + start
    mask_at = n * p.S + start
    if channels > 1 and mask is None and p.x_c == p.S:  # the unit's channels are one run
        length, channels = length * channels, 1
    found = piece = (0.0, 0.0, 0.0, 0.0)
    rows = max(min(p.chunk // max(length, 1), channels), 1)
    for r in range(0, channels, rows):
        for i in range(0, length, p.chunk):
            piece = chunk_moments(x, mask, at + r * p.x_c + i, mask_at + i, min(rows, channels - r),
                                  min(p.chunk, length - i), p.x_c, piece)  # fmt: skip
            found = merge(found, piece)
    return found


@jitted
def group_moments(p, a, x, mask, n, g, known):  # type: ignore[no-untyped-def]
    """Moments of a group: its units merged, from `work` if they are known, else computed here."""
    found = (0.0, 0.0, 0.0, 0.0)
    for unit in range(p.units):
        if known:
            w = pointer(a.work, FLOAT64)
            i = ((n * p.G + g) * p.units + unit) * 4
            piece = (load_one(w, i), load_one(w, i + 1), load_one(w, i + 2), load_one(w, i + 3))
        else:
            piece = unit_moments(p, x, mask, n, g, unit)
        found = merge(found, piece)
    count, _, _, m2 = found
    if out_of_range(m2, count, p.eps):
        first, last = group_channels(p, g)
        at = n * p.x_n + first * p.x_c
        found = moments_by_element(x, mask, at, n * p.S, last - first, p.x_c, p.S, 1)
    return found


# ---- forward ---------------------------------------------------------------------------------------------------------


@inlined
def _forward_vector(x, residual, mask, act, xa, ra, ma, count, m, a, b):  # type: ignore[no-untyped-def]
    """y of up to LANES elements: equations (5) to (8), weight and scale folded into a, bias and shift into b."""
    z = fma(load_first(x, xa, count) - m, a, b)
    if residual is not None:
        z = z + load_first(residual, ra, count)
    if act is not None:
        z = activate(act, z)
    if mask is not None:
        z = select(load_first(mask, ma, count), z, 0.0)
    return z


@jitted
def _forward_unit(p, a, x, y, residual, mask, act, n, g, unit, m, m_rest, r):  # type: ignore[no-untyped-def]
    """y of a unit, channel by channel: `m` is the mean in lane precision, `m_rest` what that lacks, r is rstd."""
    c, channels, start, length = unit_extent(p, g, unit)
    lane_m = one_lane(x, m)
    for channel in range(c, c + channels):
        factor, summand = channel_affine(p, a, n, channel)
        slope_ = one_lane(x, factor * r)
        shift = one_lane(x, summand - m_rest * np.float64(slope_))
        xa, ya = n * p.x_n + channel * p.x_c + start, n * p.y_n + channel * p.y_c + start
        ra, ma = n * p.residual_n + channel * p.residual_c + start, n * p.S + start
        done, streaming = 0, a.stream
        if streaming:
            head = min(elements_to_line(y, ya), length)
            streaming = head < LANES
            if 0 < head < LANES:
                v = _forward_vector(x, residual, mask, act, xa, ra, ma, head, lane_m, slope_, shift)
                store_first(y, ya, v, head)
                done = head
        while done + LANES <= length:
            v = _forward_vector(x, residual, mask, act, xa + done, ra + done, ma + done, LANES, lane_m, slope_, shift)
            write(y, ya + done, v, streaming)
            done += LANES
        if done < length:
            rest = length - done
            v = _forward_vector(x, residual, mask, act, xa + done, ra + done, ma + done, rest, lane_m, slope_, shift)
            store_first(y, ya + done, v, rest)


@merged
def _forward(p, a, x, y, residual, mask, act, mean, rstd, task):  # type: ignore[no-untyped-def]
    moments = pointer(a.moments, FLOAT64)
    work = pointer(a.work, FLOAT64)
    first = task * p.per_task
    m = m_rest = r = 0.0
    for index in range(first, min(first + p.per_task, p.N * p.G * p.units)):
        group, unit = index // p.units, index % p.units
        n, g = group // p.G, group % p.G
        if p.phase == MOMENTS:
            count, pivot, offset, m2 = unit_moments(p, x, mask, n, g, unit)
            store_one(work, index * 4, count)
            store_one(work, index * 4 + 1, pivot)
            store_one(work, index * 4 + 2, offset)
            store_one(work, index * 4 + 3, m2)
            continue
        if unit == 0 or index == first:
            if p.stats:
                count, pivot = load_one(moments, group * 3), load_one(moments, group * 3 + 1)
                offset, m2 = 0.0, load_one(moments, group * 3 + 2)
            else:
                count, pivot, offset, m2 = group_moments(p, a, x, mask, n, g, p.phase == APPLY)
                if a.moments != 0 and unit == 0:
                    store_one(moments, group * 3, count)
                    store_one(moments, group * 3 + 1, pivot + offset)
                    store_one(moments, group * 3 + 2, m2)
            m = np.float64(one_lane(x, pivot + offset))
            m_rest = (pivot - m) + offset
            r = 1.0 / np.sqrt(m2 / max(count, 1.0) + p.eps)
            if a.mean != 0 and unit == 0:
                store_one(mean, group, one_lane(mean, m + m_rest))
                store_one(rstd, group, one_lane(rstd, r))
        if a.y != 0:
            _forward_unit(p, a, x, y, residual, mask, act, n, g, unit, m, m_rest, r)
    fence()


@cache
def forward_kernel(element: int, act: int, residual: bool, mask: bool) -> Any:
    """The compiled forward for these element and activation codes."""
    residual_element, mask_element = element if residual else NONE, BOOL if mask else NONE
    stats_element = FLOAT64 if element == FLOAT64 else FLOAT32

    def kernel(plan, call, task):  # type: ignore[no-untyped-def]
        p, a = plan_at(plan), call_at(call)
        _forward(
            p, a, pointer(a.x, element), pointer(a.y, element), pointer(a.residual, residual_element),
            pointer(a.mask, mask_element), activation(act), pointer(a.mean, stats_element), pointer(a.rstd, stats_element),
            task,
        )  # fmt: skip

    return compiled(kernel, f"first_forward_{element}_{act}_{residual:d}_{mask:d}")


# ---- backward --------------------------------------------------------------------------------------------------------


@inlined
def _dz_vector(d, dy, residual, mask, act, ya, ra, ma, count, a, b):  # type: ignore[no-untyped-def]
    """dz of up to LANES elements, equation (9); d is x - mean."""
    dz = load_first(dy, ya, count)
    if act is not None:
        z = fma(d, a, b)
        if residual is not None:
            z = z + load_first(residual, ra, count)
        dz = dz * slope(act, z)
    if mask is not None:
        dz = select(load_first(mask, ma, count), dz, 0.0)
    return dz


@inlined
def _deviation(x, mask, xa, ma, count, m):  # type: ignore[no-untyped-def]
    """x - mean of up to LANES elements, 0 where there is no element or the mask does not hold."""
    d = load_first(x, xa, count) - m
    if mask is not None:
        return select(load_first(mask, ma, count), d, 0.0)
    return select(first_lanes(count), d, 0.0)


@inlined
def _dx_vector(x, dy, dresidual, residual, mask, act, xa, ya, sa, ra, ma, count, m, k1, b, k2, k3):  # type: ignore[no-untyped-def]
    """dx of up to LANES elements, equation (14) as dz*k1 + (x - mean)*k2 + k3; writes dresidual on the way."""
    d = load_first(x, xa, count) - m
    dz = _dz_vector(d, dy, residual, mask, act, ya, ra, ma, count, k1, b)
    if dresidual is not None:
        store_first(dresidual, sa, dz, count)
    dx = fma(dz, k1, fma(d, k2, k3))
    if mask is not None:
        dx = select(load_first(mask, ma, count), dx, 0.0)
    return dx


@jitted
def _unit_sums(p, a, x, dy, residual, mask, act, n, g, unit, m, r):  # type: ignore[no-untyped-def]
    """Write the sums of dz, dz*d and d of each channel of a unit, d = x - mean; by chunks in lanes, then in float64."""
    sums = pointer(a.sums, FLOAT64)
    c, channels, start, length = unit_extent(p, g, unit)
    lane_m = one_lane(x, m)
    for channel in range(c, c + channels):
        factor, summand = channel_affine(p, a, n, channel)
        slope_, shift = one_lane(x, factor * r), one_lane(x, summand)
        s_dz = s_dzd = s_d = 0.0
        for i in range(start, start + length, p.chunk):
            xa, ya = n * p.x_n + channel * p.x_c + i, n * p.dy_n + channel * p.dy_c + i
            ra, ma = n * p.residual_n + channel * p.residual_c + i, n * p.S + i
            end = min(p.chunk, start + length - i)
            p0 = p1 = q0 = q1 = e0 = e1 = zeros(x)
            done = 0
            while done + 2 * LANES <= end:
                d = _deviation(x, mask, xa + done, ma + done, LANES, lane_m)
                dz = _dz_vector(d, dy, residual, mask, act, ya + done, ra + done, ma + done, LANES, slope_, shift)
                p0 += dz
                q0 = fma(dz, d, q0)
                e0 += d
                done += LANES
                d = _deviation(x, mask, xa + done, ma + done, LANES, lane_m)
                dz = _dz_vector(d, dy, residual, mask, act, ya + done, ra + done, ma + done, LANES, slope_, shift)
                p1 += dz
                q1 = fma(dz, d, q1)
                e1 += d
                done += LANES
            while done < end:
                rest = end - done
                d = _deviation(x, mask, xa + done, ma + done, rest, lane_m)
                dz = _dz_vector(d, dy, residual, mask, act, ya + done, ra + done, ma + done, rest, slope_, shift)
                p0 += dz
                q0 = fma(dz, d, q0)
                e0 += d
                done += LANES
            s_dz += np.float64(sum_lanes(p0 + p1))
            s_dzd += np.float64(sum_lanes(q0 + q1))
            s_d += np.float64(sum_lanes(e0 + e1))
        at = n * p.sum_n + channel * p.sum_c + unit % p.parts * p.sum_part
        store_one(sums, at, s_dz)
        store_one(sums, at + p.sum_next, s_dzd)
        store_one(sums, at + 2 * p.sum_next, s_d)


@jitted
def _backward_unit(p, a, x, dy, dx, dresidual, residual, mask, act, n, g, unit, m, r, k2, k3):  # type: ignore[no-untyped-def]
    """dx of a unit, channel by channel."""
    c, channels, start, length = unit_extent(p, g, unit)
    lane_m, lane_k2, lane_k3 = one_lane(x, m), one_lane(x, k2), one_lane(x, k3)
    for channel in range(c, c + channels):
        factor, summand = channel_affine(p, a, n, channel)
        k1, shift = one_lane(x, factor * r), one_lane(x, summand)
        xa, ya = n * p.x_n + channel * p.x_c + start, n * p.dy_n + channel * p.dy_c + start
        da, sa = n * p.dx_n + channel * p.dx_c + start, n * p.dresidual_n + channel * p.dresidual_c + start
        ra, ma = n * p.residual_n + channel * p.residual_c + start, n * p.S + start
        done, streaming = 0, a.stream
        if streaming:
            head = min(elements_to_line(dx, da), length)
            streaming = head < LANES
            if 0 < head < LANES:
                v = _dx_vector(x, dy, dresidual, residual, mask, act, xa, ya, sa, ra, ma, head, lane_m, k1, shift, lane_k2,
                               lane_k3)  # fmt: skip
                store_first(dx, da, v, head)
                done = head
        while done + LANES <= length:
            v = _dx_vector(x, dy, dresidual, residual, mask, act, xa + done, ya + done, sa + done, ra + done, ma + done,
                           LANES, lane_m, k1, shift, lane_k2, lane_k3)  # fmt: skip
            write(dx, da + done, v, streaming)
            done += LANES
        if done < length:
            rest = length - done
            v = _dx_vector(x, dy, dresidual, residual, mask, act, xa + done, ya + done, sa + done, ra + done, ma + done,
                           rest, lane_m, k1, shift, lane_k2, lane_k3)  # fmt: skip
            store_first(dx, da + done, v, rest)


@jitted
def _group_totals(p, a, mask, n, g, r):  # type: ignore[no-untyped-def]
    """Close the sums of a group, and keep k2 and k3 of dx = dz*k1 + (x - mean)*k2 + k3 for its units."""
    k2, k3 = close_sums(p, a, mask, n, g, r)
    work = pointer(a.work, FLOAT64)
    store_one(work, (n * p.G + g) * 2, k2)
    store_one(work, (n * p.G + g) * 2 + 1, k3)


@merged
def _backward(p, a, x, dy, dx, dresidual, residual, mask, act, mean, rstd, task):  # type: ignore[no-untyped-def]
    work = pointer(a.work, FLOAT64)
    first = task * p.per_task
    m = r = k2 = k3 = 0.0
    for index in range(first, min(first + p.per_task, p.N * p.G * p.units)):
        group, unit = index // p.units, index % p.units
        n, g = group // p.G, group % p.G
        if unit == 0 or index == first:
            if p.stats:
                m, r = np.float64(load_one(mean, group)), np.float64(load_one(rstd, group))
            else:
                count, pivot, offset, m2 = group_moments(p, a, x, mask, n, g, False)
                m = np.float64(one_lane(mean, pivot + offset))
                r = np.float64(one_lane(mean, 1.0 / np.sqrt(m2 / max(count, 1.0) + p.eps)))
        if p.phase == SUMS:
            _unit_sums(p, a, x, dy, residual, mask, act, n, g, unit, m, r)
            continue
        if p.phase == MERGE:
            if unit == 0:
                _group_totals(p, a, mask, n, g, r)
            continue
        if unit == 0 or index == first:
            if p.phase != APPLY:
                for u in range(p.units):
                    _unit_sums(p, a, x, dy, residual, mask, act, n, g, u, m, r)
                _group_totals(p, a, mask, n, g, r)
            k2, k3 = load_one(work, group * 2), load_one(work, group * 2 + 1)
        _backward_unit(p, a, x, dy, dx, dresidual, residual, mask, act, n, g, unit, m, r, k2, k3)
    fence()


@cache
def backward_kernel(element: int, act: int, residual: bool, mask: bool) -> Any:
    """The compiled backward for these element and activation codes; with a residual it also writes dresidual."""
    residual_element, mask_element = element if residual else NONE, BOOL if mask else NONE
    stats_element = FLOAT64 if element == FLOAT64 else FLOAT32

    def kernel(plan, call, task):  # type: ignore[no-untyped-def]
        p, a = plan_at(plan), call_at(call)
        _backward(
            p, a, pointer(a.x, element), pointer(a.dy, element), pointer(a.dx, element),
            pointer(a.dresidual, residual_element), pointer(a.residual, residual_element), pointer(a.mask, mask_element),
            activation(act), pointer(a.mean, stats_element), pointer(a.rstd, stats_element), task,
        )  # fmt: skip

    return compiled(kernel, f"first_backward_{element}_{act}_{residual:d}_{mask:d}")
