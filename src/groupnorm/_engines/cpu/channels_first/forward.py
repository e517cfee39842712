"""Channels first, forward: equations (1) to (8), one group after the other or one phase after the other."""

from functools import cache
from typing import Any

import numpy as np

from groupnorm._engines.cpu.channels_first.moments import (
    APPLY,
    MERGE,
    MOMENTS,
    group_moments,
    load_moments,
    store_moments,
    unit_extent,
    unit_moments,
)  # fmt: skip
from groupnorm._engines.cpu.compiler import compiled, inlined, jitted, merged
from groupnorm._engines.cpu.epilogue import activate, activation
from groupnorm._engines.cpu.memory import (
    BOOL,
    FLOAT32,
    FLOAT64,
    NONE,
    elements_to_line,
    fence,
    load_first,
    load_one,
    one_lane,
    pointer,
    prefetch,
    scratch,
    store,
    store_first,
    store_one,
    write,
    zeros,
)  # fmt: skip
from groupnorm._engines.cpu.records import call_at, channel_affine, plan_at
from groupnorm._engines.cpu.simd import LANES, fma, narrow, select, widen

__all__ = ["forward_kernel"]


@inlined
def _forward_vector(x, residual, mask, act, xa, ra, ma, count, m, a, b):
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
def _forward_unit(p, a, x, y, residual, mask, act, n, g, unit, m, m_rest, r):
    """y of a unit, channel by channel: `m` is the mean in lane precision, `m_rest` what that lacks, r is rstd."""
    c, channels, start, length = unit_extent(p, g, unit)
    lane_m = one_lane(x, m)
    slopes, shifts = scratch(x), scratch(x)
    # Read once: after each store the compiler would read a record's fields again, a third of the time of 64 positions.
    x_c, y_c, residual_c, ahead, streaming, flat = p.x_c, p.y_c, p.residual_c, p.ahead * p.x_c, a.stream, p.flat
    xa, ya = n * p.x_n + c * x_c + start, n * p.y_n + c * y_c + start
    ra, ma = n * p.residual_n + c * residual_c + start, n * p.S + start
    for first in range(c, c + channels, LANES):
        lanes = min(c + channels - first, LANES)
        factor, summand = channel_affine(p, a, n, first, lanes)
        slope_ = narrow(factor * r, zeros(x))
        shift = narrow(fma(widen(slope_), -m_rest, summand), zeros(x))
        if mask is None and flat:  # a position to a channel: lanes can be channels
            v = _forward_vector(x, residual, mask, act, xa, ra, ma, lanes, lane_m, slope_, shift)
            store_first(y, ya, v, lanes)
            xa, ya, ra = xa + LANES, ya + LANES, ra + LANES
            continue
        store(slopes, 0, slope_)
        store(shifts, 0, shift)
        for lane in range(lanes):
            _forward_run(x, y, residual, mask, act, xa, ya, ra, ma, length, streaming, ahead, lane_m,
                         load_one(slopes, lane), load_one(shifts, lane))  # fmt: skip
            xa, ya, ra = xa + x_c, ya + y_c, ra + residual_c


@jitted
def _forward_run(x, y, residual, mask, act, xa, ya, ra, ma, length, streaming, ahead, m, a, b):
    """y of a run of one channel."""
    done = 0
    if streaming:
        head = min(elements_to_line(y, ya), length)
        streaming = head < LANES
        if 0 < head < LANES:
            store_first(y, ya, _forward_vector(x, residual, mask, act, xa, ra, ma, head, m, a, b), head)
            done = head
    while done + LANES <= length:
        if act is not None:
            prefetch(x, xa + done + ahead)
        v = _forward_vector(x, residual, mask, act, xa + done, ra + done, ma + done, LANES, m, a, b)
        write(y, ya + done, v, streaming)
        done += LANES
    if done < length:
        rest = length - done
        v = _forward_vector(x, residual, mask, act, xa + done, ra + done, ma + done, rest, m, a, b)
        store_first(y, ya + done, v, rest)


@jitted
def _results(p, a, x, mean, rstd, group, unit, found):
    """Mean in lane precision, what that lacks, and rstd of a group; the group's first unit writes what the caller asked
    for.
    """
    count, pivot, offset, m2 = found
    m = np.float64(one_lane(x, pivot + offset))
    m_rest = (pivot - m) + offset
    r = 1.0 / np.sqrt(m2 / max(count, 1.0) + p.eps)
    if unit == 0:
        if a.moments != 0 and not p.stats:
            moments = pointer(a.moments, FLOAT64)
            store_one(moments, group * 3, count)
            store_one(moments, group * 3 + 1, pivot + offset)
            store_one(moments, group * 3 + 2, m2)
        if a.mean != 0:
            store_one(mean, group, one_lane(mean, m + m_rest))
            store_one(rstd, group, one_lane(rstd, r))
    return m, m_rest, r


@merged
def _forward(p, a, x, y, residual, mask, act, mean, rstd, task):
    given = pointer(a.moments, FLOAT64)
    first = task * p.per_task
    m = m_rest = r = 0.0
    group, unit = first // p.units, first % p.units - 1
    n, g = group // p.G, group % p.G
    for index in range(first, min(first + p.per_task, p.N * p.G * p.units)):
        unit += 1  # counted on: four divisions would take as long as a tiny group
        if unit == p.units:
            unit, group, g = 0, group + 1, g + 1
            if g == p.G:
                n, g = n + 1, 0
        if p.phase == MOMENTS:
            store_moments(a, index, unit_moments(p, x, mask, n, g, unit))
            continue
        if p.phase == MERGE:  # into the place of the group's first unit
            if unit == 0:
                store_moments(a, index, group_moments(p, a, x, mask, n, g))
            continue
        if unit == 0 or index == first:
            found = (0.0, 0.0, 0.0, 0.0)
            if p.stats:
                found = (
                    load_one(given, group * 3),
                    load_one(given, group * 3 + 1),
                    0.0,
                    load_one(given, group * 3 + 2),
                )
            elif p.phase == APPLY:
                found = load_moments(a, group * p.units)
            else:
                found = group_moments(p, a, x, mask, n, g)
            m, m_rest, r = _results(p, a, x, mean, rstd, group, unit, found)
        if a.y != 0:
            _forward_unit(p, a, x, y, residual, mask, act, n, g, unit, m, m_rest, r)
    fence()


@cache
def forward_kernel(element: int, act: int, residual: bool, mask: bool) -> Any:
    """The compiled forward for these element and activation codes."""
    residual_element, mask_element = element if residual else NONE, BOOL if mask else NONE
    stats_element = FLOAT64 if element == FLOAT64 else FLOAT32

    def kernel(plan, call, task):
        p, a = plan_at(plan), call_at(call)
        _forward(
            p, a, pointer(a.x, element), pointer(a.y, element), pointer(a.residual, residual_element),
            pointer(a.mask, mask_element), activation(act, element), pointer(a.mean, stats_element), pointer(a.rstd,
            stats_element), task,
        )  # fmt: skip

    return compiled(kernel, f"first_forward_{element}_{act}_{residual:d}_{mask:d}")
