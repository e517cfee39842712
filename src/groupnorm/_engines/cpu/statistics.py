"""Moments of runs of elements: the arithmetic behind every mean and variance of the CPU engine.

A chunk is summed as d = x - m and d*d, with a pivot m near its mean; its mean is m + sum(d)/count and its M2 is
sum(d*d) - sum(d)^2/count. The first chunk of a unit is read twice while it is in the L1 cache, once for its pivot; each
later chunk takes the mean of the chunk before, unless that one had fewer elements. That costs no accuracy: with chunk
means u[i] around the mean u of all, (u[i-1] - u[i])^2 <= 2 (u[i-1] - u)^2 + 2 (u[i] - u)^2, and those squares, weighted
by counts, are part of M2 itself, so that the sums of d*d together are at most 5 times M2. A constant chunk comes out
exact. Lanes are float32 (float64 for float64 data) over at most a few thousand elements; chunks are merged in float64
by Chan's rule, as offsets from the first pivot, so that rounding goes with the spread of the data and not with its
mean.
"""

import numpy as np

from groupnorm._engines.cpu.compiler import jitted
from groupnorm._engines.cpu.memory import element_size, load, load_first, load_one, one_lane, zeros
from groupnorm._engines.cpu.simd import LANES, first_lanes, fma, select, total

__all__ = ["chunk_moments", "count_real", "is_real", "merge", "moments_by_element", "out_of_range"]


@jitted
def merge(a, b):
    """Moments (count, pivot, offset, m2) of two pieces together, as an offset from a's pivot; mean = pivot + offset."""
    count, pivot, offset, m2 = a
    count_b, pivot_b, offset_b, m2_b = b
    if count == 0.0:
        return b
    if count_b == 0.0:
        return a
    delta = (pivot_b - pivot) + offset_b - offset
    fraction = count_b / (count + count_b)
    return count + count_b, pivot, offset + delta * fraction, m2 + m2_b + delta * delta * count * fraction


@jitted
def chunk_moments(x, mask, at, mask_at, rows, length, step, before):
    """Moments of `rows` runs of `length` elements, `step` apart; the same run of the mask holds for every row.

    `before` is the chunk before this one, whose mean is the pivot if it has as many elements; a count of 0 if there is
    none.
    """
    count = np.float64(rows * length)
    if mask is not None:
        count = rows * count_real(mask, mask_at, length)
        if count == 0.0:
            return 0.0, 0.0, 0.0, 0.0
    if before[0] >= count:
        pivot = one_lane(x, before[1] + before[2])
    else:
        s = zeros(x)
        for r in range(rows):
            s += _sum(x, mask, at + r * step, mask_at, length)
        pivot = one_lane(x, total(s) / count)
    s = q = zeros(x)
    for r in range(rows):
        s_run, q_run = _deviations(x, mask, at + r * step, mask_at, length, pivot)
        s += s_run
        q += q_run
    offset = total(s) / count
    return count, np.float64(pivot), offset, max(total(q) - offset * offset * count, 0.0)


@jitted
def _sum(x, mask, at, mask_at, length):
    """The sum of a run, as a vector."""
    s0 = s1 = s2 = s3 = zeros(x)
    done = 0
    if mask is None:
        for i in range(length // (4 * LANES)):
            j = at + i * 4 * LANES
            s0 += load(x, j)
            s1 += load(x, j + LANES)
            s2 += load(x, j + 2 * LANES)
            s3 += load(x, j + 3 * LANES)
        done = length // (4 * LANES) * (4 * LANES)
    while done < length:
        v = load_first(x, at + done, length - done)
        if mask is not None:
            v = select(load_first(mask, mask_at + done, length - done), v, 0.0)
        s0 += v
        done += LANES
    return (s0 + s1) + (s2 + s3)


@jitted
def _deviations(x, mask, at, mask_at, length, m):
    """The sums of d = x - m and of d*d over a run, as vectors."""
    s0 = s1 = q0 = q1 = q2 = q3 = zeros(x)
    done = 0
    if mask is None:
        for i in range(length // (4 * LANES)):
            j = at + i * 4 * LANES
            d0 = load(x, j) - m
            d1 = load(x, j + LANES) - m
            d2 = load(x, j + 2 * LANES) - m
            d3 = load(x, j + 3 * LANES) - m
            s0 += d0
            s1 += d1
            s0 += d2
            s1 += d3
            q0 = fma(d0, d0, q0)
            q1 = fma(d1, d1, q1)
            q2 = fma(d2, d2, q2)
            q3 = fma(d3, d3, q3)
        done = length // (4 * LANES) * (4 * LANES)
    while done < length:
        real = first_lanes(length - done)
        if mask is not None:
            real = load_first(mask, mask_at + done, length - done)
        d = select(real, load_first(x, at + done, length - done) - m, 0.0)
        s0 += d
        q0 = fma(d, d, q0)
        done += LANES
    return s0 + s1, (q0 + q1) + (q2 + q3)


@jitted
def count_real(mask, at, length):
    """How many positions of a run are real."""
    count = 0.0
    for i in range(0, length, LANES):
        count += total(load_first(mask, at + i, length - i))
    return count


@jitted
def out_of_range(x, m2, count, eps):
    """Whether squares may have left float32's range on the way to these moments: beyond 3e38 (then m2 is infinite or
    NaN), or so small that what was lost below 1e-45 shows in var + eps.
    """
    if element_size(x) == 8:  # there is no wider type to turn to, but infinity is better than infinity - infinity
        return np.isnan(m2)
    return not m2 < np.inf or m2 / max(count, 1.0) + eps < 1e-34


@jitted
def moments_by_element(x, mask, at, mask_at, rows, step, length, stride):
    """Moments of rows x length elements (`step` and `stride` apart) in float64, one by one: slow, for any finite
    values.

    The mask, if any, goes with the inner index.
    """
    count = s = s2 = q = 0.0
    for r in range(rows):
        for i in range(length):
            if is_real(mask, mask_at + i):
                count += 1.0
                s += np.float64(load_one(x, at + r * step + i * stride))
    if count == 0.0:
        return 0.0, 0.0, 0.0, 0.0
    mean = s / count
    for r in range(rows):
        for i in range(length):
            if is_real(mask, mask_at + i):
                d = np.float64(load_one(x, at + r * step + i * stride)) - mean
                s2 += d
                q += d * d
    return count, mean, s2 / count, q if q == np.inf else max(q - s2 * s2 / count, 0.0)


@jitted
def is_real(mask, at):
    """Whether a position takes part."""
    if mask is None:
        return True
    return load_one(mask, at)
