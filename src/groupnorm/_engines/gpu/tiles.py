"""The tile: what a program holds on chip, the same for both layouts.

A tile is a block [ROWS, COLS] of the data of one sample. What a row is depends on the LAYOUT:

    "first"   channels first: a row is a channel, a column a position; a row's columns are neighbours in memory
    "flat"    channels first: a row is a whole group, its D*S elements neighbours in memory; the channel changes on the
              way. It loads 16 bytes at once where S is no multiple of them, but has no sums by channel
    "last"    channels last: a row is a channel, a column a position; a column's rows are neighbours in memory

A *slab* is P whole groups of one sample, the unit in which groups are taken up. It has PER_GROUP rows for each group, D
or, flat, 1. A slab that fits a tile is done by one program (`resident.py`); a larger one is cut into *parts*, and
statistics of parts merge exactly.

Blocks with one number for each row have the shape (ROWS,), those with one for each group (GROUPS,). ROWS, COLS and
GROUPS are powers of two; what lies beyond the slab is never loaded, stored or counted. N, C, S, G, D as everywhere. The
arithmetic is float32, or float64 for float64.

Statistics of a tile are taken twice from registers (equations (1) to (3) of `groupnorm.reference`): a first mean, then
the sums of d = x - mean and of d*d. The sum of d corrects the mean: a constant group has xhat = 0 exactly, and a mean
is known as a sum of two numbers, `mean + low`, to twice the digits of the arithmetic. Merged in the same way, it is as
good as in float64, which many GPUs have 1/64 of the speed for. Moments are (count, mean, low, M2) here.
"""

import triton
import triton.language as tl

from groupnorm._engines.gpu.epilogue import activate, gain_and_offset, slope

__all__ = [
    "finish", "finish_gradient", "held_moments", "held_rest", "held_sums", "lacking", "load_tile", "merge", "place",
    "read_statistics", "rstd_of", "slab_groups", "start_gradient", "two_sum", "without", "write_row_sums",
    "write_statistics",
]  # fmt: skip


# ---- where a tile lies -----------------------------------------------------------------------------------------------


@triton.jit
def place(slab, part, across, inner, tiles, MASK, S, C: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
          ROWS: tl.constexpr, COLS: tl.constexpr, LAYOUT: tl.constexpr):  # fmt: skip
    """Everything about where a tile is: the `inner`-th tile of a part of `tiles` tiles. Parts lie side by side,
    `across` of them, and below one another, ROWS rows each.

    Gives: sample; first group and first channel; how many rows and columns of the slab there are from there on; where
    the tile begins in memory (int64: a tensor may have more than 2^31 elements) and the steps to each of its elements
    (int32: a tile has fewer); which elements belong to the slab, and which enter the statistics (MASK).
    """
    SLABS: tl.constexpr = (G + P - 1) // P
    D: tl.constexpr = C // G
    n = slab // SLABS
    group = (slab % SLABS) * P
    groups = tl.minimum(P, G - group)
    row = tl.arange(0, ROWS)[:, None]
    beside = tl.arange(0, COLS)[None, :]
    sample = tl.cast(n, tl.int64) * C * S
    if LAYOUT == "flat":
        channel = group * D
        rows = groups
        cols = D * S
        at = sample + tl.cast(channel, tl.int64) * S
        steps = row * (D * S) + beside
        position = beside % S
    else:
        first = (part // across) * ROWS
        col = ((part % across) * tiles + inner) * COLS
        channel = group * D + first
        rows = groups * D - first
        cols = S - col
        position = col + beside
        if LAYOUT == "last":
            at = sample + tl.cast(col, tl.int64) * C + channel
            steps = row + beside * C
        else:
            at = sample + tl.cast(channel, tl.int64) * S + col
            steps = row * S + beside
    inside = (row < rows) & (beside < cols)
    real = inside
    if MASK is not None:
        real = inside & (tl.load(MASK + tl.cast(n, tl.int64) * S + position, mask=position < S, other=0) != 0)
    return n, group, channel, rows, cols, at, steps, inside, real


@triton.jit
def load_tile(X, at, steps, real, EVICTION: tl.constexpr):
    """A tile of X in the type of the arithmetic, 0 where it is not real."""
    ACC: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    return tl.load(X + at + steps, mask=real, other=0.0, eviction_policy=EVICTION).to(ACC)


@triton.jit
def _store_tile(Y, at, steps, value, inside, real, MASK):
    """Write a tile, rounded to Y's type; with a mask 0 goes where that is False."""
    if MASK is not None:
        value = tl.where(real, value, 0.0)
    tl.store(Y + at + steps, value.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _row_parameters(WEIGHT, BIAS, SCALE, SHIFT, n, channel, inside, S, ACC: tl.constexpr, C: tl.constexpr,
                    D: tl.constexpr, LAYOUT: tl.constexpr):  # fmt: skip
    """Gain and offset of each row, (ROWS, 1); flat, where the channel changes along a row, of each element."""
    row = tl.arange(0, inside.shape[0])[:, None]
    if LAYOUT == "flat":
        spot = channel + row * D + tl.arange(0, inside.shape[1])[None, :] // S
        return gain_and_offset(WEIGHT, BIAS, SCALE, SHIFT, n, spot, inside, C, ACC)
    else:
        spot = channel + row
        return gain_and_offset(WEIGHT, BIAS, SCALE, SHIFT, n, spot, spot < C, C, ACC)


# ---- rows and groups -------------------------------------------------------------------------------------------------


@triton.jit
def _to_groups(value, PER_GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Sums over the PER_GROUP rows of each group: (ROWS,) to (GROUPS,). Rows outside must hold 0."""
    ROWS: tl.constexpr = value.shape[0]
    if GROUPS == 1:
        return tl.zeros([1], value.dtype) + tl.sum(value, 0)  # a reshape makes Triton 3.6 hold 16 copies of a tile
    elif PER_GROUP == 1:
        return value
    elif GROUPS * PER_GROUP == ROWS:
        return tl.sum(tl.reshape(value, [GROUPS, PER_GROUP]), 1)
    else:  # rows of a group are no power of two: each group looks at all rows and takes its own
        group = tl.arange(0, ROWS)[None, :] // PER_GROUP
        return tl.sum(tl.where(group == tl.arange(0, GROUPS)[:, None], value[None, :], 0.0), 1)


@triton.jit
def _to_rows(value, PER_GROUP: tl.constexpr, ROWS: tl.constexpr):
    """The number of each row's group, (GROUPS,) to (ROWS, 1); to a scalar if there is one group."""
    GROUPS: tl.constexpr = value.shape[0]
    if GROUPS == 1:
        return tl.sum(value, 0)  # a block (1, 1) goes through shared memory, as a whole tile, in Triton 3.6
    elif PER_GROUP == 1:
        return value[:, None]
    else:
        group = tl.minimum(tl.arange(0, ROWS) // PER_GROUP, GROUPS - 1)
        return tl.gather(value, group, 0)[:, None]


@triton.jit
def slab_groups(n, group, G: tl.constexpr, P: tl.constexpr, GROUPS: tl.constexpr):
    """Where the numbers of a slab's groups lie in an array (N, G), and which of them exist."""
    i = tl.arange(0, GROUPS)
    return n * G + group + i, (i < P) & (group + i < G)


# ---- statistics ------------------------------------------------------------------------------------------------------


@triton.jit
def _counts(real, rows, cols, MASK, ACC: tl.constexpr, PER_GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """How many elements of each group are real in a tile; looked at one by one only if there is a mask."""
    if MASK is not None:
        return _to_groups(tl.sum(real.to(ACC), 1), PER_GROUP, GROUPS)
    else:
        across = tl.maximum(tl.minimum(cols, real.shape[1]), 0).to(ACC)
        return _to_groups(tl.where(tl.arange(0, real.shape[0]) < rows, across, 0.0), PER_GROUP, GROUPS)


@triton.jit
def two_sum(a, b):
    """a + b, and what rounding takes from it (Knuth, The Art of Computer Programming, vol. 2, 4.2.2)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


@triton.jit
def held_moments(x, real, rows, cols, MASK, PER_GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Moments of each group's part of a tile, 0 where it has none."""
    count = _counts(real, rows, cols, MASK, x.dtype, PER_GROUP, GROUPS)
    share = 1.0 / tl.maximum(count, 1.0)
    start = _to_groups(tl.sum(x, 1), PER_GROUP, GROUPS) * share
    d = tl.where(real, x - _to_rows(start, PER_GROUP, x.shape[0]), 0.0)
    # Of equal elements d is a step of rounding, and must be the mean of d exactly: divided, by Markstein's step, since
    # a division takes registers that a full tile needs.
    total = _to_groups(tl.sum(d, 1), PER_GROUP, GROUPS)
    beside = total * share
    beside = tl.fma(tl.fma(-beside, count, total), share, beside)
    m2 = _to_groups(tl.sum(d * d, 1), PER_GROUP, GROUPS) - count * beside * beside
    mean, low = two_sum(start, beside)
    return count, mean, low, tl.where(m2 < 0, 0.0, m2)


@triton.jit
def held_rest(x, mean, real, rows, cols, MASK, PER_GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """What a mean that the caller gave lacks, of a tile that is a whole slab."""
    d = tl.where(real, x - _to_rows(mean, PER_GROUP, x.shape[0]), 0.0)
    count = _counts(real, rows, cols, MASK, x.dtype, PER_GROUP, GROUPS)
    return lacking(_to_groups(tl.sum(d, 1), PER_GROUP, GROUPS), count, mean)


@triton.jit
def merge(count, mean, low, m2, other_count, other_mean, other_low, other_m2):
    """Moments of two pieces together: Chan's rule. Equal means stay what they are."""
    total = count + other_count
    both = (count > 0) & (other_count > 0)
    delta = tl.where(both, (other_mean - mean) + (other_low - low), 0.0)
    share = other_count / tl.maximum(total, 1.0)
    start = tl.where(count > 0, mean, other_mean)
    merged, rest = two_sum(start, tl.where(count > 0, low, other_low) + delta * share)
    return total, merged, rest, m2 + other_m2 + delta * delta * count * share


@triton.jit
def rstd_of(count, m2, EPS: tl.constexpr):
    """1/sqrt(var + eps) of groups: equation (4)."""
    var = m2 / tl.maximum(count, 1.0) + EPS
    if m2.dtype == tl.float64:
        return 1.0 / tl.sqrt(var)
    else:
        return tl.div_rn(tl.full(var.shape, 1.0, tl.float32), tl.sqrt_rn(var))  # the plain ones are off by 2 roundings


@triton.jit
def write_statistics(MEAN, RSTD, LOW, MOMENTS, at, exists, count, mean, low, m2, rstd):
    """Store what the call wants of groups' statistics. LOW is what MEAN lacks."""
    if MEAN is not None:
        tl.store(MEAN + at, mean, mask=exists)
        tl.store(RSTD + at, rstd, mask=exists)
    if LOW is not None:
        tl.store(LOW + at, low, mask=exists)
    if MOMENTS is not None:
        tl.store(MOMENTS + at * 3, count.to(tl.float64), mask=exists)
        tl.store(MOMENTS + at * 3 + 1, mean.to(tl.float64) + low.to(tl.float64), mask=exists)
        tl.store(MOMENTS + at * 3 + 2, m2.to(tl.float64), mask=exists)


@triton.jit
def read_statistics(MEAN, RSTD, LOW, at, exists):
    """Mean, what it lacks, and rstd of a slab's groups, 0 where there is no group."""
    mean = tl.load(MEAN + at, mask=exists, other=0.0)
    low = tl.zeros_like(mean)
    if LOW is not None:
        low = tl.load(LOW + at, mask=exists, other=0.0)
    return mean, low, tl.load(RSTD + at, mask=exists, other=0.0)


@triton.jit
def lacking(total, count, mean):
    """What a mean that the caller gave lacks, rounded as it is to its type: `total` is the sum of x - mean (or of xhat,
    then `mean` is mean*rstd). One that is off by four roundings was meant as something else, and stays as it is.
    """
    ROUNDING: tl.constexpr = 2.0**-51 if mean.dtype == tl.float64 else 2.0**-22
    lost = total / tl.maximum(count, 1.0)
    return tl.where(tl.abs(lost) <= tl.abs(mean) * ROUNDING, lost, 0.0)


# ---- forward and backward of a tile ----------------------------------------------------------------------------------


@triton.jit
def _normalize(x, mean, low, rstd, PER_GROUP: tl.constexpr):
    """xhat of a tile: equation (5). x - mean is exact where it matters, near the mean; `low` is beside it."""
    ROWS: tl.constexpr = x.shape[0]
    centred = (x - _to_rows(mean, PER_GROUP, ROWS)) - _to_rows(low, PER_GROUP, ROWS)
    return centred * _to_rows(rstd, PER_GROUP, ROWS)


@triton.jit
def without(xhat, lost, LOST, PER_GROUP: tl.constexpr):
    """xhat of a tile without what its groups' means lacked."""
    if LOST is not None:
        xhat = xhat - _to_rows(lost, PER_GROUP, xhat.shape[0])
    return xhat


@triton.jit
def finish(x, mean, low, rstd, Y, WEIGHT, BIAS, SCALE, SHIFT, RESIDUAL, MASK, n, channel, at, steps, inside, real, S,
           C: tl.constexpr, G: tl.constexpr, LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """Store y of a tile that is held, from its groups' statistics: equations (5) to (8)."""
    D: tl.constexpr = C // G
    gain, offset = _row_parameters(WEIGHT, BIAS, SCALE, SHIFT, n, channel, inside, S, x.dtype, C, D, LAYOUT)
    z = _normalize(x, mean, low, rstd, 1 if LAYOUT == "flat" else D) * gain + offset
    if RESIDUAL is not None:
        z = z + load_tile(RESIDUAL, at, steps, real, "evict_first")
    _store_tile(Y, at, steps, activate(z, ACTIVATION), inside, real, MASK)


@triton.jit
def start_gradient(x, dy, mean, low, rstd, WEIGHT, BIAS, SCALE, SHIFT, RESIDUAL, n, channel, at, steps, inside, real, S,
                   C: tl.constexpr, G: tl.constexpr, LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """xhat, dz and the rows' gain of a tile that is held; xhat and dz are 0 where it is not real. z, of which the
    activation's slope is taken, is computed again.
    """
    D: tl.constexpr = C // G
    gain, offset = _row_parameters(WEIGHT, BIAS, SCALE, SHIFT, n, channel, inside, S, x.dtype, C, D, LAYOUT)
    xhat = _normalize(x, mean, low, rstd, 1 if LAYOUT == "flat" else D)
    dz = dy
    if ACTIVATION is not None:
        z = xhat * gain + offset
        if RESIDUAL is not None:
            z = z + load_tile(RESIDUAL, at, steps, real, "")
        dz = tl.where(real, dy * slope(z, ACTIVATION), 0.0)
    return tl.where(real, xhat, 0.0), dz, gain


@triton.jit
def held_sums(dz, xhat, gain, real, rows, cols, MASK, LOST, PER_GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Of each group's part of a tile the count and the sums of dxhat = dz*gain, of dxhat*xhat and, where LOST wants it,
    of xhat; of each row the sums of dz and of dz*xhat, from which those of dxhat are made. (Flat, the sums by row are
    those of dxhat, which nobody wants.)
    """
    count = _counts(real, rows, cols, MASK, dz.dtype, PER_GROUP, GROUPS)
    s0 = tl.zeros_like(count)
    if LOST is not None:
        s0 = _to_groups(tl.sum(xhat, 1), PER_GROUP, GROUPS)
    if gain.shape[1] == 1:
        a, b = tl.sum(dz, 1), tl.sum(dz * xhat, 1)
        # Rows beyond the slab have the next one's gain, which may be infinite or NaN and must not get in.
        of_row = tl.where(tl.arange(0, dz.shape[0]) < rows, tl.sum(gain, 1), 0.0)
        s1, s2 = _to_groups(a * of_row, PER_GROUP, GROUPS), _to_groups(b * of_row, PER_GROUP, GROUPS)
    else:
        d = dz * gain
        a, b = tl.sum(d, 1), tl.sum(d * xhat, 1)
        s1, s2 = _to_groups(a, PER_GROUP, GROUPS), _to_groups(b, PER_GROUP, GROUPS)
    return count, s1, s2, s0, a, b


@triton.jit
def write_row_sums(SUMS, n, across, parts_across, channel, rows, a, b, N, C: tl.constexpr):
    """Store the sums of dz and of dz*xhat over the columns of a part, for each of its channels: SUMS (2, N,
    parts_across, C), of which `parameters.py` makes the gradients of the parameters.
    """
    row = tl.arange(0, a.shape[0])
    at = SUMS + (tl.cast(n, tl.int64) * parts_across + across) * C + channel + row
    tl.store(at, a, mask=row < rows)
    tl.store(at + tl.cast(N, tl.int64) * parts_across * C, b, mask=row < rows)


@triton.jit
def finish_gradient(xhat, dz, gain, rstd, count, s1, s2, DX, DRESIDUAL, MASK, at, steps, inside, real,
                    PER_GROUP: tl.constexpr):  # fmt: skip
    """Store dx and dresidual of a tile that is held, from its groups' count and the sums of dxhat and dxhat*xhat:
    equation (14).
    """
    share = 1.0 / tl.maximum(count, 1.0)
    ROWS: tl.constexpr = dz.shape[0]
    inner = dz * gain - _to_rows(s1 * share, PER_GROUP, ROWS) - xhat * _to_rows(s2 * share, PER_GROUP, ROWS)
    _store_tile(DX, at, steps, _to_rows(rstd, PER_GROUP, ROWS) * inner, inside, real, MASK)
    if DRESIDUAL is not None:
        _store_tile(DRESIDUAL, at, steps, dz, inside, real, MASK)
