"""Two passes: statistics of everything, then results of everything, in the reverse order.

For slabs too large for L2, and for what needs one pass only: moments alone, or results from given statistics. The
data's way: memory, L2, registers; the moments of a part to L2, where the last program of a slab merges them; then, from
the end backwards, since the end is what L2 still holds, memory, L2, registers; L2, memory. 3 units forward, 5 backward,
less what L2 held. Nobody waits: the second launch begins when the first one is done.
"""

import triton.language as tl

from groupnorm._engines.gpu.compiler import kernel
from groupnorm._engines.gpu.parts import merge_moments, merge_sums, publish_moments, publish_sums
from groupnorm._engines.gpu.sync import arrive
from groupnorm._engines.gpu.tiles import (
    finish,
    finish_gradient,
    held_moments,
    held_sums,
    load_tile,
    merge,
    place,
    read_statistics,
    rstd_of,
    slab_groups,
    start_gradient,
    without,
    write_row_sums,
    write_statistics,
)

__all__ = ["apply_forward", "apply_gradient", "moments_of_slabs", "sums_of_slabs"]


@kernel
def moments_of_slabs(
    X, MASK, MEAN, RSTD, LOW, MOMENTS, PARTIALS, COUNTERS, parts, across, tiles, VECTORS,
    VECTOR: tl.constexpr, C: tl.constexpr, G: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, LAYOUT: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Statistics: program i takes a part of `tiles` tiles, the last one of a slab merges. COUNTERS: one a slab."""
    PER_GROUP: tl.constexpr = C // G
    S = VECTORS * VECTOR
    slab, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    n, group, channel, rows, cols, at, steps, inside, real = place(
        slab, part, across, 0, tiles, MASK, S, C, G, P, ROWS, COLS, LAYOUT
    )
    x = load_tile(X, at, steps, real, "")
    count, mean, low, m2 = held_moments(x, real, rows, cols, MASK, PER_GROUP, GROUPS)
    for inner in range(1, tiles):
        n, group, channel, rows, cols, at, steps, inside, real = place(
            slab, part, across, inner, tiles, MASK, S, C, G, P, ROWS, COLS, LAYOUT
        )
        x = load_tile(X, at, steps, real, "")
        other_count, other_mean, other_low, other_m2 = held_moments(x, real, rows, cols, MASK, PER_GROUP, GROUPS)
        count, mean, low, m2 = merge(count, mean, low, m2, other_count, other_mean, other_low, other_m2)
    publish_moments(PARTIALS, slab, part, count, mean, low, m2, BLOCK)
    if arrive(COUNTERS + slab) == parts - 1:
        count, mean, low, m2 = merge_moments(PARTIALS, slab, parts, GROUPS, BLOCK)
        spot, exists = slab_groups(n, group, G, P, GROUPS)
        rstd = rstd_of(count, m2, EPS)
        write_statistics(MEAN, RSTD, LOW, MOMENTS, spot, exists, count, mean, low, m2, rstd)
        tl.store(COUNTERS + slab, 0)


@kernel
def apply_forward(
    X, Y, WEIGHT, BIAS, SCALE, SHIFT, RESIDUAL, MASK, MEAN, RSTD, LOW, MOMENTS, parts, across, VECTORS,
    VECTOR: tl.constexpr, C: tl.constexpr, G: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    GROUPS: tl.constexpr, LAYOUT: tl.constexpr, EPS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y from known statistics, MEAN and RSTD or else MOMENTS: program i takes the i-th tile from the end."""
    S = VECTORS * VECTOR
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    n, group, channel, rows, cols, at, steps, inside, real = place(
        tile // parts, tile % parts, across, 0, 1, MASK, S, C, G, P, ROWS, COLS, LAYOUT
    )
    x = load_tile(X, at, steps, real, "evict_first")
    spot, exists = slab_groups(n, group, G, P, GROUPS)
    if MEAN is not None:
        mean, low, rstd = read_statistics(MEAN, RSTD, LOW, spot, exists)
    else:
        count = tl.load(MOMENTS + spot * 3, mask=exists, other=1.0)
        exact = tl.load(MOMENTS + spot * 3 + 1, mask=exists, other=0.0)
        mean = exact.to(x.dtype)
        low = (exact - mean.to(tl.float64)).to(x.dtype)
        m2 = tl.load(MOMENTS + spot * 3 + 2, mask=exists, other=1.0)
        rstd = (1.0 / tl.sqrt(m2 / tl.maximum(count, 1.0) + EPS)).to(x.dtype)
    finish(x, mean, low, rstd, Y, WEIGHT, BIAS, SCALE, SHIFT, RESIDUAL, MASK, n, channel, at, steps, inside, real, S,
           C, G, LAYOUT, ACTIVATION)  # fmt: skip


@kernel
def sums_of_slabs(
    X, DY, WEIGHT, BIAS, SCALE, SHIFT, RESIDUAL, MASK, MEAN, RSTD, LOW, LOST, SUMS, N, TOTALS, PARTIALS, COUNTERS,
    parts, across, tiles, VECTORS,
    VECTOR: tl.constexpr, C: tl.constexpr, G: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The sums by channel of each part, and, as TOTALS (3, N*G), each group's count and sums of dxhat and
    dxhat*xhat; as LOST (N*G) by how much xhat is off.
    """
    PER_GROUP: tl.constexpr = C // G
    ACC: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    S = VECTORS * VECTOR
    slab, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    n, group, channel, rows, cols, at, steps, inside, real = place(
        slab, part, across, 0, tiles, MASK, S, C, G, P, ROWS, COLS, LAYOUT
    )
    spot, exists = slab_groups(n, group, G, P, GROUPS)
    mean, low, rstd = read_statistics(MEAN, RSTD, LOW, spot, exists)
    a, b = tl.full([ROWS], 0.0, ACC), tl.full([ROWS], 0.0, ACC)
    count, s1 = tl.full([GROUPS], 0.0, ACC), tl.full([GROUPS], 0.0, ACC)
    s2, s0 = tl.full([GROUPS], 0.0, ACC), tl.full([GROUPS], 0.0, ACC)
    for inner in range(tiles):
        n, group, channel, rows, cols, at, steps, inside, real = place(
            slab, part, across, inner, tiles, MASK, S, C, G, P, ROWS, COLS, LAYOUT
        )
        x = load_tile(X, at, steps, real, "")
        dy = load_tile(DY, at, steps, real, "")
        xhat, dz, gain = start_gradient(x, dy, mean, low, rstd, WEIGHT, BIAS, SCALE, SHIFT, RESIDUAL, n, channel, at,
                                        steps, inside, real, S, C, G, LAYOUT, ACTIVATION)  # fmt: skip
        c, d, e, f, g, h = held_sums(dz, xhat, gain, real, rows, cols, MASK, LOST, PER_GROUP, GROUPS)
        count, s1, s2, s0, a, b = count + c, s1 + d, s2 + e, s0 + f, a + g, b + h
    if SUMS is not None:
        write_row_sums(SUMS, n, part % across, across, channel, rows, a, b, N, C)
    if TOTALS is not None:
        publish_sums(PARTIALS, slab, part, count, s1, s2, s0, BLOCK)
        if arrive(COUNTERS + slab) == parts - 1:
            count, s1, s2, lost = merge_sums(PARTIALS, LOST, slab, parts, mean, rstd, GROUPS, BLOCK)
            tl.store(TOTALS + spot, count, mask=exists)
            tl.store(TOTALS + N * G + spot, s1, mask=exists)
            tl.store(TOTALS + 2 * N * G + spot, s2, mask=exists)
            if LOST is not None:
                tl.store(LOST + spot, lost, mask=exists)
            tl.store(COUNTERS + slab, 0)


@kernel
def apply_gradient(
    X, DY, DX, WEIGHT, BIAS, SCALE, SHIFT, RESIDUAL, MASK, MEAN, RSTD, LOW, LOST, DRESIDUAL, TOTALS, N, parts, across,
    VECTORS,
    VECTOR: tl.constexpr, C: tl.constexpr, G: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    GROUPS: tl.constexpr, LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """dx and dresidual from TOTALS: program i takes the i-th tile from the end."""
    PER_GROUP: tl.constexpr = C // G
    S = VECTORS * VECTOR
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    n, group, channel, rows, cols, at, steps, inside, real = place(
        tile // parts, tile % parts, across, 0, 1, MASK, S, C, G, P, ROWS, COLS, LAYOUT
    )
    x = load_tile(X, at, steps, real, "evict_first")
    dy = load_tile(DY, at, steps, real, "evict_first")
    spot, exists = slab_groups(n, group, G, P, GROUPS)
    mean, low, rstd = read_statistics(MEAN, RSTD, LOW, spot, exists)
    xhat, dz, gain = start_gradient(x, dy, mean, low, rstd, WEIGHT, BIAS, SCALE, SHIFT, RESIDUAL, n, channel, at,
                                    steps, inside, real, S, C, G, LAYOUT, ACTIVATION)  # fmt: skip
    count = tl.load(TOTALS + spot, mask=exists, other=1.0)
    s1 = tl.load(TOTALS + N * G + spot, mask=exists, other=0.0)
    s2 = tl.load(TOTALS + 2 * N * G + spot, mask=exists, other=0.0)
    if LOST is not None:
        xhat = without(xhat, tl.load(LOST + spot, mask=exists, other=0.0), LOST, PER_GROUP)
    finish_gradient(xhat, dz, gain, rstd, count, s1, s2, DX, DRESIDUAL, MASK, at, steps, inside, real, PER_GROUP)
