"""Channels first, forward: equations (1) to (8), one group after the other or one phase after the other."""

from functools import cache
from typing import Any

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
from groupnorm._engines.cpu.compiler import compiled, inlined, merged
from groupnorm._engines.cpu.epilogue import activate, activation
from groupnorm._engines.cpu.groups import (
    MEAN,
    REST,
    RSTD,
    close_moments,
    following,
    given_moments,
    put_moments,
    write_statistics,
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
    store,
    store_first,
    write,
    zeros,
)  # fmt: skip
from groupnorm._engines.cpu.records import call_at, channel_affine, plan_at
from groupnorm._engines.cpu.simd import LANES, fma, minimum, narrow, select, widen

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


@inlined
def _forward_unit(p, a, x, y, residual, mask, act, n, g, unit, m, m_rest, r):
    """y of a unit: `m` is the mean in lane precision, `m_rest` what that lacks, r is rstd."""
    c, channels, start, length = unit_extent(p, g, unit)
    lane_m = one_lane(x, m)
    slopes, shifts = scratch(x), scratch(x)
    # Read once: after each store the compiler would read a record's fields again, a third of the time of 64 positions.
    x_c, y_c, residual_c, ahead, way, dense = p.x_c, p.y_c, p.residual_c, p.ahead * p.x_c, a.way, p.dense
    xa, ya = n * p.x_n + c * x_c + start, n * p.y_n + c * y_c + start
    ra, ma = n * p.residual_n + c * residual_c + start, n * p.S + start
    for first in range(c, c + channels, LANES):
        lanes = minimum(c + channels - first, LANES)
        factor, summand = channel_affine(p, a, n, first, lanes)
        slope_ = narrow(factor * r, zeros(x))
        shift = narrow(fma(widen(slope_), -m_rest, summand), zeros(x))
        if mask is None and dense:
            repeat(slopes, slope_, lanes, length)
            repeat(shifts, shift, lanes, length)
            for i in range(0, lanes * length, LANES):
                rest = lanes * length - i
                v = _forward_vector(x, residual, mask, act, xa + i, ra + i, ma, rest, lane_m, load(slopes, i),
                                    load(shifts, i))  # fmt: skip
                store_first(y, ya + i, v, rest)
            xa, ya, ra = xa + LANES * x_c, ya + LANES * y_c, ra + LANES * residual_c
            continue
        store(slopes, 0, slope_)
        store(shifts, 0, shift)
        for lane in range(lanes):
            _forward_run(x, y, residual, mask, act, xa, ya, ra, ma, length, way, ahead, lane_m,
                         load_one(slopes, lane), load_one(shifts, lane))  # fmt: skip
            xa, ya, ra = xa + x_c, ya + y_c, ra + residual_c


@inlined
def _forward_run(x, y, residual, mask, act, xa, ya, ra, ma, length, way, ahead, m, a, b):
    """y of a run of one channel."""
    done = 0
    if way == PAST:
        head = minimum(elements_to_line(y, ya), length)
        if head >= LANES:
            way = THROUGH
        if 0 < head < LANES:
            store_first(y, ya, _forward_vector(x, residual, mask, act, xa, ra, ma, head, m, a, b), head)
            done = head
    written_ahead = elements_ahead(y, 1, 1)
    while done + LANES <= length:
        if act is not None:
            prefetch(x, xa + done + ahead)
        v = _forward_vector(x, residual, mask, act, xa + done, ra + done, ma + done, LANES, m, a, b)
        write(y, ya + done, v, way, written_ahead)
        done += LANES
    if done < length:
        rest = length - done
        v = _forward_vector(x, residual, mask, act, xa + done, ra + done, ma + done, rest, m, a, b)
        store_first(y, ya + done, v, rest)


@merged
def _forward(p, a, x, y, residual, mask, act, mean, rstd, task):
    room = scratch(pointer(a.work, FLOAT64))
    start = task * p.per_task
    end = minimum(start + p.per_task, p.N * p.G * p.units)
    for first in range(start, end, p.block):
        last = minimum(first + p.block, end)
        group, unit = first // p.units, first % p.units
        n, g = group // p.G, group % p.G
        if p.phase == MOMENTS:
            store_moments(a, first, unit_moments(p, x, mask, n, g, unit))
            continue
        groups = (last - 1) // p.units - group + 1
        n_, g_ = n, g
        for i in range(groups):
            if p.stats:
                found = given_moments(a, group + i)
            elif p.phase == APPLY:
                found = load_moments(a, (group + i) * p.units)
            else:
                found = group_moments(p, a, x, mask, n_, g_)
            if p.phase == MERGE:  # into the place of the group's first unit
                store_moments(a, first + i * p.units, found)
            put_moments(room, i, found)
            n_, g_ = following(p, n_, g_)
        if p.phase == MERGE:
            continue
        close_moments(p, x, room, groups)
        if unit == 0:
            write_statistics(p, a, mean, rstd, room, group, groups)
        if a.y == 0:
            continue
        i = 0
        for _ in range(first, last):
            _forward_unit(p, a, x, y, residual, mask, act, n, g, unit, load_one(room, MEAN + i),
                          load_one(room, REST + i), load_one(room, RSTD + i))  # fmt: skip
            unit += 1
            if unit == p.units:
                unit, i = 0, i + 1
                n, g = following(p, n, g)
    fence()


@cache
def forward_kernel(element: int, act: int, residual: bool, mask: bool) -> Any:
    """The compiled forward for these element and activation codes."""
    residual_element, mask_element = element if residual else NONE, BOOL if mask else NONE
    stats_element = FLOAT64 if element == FLOAT64 else FLOAT32

    def kernel(plan, call, task, worker):
        p, a = plan_at(plan), call_at(call)
        _forward(
            p, a, pointer(a.x, element), pointer(a.y, element), pointer(a.residual, residual_element),
            pointer(a.mask, mask_element), activation(act, element), pointer(a.mean, stats_element), pointer(a.rstd,
            stats_element), task,
        )  # fmt: skip

    return compiled(kernel, f"first_forward_{element}_{act}_{residual:d}_{mask:d}")
