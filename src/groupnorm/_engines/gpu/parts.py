"""What the parts of a slab tell each other, by way of L2: moments forward, sums backward.

Each part leaves its numbers in PARTIALS (slabs, 4, GROUPS, BLOCK), in the type of the arithmetic, and whoever needs
those of all parts reads them all: the same numbers in the same order, so that everybody finds the same.
"""

import triton
import triton.language as tl

from groupnorm._engines.gpu.tiles import lacking, two_sum

__all__ = ["merge_moments", "merge_sums", "publish_moments", "publish_sums"]


@triton.jit
def publish_moments(PARTIALS, slab, part, count, mean, low, m2, BLOCK: tl.constexpr):
    """Leave the moments of a part."""
    _publish(PARTIALS, slab, part, 0, count, BLOCK)
    _publish(PARTIALS, slab, part, 1, mean, BLOCK)
    _publish(PARTIALS, slab, part, 2, low, BLOCK)
    _publish(PARTIALS, slab, part, 3, m2, BLOCK)


@triton.jit
def publish_sums(PARTIALS, slab, part, count, s1, s2, s0, BLOCK: tl.constexpr):
    """Leave a part's count and its sums of dxhat, of dxhat*xhat, and of xhat."""
    _publish(PARTIALS, slab, part, 0, count, BLOCK)
    _publish(PARTIALS, slab, part, 1, s1, BLOCK)
    _publish(PARTIALS, slab, part, 2, s2, BLOCK)
    _publish(PARTIALS, slab, part, 3, s0, BLOCK)


@triton.jit
def merge_moments(PARTIALS, slab, parts, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Moments that all parts of a slab left, together: the same rule for all at once. Means are merged as distances
    from one of them, so that equal ones stay what they are.
    """
    count = _gather(PARTIALS, slab, parts, 0, GROUPS, BLOCK)
    mean = _gather(PARTIALS, slab, parts, 1, GROUPS, BLOCK)
    low = _gather(PARTIALS, slab, parts, 2, GROUPS, BLOCK)
    m2 = _gather(PARTIALS, slab, parts, 3, GROUPS, BLOCK)
    total = tl.sum(count, 1)
    share = 1.0 / tl.maximum(total, 1.0)
    pivot = tl.max(tl.where(count > 0, mean, float("-inf")), 1)
    pivot = tl.where(total > 0, pivot, 0.0)
    near = tl.where(count > 0, (mean - pivot[:, None]) + low, 0.0)
    beside = tl.sum(count * near, 1) * share
    d = tl.where(count > 0, near - beside[:, None], 0.0)
    merged, rest = two_sum(pivot, beside)
    return total, merged, rest, tl.sum(m2, 1) + tl.sum(count * d * d, 1)


@triton.jit
def merge_sums(PARTIALS, LOST, slab, parts, mean, rstd, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """The counts and sums that all parts of a slab left, together, added in the order of the parts; and, where there
    is a place LOST for it, by how much xhat is off because the mean is, which the sums are freed of.
    """
    count = tl.sum(_gather(PARTIALS, slab, parts, 0, GROUPS, BLOCK), 1)
    s1 = tl.sum(_gather(PARTIALS, slab, parts, 1, GROUPS, BLOCK), 1)
    s2 = tl.sum(_gather(PARTIALS, slab, parts, 2, GROUPS, BLOCK), 1)
    lost = tl.zeros_like(count)
    if LOST is not None:
        lost = lacking(tl.sum(_gather(PARTIALS, slab, parts, 3, GROUPS, BLOCK), 1), count, mean * rstd)
        s2 = s2 - lost * s1
    return count, s1, s2, lost


@triton.jit
def _publish(PARTIALS, slab, part, which: tl.constexpr, value, BLOCK: tl.constexpr):
    """Leave a number of each group where the other parts of the slab find it: PARTIALS (slabs, 4, GROUPS, BLOCK), in
    the type of the arithmetic.
    """
    GROUPS: tl.constexpr = value.shape[0]
    tl.store(PARTIALS + ((slab * 4 + which) * GROUPS + tl.arange(0, GROUPS)) * BLOCK + part, value)


@triton.jit
def _gather(PARTIALS, slab, parts, which: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """What all parts of a slab left, (GROUPS, BLOCK), 0 beyond them. Read from L2: a multiprocessor's own cache may
    hold what lay there before.
    """
    part = tl.arange(0, BLOCK)[None, :] + tl.zeros([GROUPS, 1], tl.int32)
    group = tl.arange(0, GROUPS)[:, None]
    at = PARTIALS + ((slab * 4 + which) * GROUPS + group) * BLOCK + part
    return tl.load(at, mask=part < parts, other=0.0, cache_modifier=".cg")
