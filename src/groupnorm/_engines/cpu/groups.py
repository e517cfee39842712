"""What both layouts know about a group: its channels, its statistics, and how the sums of backward are closed.

Statistics are closed for up to LANES groups at once, a group to a lane, in a `room` (see `scratch`) with a plane of
LANES numbers for each thing that is known of them: what is one square root and three divisions, one waiting for the
other, would else take longer than the elements of a tiny group.
"""

import numpy as np

from groupnorm._engines.cpu.compiler import inlined, jitted
from groupnorm._engines.cpu.memory import (
    FLOAT64,
    element_size,
    load_first,
    load_one,
    pointer,
    store,
    store_first,
    store_one,
    zeros,
)
from groupnorm._engines.cpu.records import DZ, DZH, channel_affine, sums_at
from groupnorm._engines.cpu.simd import LANES, absolute, fma, maximum, narrow, select, square_root, total, widen
from groupnorm._engines.cpu.statistics import count_real

__all__ = [
    "H_SUM",
    "K2",
    "K3",
    "MEAN",
    "REST",
    "RSTD",
    "close_moments",
    "close_sums",
    "following",
    "given_moments",
    "given_statistics",
    "group_channels",
    "put_moments",
    "real_positions",
    "settled",
    "write_statistics",
]  # fmt: skip

COUNT, PIVOT, OFFSET, M2, MEAN, REST, RSTD, H_SUM, K2, K3, LOST, EXACT = np.arange(12) * LANES  # planes of a room


@jitted
def group_channels(p, g):
    """First channel of group g, and the one after its last."""
    return g * p.D, p.C if g == p.G - 1 else (g + 1) * p.D


@inlined
def following(p, n, g):
    """Sample and number of the next group, without the divisions, which cost as much as a tiny group."""
    return (n + 1, np.int64(0)) if g + 1 == p.G else (n, g + 1)


@jitted
def real_positions(p, mask, n):
    """Positions of sample n that enter the statistics."""
    if mask is None:
        return np.float64(p.S)
    return count_real(mask, n * p.S, p.S)


@inlined
def given_moments(a, group):
    """The moments (count, pivot, offset, m2) of a group that the caller, or an earlier launch, has left."""
    moments = pointer(a.moments, FLOAT64)
    return load_one(moments, group * 3), load_one(moments, group * 3 + 1), 0.0, load_one(moments, group * 3 + 2)


@inlined
def settled(found):
    """The moments of a group with the offset taken into the pivot, as `write_statistics` leaves them for a later launch
    (and `given_moments` finds them): backward, which may take either road, uses no others.
    """
    return found[0], found[1] + found[2], 0.0, found[3]


@inlined
def put_moments(room, i, found):
    """Keep the moments of a group in lane i of a room."""
    store_one(room, COUNT + i, found[0])
    store_one(room, PIVOT + i, found[1])
    store_one(room, OFFSET + i, found[2])
    store_one(room, M2 + i, found[3])


@inlined
def close_moments(p, x, room, groups):
    """From the moments of some groups to mean in lane precision, what that lacks, and rstd: equation (4)."""
    count, pivot = load_first(room, COUNT, groups), load_first(room, PIVOT, groups)
    offset, m2 = load_first(room, OFFSET, groups), load_first(room, M2, groups)
    m = widen(narrow(pivot + offset, zeros(x)))
    store(room, MEAN, m)
    store(room, REST, (pivot - m) + offset)
    store(room, RSTD, 1.0 / square_root(m2 / select(count < 1.0, 1.0, count) + p.eps))


@inlined
def given_statistics(mean, rstd, group, groups, room):
    """The mean and rstd that the caller gave."""
    store(room, MEAN, widen(load_first(mean, group, groups)))
    store(room, REST, zeros(room))
    store(room, RSTD, widen(load_first(rstd, group, groups)))


@jitted
def write_statistics(p, a, mean, rstd, room, group, groups):
    """Write what the caller of forward asked for about some groups."""
    if a.moments != 0 and not p.stats:
        moments = pointer(a.moments, FLOAT64)
        for i in range(groups):
            store_one(moments, (group + i) * 3, load_one(room, COUNT + i))
            store_one(moments, (group + i) * 3 + 1, load_one(room, PIVOT + i) + load_one(room, OFFSET + i))
            store_one(moments, (group + i) * 3 + 2, load_one(room, M2 + i))
    if a.mean != 0:
        m = load_first(room, MEAN, groups) + load_first(room, REST, groups)
        store_first(mean, group, narrow(m, zeros(mean)), groups)
        store_first(rstd, group, narrow(load_first(room, RSTD, groups), zeros(rstd)), groups)


@jitted
def close_sums(p, a, x, mask, n, g, groups, room):
    """For some groups, group g of sample n being the first: from the sums of dz, dz*h and h of their channels to those
    of dz*xhat, in place, and to k2 and k3 of equation (14), dx = dz*k1 + h*k2 + k3, where h = (x - m)*r.

    The mean at hand, m, is rounded to its type, an error of up to |m|*2^-24 that rstd magnifies; the sum of h tells
    what was lost, and r in lane precision is off by the factor `exact`, so that xhat is (h - lost)*exact. A mean that
    is off by more than four roundings was given by the caller as something else than the mean of x, and stays as it is.
    """
    sums = pointer(a.sums, FLOAT64)
    n_, g_ = n, g
    for i in range(groups):
        first, last = group_channels(p, g_)
        store_one(room, COUNT + i, maximum(real_positions(p, mask, n_) * (last - first), 1.0))
        n_, g_ = following(p, n_, g_)
    count, r = load_first(room, COUNT, groups), load_first(room, RSTD, groups)
    lane_r = widen(narrow(r, zeros(x)))
    exact = select(lane_r > 0.0, select(lane_r < np.inf, r / lane_r, 1.0), 1.0)
    lost = load_first(room, H_SUM, groups) / count
    rounding = 2.0**-51 if element_size(x) == 8 else 2.0**-22
    lost = select(absolute(lost) > absolute(load_first(room, MEAN, groups)) * r * rounding, 0.0, lost)
    store(room, EXACT, exact)
    store(room, LOST, lost)
    for i in range(groups):
        first, last = group_channels(p, g)
        lost_, exact_ = load_one(room, LOST + i), load_one(room, EXACT + i)
        s1 = s2 = zeros(sums)
        for c in range(first, last, LANES):
            factor, _ = channel_affine(p, a, n, c, last - c)
            for part in range(p.parts):
                s_dz = load_first(sums, sums_at(p, n, part, DZ) + c, last - c)
                s_dzh = (load_first(sums, sums_at(p, n, part, DZH) + c, last - c) - lost_ * s_dz) * exact_
                store_first(sums, sums_at(p, n, part, DZH) + c, s_dzh, last - c)
                s1 = fma(factor, s_dz, s1)
                s2 = fma(factor, s_dzh, s2)
        store_one(room, K2 + i, total(s2))
        store_one(room, K3 + i, total(s1))
        n, g = following(p, n, g)
    k2 = (0.0 - r) * exact * load_first(room, K2, groups) / count
    store(room, K3, (0.0 - r) * load_first(room, K3, groups) / count - k2 * lost)
    store(room, K2, k2)
