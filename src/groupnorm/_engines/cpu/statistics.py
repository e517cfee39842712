"""Moments of runs of elements: the arithmetic behind every mean and variance of the CPU engine.

A unit (some thousand elements of a group) is summed as d = x - m and d*d, with the mean of its first sixteen elements
as the pivot m; its mean is m + sum(d)/count and its M2 is sum(d*d) - sum(d)^2/count. That subtraction loses digits if m
is far from the mean u, since sum(d*d) = M2 + count*(u - m)^2: where (u - m)^2 is more than FAR variances (less for few
elements), as where data trends or begins with an outlier, the unit is read again with its mean as the pivot. A constant
unit comes out exact. Lanes are float32 (float64 for float64 data) over a chunk, 16 elements to a lane, and float64
beyond; units are merged in float64 by Chan's rule, as offsets from the first pivot, so that rounding goes with the
spread of the data and not with its mean. Few elements are summed in float64 from the start: then every pivot is good.
"""

import numpy as np

from groupnorm._engines.cpu.compiler import inlined, jitted
from groupnorm._engines.cpu.memory import element_size, load, load_first, load_one, one_lane, zeros
from groupnorm._engines.cpu.simd import LANES, first_lanes, fma, maximum, minimum, select, total, widen

__all__ = [
    "FEW",
    "count_real",
    "far",
    "few_moments",
    "fewer",
    "is_far",
    "is_real",
    "merge",
    "moments_by_element",
    "out_of_range",
    "run_moments",
]

# (mean - pivot)^2 in variances up to which a pivot is good, if there are many elements, whose roundings average out
FAR = 16.0
FEW = 32 * LANES  # elements up to which wide lanes cost less than to look after a pivot


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


@inlined
def far(x, count):
    """The limit of `is_far` for so many elements of x's type: FAR for many, less for few, whose roundings do not cancel
    (600 of which the first 8 are 6 std away had 1.1 times the promised error with 9 variances). Sums of float64 have no
    wider type to go to, so there a pivot must be near: of normal data one unit in twenty is read again.
    """
    return minimum(1.0 + count / 256, 0.25 if element_size(x) == 8 else FAR)


@inlined
def is_far(offset, m2, count, limit):
    """Whether a pivot is too far from the mean, which lies `offset` beside it: more than `limit` variances."""
    return offset * offset * count > m2 * limit


@inlined
def fewer(x, elements):
    """How many elements a lane takes in a second reading. A far pivot tells of outliers: beside the square of one of
    1e5 std a float32 lane loses what it adds afterwards, 5 roundings with 16 elements and none with 4. In float64 it
    is the number of additions altogether that counts.
    """
    return elements if element_size(x) == 8 else maximum(elements // 4, 1)


@jitted
def run_moments(x, mask, at, mask_at, rows, length, step, chunk_rows, chunk):
    """Moments of `rows` runs of `length` elements, `step` apart; the same run of the mask holds for every row. Lanes
    run over `chunk` elements of `chunk_rows` rows.
    """
    count = np.float64(rows * length)
    if mask is not None:
        count = rows * count_real(mask, mask_at, length)
    if count == 0.0:
        return 0.0, 0.0, 0.0, 0.0
    if mask is None:
        pivot = one_lane(x, _first_pivot(x, at, length))
    else:
        pivot = one_lane(x, _first_real_pivot(x, mask, at, mask_at, length))
    offset = m2 = 0.0
    for _ in range(2):
        s = q = widen(zeros(x))
        for r in range(0, rows, chunk_rows):
            for i in range(0, length, chunk):
                s_chunk, q_chunk = _chunk_sums(x, mask, at + r * step + i, mask_at + i, minimum(chunk_rows, rows - r),
                                               minimum(chunk, length - i), step, pivot)  # fmt: skip
                s += widen(s_chunk)
                q += widen(q_chunk)
        sum_d = total(s)
        offset = sum_d / count
        m2 = maximum(total(q) - offset * sum_d, 0.0)
        if not is_far(offset, m2, count, far(x, count)):
            break
        pivot = one_lane(x, np.float64(pivot) + offset)
        chunk, chunk_rows = fewer(x, chunk), fewer(x, chunk_rows)
    return count, np.float64(pivot), offset, m2


@inlined
def _first_pivot(x, at, length):
    """The mean of the first sixteen elements of a run; of a shorter one of the first 8, 4, 2 or 1. Roundings of the
    sums grow by what a pivot is off the mean: one normal number is off by a standard deviation, sixteen by a quarter,
    and with one the promise about y was broken (1.5 times its bound in 60 draws of 1030 elements, 0.6 with sixteen).
    A power of two of equal numbers has exactly their value as its mean.
    """
    lanes = LANES
    while lanes > length:
        lanes //= 2
    return total(widen(load_first(x, at, lanes)) * (1.0 / lanes))


@inlined
def _first_real_pivot(x, mask, at, mask_at, length):
    """The same of those of the first sixteen that are real; 0 if none is. The sum of equal numbers of 16 or 32 bits is
    exact in float64, and so is its share; of float64 the second reading takes off what was rounded.
    """
    lanes = minimum(length, LANES)
    real = load_first(mask, mask_at, lanes)
    count = total(real)
    if count == 0.0:
        return 0.0
    return total(select(real, widen(load_first(x, at, lanes)) * 0.0625, 0.0)) / (0.0625 * count)


@inlined
def few_moments(x, at, rows, length, step):
    """Moments of `rows` runs of `length` elements, `step` apart, that are few altogether and of 16 or 32 bits: in
    float64 lanes no pivot can be far.
    """
    pivot = np.float64(load_one(x, at))
    s = q = widen(zeros(x))
    whole = length // LANES * LANES
    for r in range(rows):
        first = at + r * step
        for i in range(0, whole, LANES):
            d = widen(load(x, first + i)) - pivot
            s += d
            q = fma(d, d, q)
        if whole < length:
            rest = length - whole
            d = select(first_lanes(rest), widen(load_first(x, first + whole, rest)) - pivot, 0.0)
            s += d
            q = fma(d, d, q)
    count, sum_d = np.float64(rows * length), total(s)
    offset = sum_d / count
    return count, pivot, offset, maximum(total(q) - offset * sum_d, 0.0)


@jitted
def _chunk_sums(x, mask, at, mask_at, rows, length, step, m):
    """The sums of d = x - m and of d*d over some runs, as vectors."""
    s0 = s1 = s2 = s3 = q0 = q1 = q2 = q3 = zeros(x)
    for r in range(rows):
        first = at + r * step
        done = 0
        if mask is None:
            while done + 4 * LANES <= length:
                j = first + done
                d0 = load(x, j) - m
                d1 = load(x, j + LANES) - m
                d2 = load(x, j + 2 * LANES) - m
                d3 = load(x, j + 3 * LANES) - m
                s0 += d0
                s1 += d1
                s2 += d2
                s3 += d3
                q0 = fma(d0, d0, q0)
                q1 = fma(d1, d1, q1)
                q2 = fma(d2, d2, q2)
                q3 = fma(d3, d3, q3)
                done += 4 * LANES
        while done < length:
            real = first_lanes(length - done)
            if mask is not None:
                real = load_first(mask, mask_at + done, length - done)
            d = select(real, load_first(x, first + done, length - done) - m, 0.0)
            s0 += d
            q0 = fma(d, d, q0)
            done += LANES
    return (s0 + s1) + (s2 + s3), (q0 + q1) + (q2 + q3)


@jitted
def count_real(mask, at, length):
    """How many positions of a run are real."""
    count = 0.0
    for i in range(0, length, LANES):
        count += total(load_first(mask, at + i, length - i))
    return count


@inlined
def out_of_range(x, m2, count, eps):
    """Whether squares may have left float32's range on the way to these moments: beyond 3e38 (then m2 is infinite or
    NaN), or so small that what was lost below 1e-45 shows in var + eps.
    """
    if element_size(x) == 8:  # there is no wider type to turn to, but infinity is better than infinity - infinity
        return np.isnan(m2)
    return not m2 < np.inf or m2 + eps * count < 1e-34 * count


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
    return count, mean, s2 / count, q if q == np.inf else maximum(q - s2 * s2 / count, 0.0)


@jitted
def is_real(mask, at):
    """Whether a position takes part."""
    if mask is None:
        return True
    return load_one(mask, at)
