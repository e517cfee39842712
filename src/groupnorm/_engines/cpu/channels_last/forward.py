"""Channels last, forward: equations (1) to (8), one slab after the other or one phase after the other."""

from functools import cache
from typing import Any

import numpy as np

from groupnorm._engines.cpu.channels_last.moments import (
    APPLY,
    MERGE,
    MOMENTS,
    group_moments,
    merge_units,
    slab_channels,
    slab_groups,
    unit_moments,
)  # fmt: skip
from groupnorm._engines.cpu.compiler import compiled, inlined, jitted, merged
from groupnorm._engines.cpu.epilogue import activate, activation
from groupnorm._engines.cpu.groups import (
    MEAN,
    REST,
    RSTD,
    close_moments,
    given_moments,
    group_channels,
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
    load_first,
    load_one,
    one_lane,
    pointer,
    scratch,
    shifted,
    store_first,
    write,
    zeros,
)  # fmt: skip
from groupnorm._engines.cpu.records import call_at, channel_affine, plan_at
from groupnorm._engines.cpu.simd import LANES, fma, maximum, minimum, narrow, select, widen

__all__ = ["FORWARD_PLANES", "forward_kernel"]

FORWARD_PLANES = 3  # m, a, b


@jitted
def _merge(p, a, x, mask, mean, rstd, rows_, n, slot, c0, c1):
    """From the units' moments (or given ones) to mean, rstd and the planes m, a, b of channels c0..c1."""
    room = scratch(pointer(a.work, FLOAT64))
    at = slot * FORWARD_PLANES * p.C
    rows = 0.0
    if not p.stats:
        rows = merge_units(p, a, x, mask, n, slot, c0, c1)
    g0, g1 = slab_groups(p, c0, c1)
    for start in range(g0, g1, LANES):
        groups = minimum(LANES, g1 - start)
        for i in range(groups):
            if p.stats:
                found = given_moments(a, n * p.G + start + i)
            else:
                found = group_moments(p, a, x, mask, n, slot, start + i, rows)
            put_moments(room, i, found)
        close_moments(p, x, room, groups)
        write_statistics(p, a, mean, rstd, room, n * p.G + start, groups)
        if a.y == 0:
            continue
        for i in range(groups):
            first, last = group_channels(p, start + i)
            m, rest, r = load_one(room, MEAN + i), load_one(room, REST + i), load_one(room, RSTD + i)
            for c in range(first, last, LANES):
                factor, summand = channel_affine(p, a, n, c, last - c)
                slope_ = narrow(factor * r, zeros(rows_))
                shift = narrow(fma(widen(slope_), -rest, summand), zeros(rows_))
                store_first(rows_, at + c, zeros(rows_) + one_lane(rows_, m), last - c)
                store_first(rows_, at + p.C + c, slope_, last - c)
                store_first(rows_, at + 2 * p.C + c, shift, last - c)


@inlined
def _forward_vector(x, residual, mask, act, planes, C, xa, ra, ma, c, lanes):
    """y of up to LANES channels of a row: equations (5) to (8)."""
    m, a, b = load_first(planes, c, lanes), load_first(planes, C + c, lanes), load_first(planes, 2 * C + c, lanes)
    z = fma(load_first(x, xa + c, lanes) - m, a, b)
    if residual is not None:
        z = z + load_first(residual, ra + c, lanes)
    if act is not None:
        z = activate(act, z)
    if mask is not None:
        z = select(load_one(mask, ma), z, 0.0)
    return z


@jitted
def _forward_rows(p, a, x, y, residual, mask, act, rows_, n, slot, first, last, c0, c1):
    """y of channels c0..c1 of rows first..last, in the order of memory."""
    way, ahead = a.way, elements_ahead(y, c1 - c0, p.y_s)
    if way == PAST and (elements_to_line(y, n * p.y_n + c0) != 0 or p.y_s % LANES != 0):
        way = THROUGH
    planes = shifted(rows_, slot * FORWARD_PLANES * p.C)
    # Read once: after each store the compiler would read a record's fields again.
    C, x_s, y_s, residual_s = p.C, p.x_s, p.y_s, p.residual_s
    xa, ya, ra = n * p.x_n + first * x_s, n * p.y_n + first * y_s, n * p.residual_n + first * residual_s
    for ma in range(n * p.S + first, n * p.S + last):
        c = c0
        while c + LANES <= c1:
            v = _forward_vector(x, residual, mask, act, planes, C, xa, ra, ma, c, LANES)
            write(y, ya + c, v, way, ahead)
            c += LANES
        if c < c1:
            v = _forward_vector(x, residual, mask, act, planes, C, xa, ra, ma, c, c1 - c)
            store_first(y, ya + c, v, c1 - c)
        xa, ya, ra = xa + x_s, ya + y_s, ra + residual_s


@merged
def _forward(p, a, x, y, residual, mask, act, mean, rstd, rows_, task):
    c0, c1 = np.int64(0), p.C
    first = task * p.per_task
    if p.phase == MOMENTS + MERGE + APPLY:  # slabs of samples, one after the other in the same place of work and rows
        slabs = maximum(p.C // p.slab, 1)
        for k in range(first, minimum(first + p.per_task, p.N * slabs)):
            n = k // slabs
            c0, c1 = slab_channels(p, k % slabs)
            if not p.stats:
                for unit in range(p.units):
                    unit_moments(p, a, x, mask, n, task, unit, c0, c1)
            _merge(p, a, x, mask, mean, rstd, rows_, n, task, c0, c1)
            if a.y != 0:
                for unit in range(p.units - 1, -1, -1):  # the unit read last is the one that is still in cache
                    start, end = unit * p.unit, minimum((unit + 1) * p.unit, p.S)
                    _forward_rows(p, a, x, y, residual, mask, act, rows_, n, task, start, end, c0, c1)
    elif p.phase == MERGE:
        _merge(p, a, x, mask, mean, rstd, rows_, task, task, c0, c1)
    else:
        for k in range(first, minimum(first + p.per_task, p.N * p.units)):
            if p.phase == MOMENTS:
                n = k // p.units
                unit_moments(p, a, x, mask, n, n, k % p.units, c0, c1)
            else:
                index = p.N * p.units - 1 - k
                n, unit = index // p.units, index % p.units
                start, end = unit * p.unit, minimum((unit + 1) * p.unit, p.S)
                _forward_rows(p, a, x, y, residual, mask, act, rows_, n, n, start, end, c0, c1)
    fence()


@cache
def forward_kernel(element: int, act: int, residual: bool, mask: bool) -> Any:
    """The compiled forward for these element and activation codes."""
    residual_element, mask_element = element if residual else NONE, BOOL if mask else NONE
    lane_element = FLOAT64 if element == FLOAT64 else FLOAT32

    def kernel(plan, call, task, worker):
        p, a = plan_at(plan), call_at(call)
        _forward(
            p, a, pointer(a.x, element), pointer(a.y, element), pointer(a.residual, residual_element),
            pointer(a.mask, mask_element), activation(act, element), pointer(a.mean, lane_element), pointer(a.rstd,
            lane_element), pointer(a.rows, lane_element), task,
        )  # fmt: skip

    return compiled(kernel, f"last_forward_{element}_{act}_{residual:d}_{mask:d}")
