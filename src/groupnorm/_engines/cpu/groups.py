"""What both layouts know about a group: its channels, its count, and how the sums of backward are closed."""

import numpy as np

from groupnorm._engines.cpu.compiler import jitted
from groupnorm._engines.cpu.memory import FLOAT64, load_first, load_one, one_lane, pointer, store_first, zeros
from groupnorm._engines.cpu.records import DZ, DZH, FROM_MOMENTS, H, channel_affine, sums_at
from groupnorm._engines.cpu.simd import LANES, fma, total
from groupnorm._engines.cpu.statistics import count_real

__all__ = ["backward_statistics", "close_sums", "given_statistics", "group_channels", "real_positions"]

ROUNDING = 2.0**-22  # four times what rounding a mean to float32 can lose


@jitted
def group_channels(p, g):
    """First channel of group g, and the one after its last."""
    return g * p.D, p.C if g == p.G - 1 else (g + 1) * p.D


@jitted
def real_positions(p, mask, n):
    """Positions of sample n that enter the statistics."""
    if mask is None:
        return np.float64(p.S)
    return count_real(mask, n * p.S, p.S)


@jitted
def given_statistics(p, a, mean, rstd, group):
    """The mean of a group for backward, what rounding it to its type lost, and rstd: as the caller gave them, or from
    the moments that an earlier launch left.
    """
    if p.stats == FROM_MOMENTS:
        moments = pointer(a.moments, FLOAT64)
        return backward_statistics(
            p, mean, load_one(moments, group * 3), load_one(moments, group * 3 + 1), load_one(moments, group * 3 + 2)
        )
    return np.float64(load_one(mean, group)), 0.0, np.float64(load_one(rstd, group))


@jitted
def backward_statistics(p, mean, count, exact, m2):
    """The same from a group's moments; `mean` is there for its type."""
    m = np.float64(one_lane(mean, exact))
    return m, exact - m, 1.0 / np.sqrt(m2 / max(count, 1.0) + p.eps)


@jitted
def close_sums(p, a, x, mask, n, g, m, r):
    """From the sums of dz, dz*h and h of a group's channels to those of dz*xhat, in place, and to k2 and k3 of equation
    (14), dx = dz*k1 + h*k2 + k3, where h = (x - m)*r.

    The mean at hand, m, is rounded to its type, an error of up to |m|*2^-24 that rstd magnifies; the sum of h tells
    what was lost, and r in lane precision is off by the factor `exact`, so that xhat is (h - lost)*exact. A mean that
    is off by more than ROUNDING was given by the caller as something else than the mean of x, and stays as it is.
    """
    sums = pointer(a.sums, FLOAT64)
    first, last = group_channels(p, g)
    count = max(real_positions(p, mask, n) * (last - first), 1.0)
    lane_r = np.float64(one_lane(x, r))
    exact = r / lane_r if 0.0 < lane_r < np.inf else 1.0
    s_h = zeros(sums)
    for part in range(p.parts):
        for c in range(first, last, LANES):
            s_h += load_first(sums, sums_at(p, n, part, H) + c, last - c)
    lost = total(s_h) / count
    if abs(lost) > ROUNDING * abs(m) * r:
        lost = 0.0
    s1 = s2 = zeros(sums)
    for c in range(first, last, LANES):
        factor, _ = channel_affine(p, a, n, c, last - c)
        for part in range(p.parts):
            s_dz = load_first(sums, sums_at(p, n, part, DZ) + c, last - c)
            s_dzh = (load_first(sums, sums_at(p, n, part, DZH) + c, last - c) - lost * s_dz) * exact
            store_first(sums, sums_at(p, n, part, DZH) + c, s_dzh, last - c)
            s1 = fma(factor, s_dz, s1)
            s2 = fma(factor, s_dzh, s2)
    k2 = -r * exact * total(s2) / count
    return k2, -r * total(s1) / count - k2 * lost
