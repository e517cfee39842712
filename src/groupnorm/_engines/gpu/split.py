"""Split: a slab lies in the registers of several programs, which tell each other their statistics.

For slabs larger than one program and smaller than the chip: still 2 units of traffic forward and 3 backward. The data's
way: memory, L2, registers; each part's moments to L2 and, behind a barrier of the slab's programs, those of all parts
back; registers, L2, memory. Programs stay and take up slab after slab; with two or more slabs at a time, one reads
while another waits.

The grid is (parts, lanes): so many slabs are worked on at a time. A barrier waits for the programs of its lane only;
why it cannot hang stands in `sync.barrier`: it is launched cooperatively or not at all. PHASE 0 is the whole. 1 and 2
are what lies before and behind the barrier, for Triton's interpreter, which runs one program after the other and would
never return from a barrier; phase 2 loads again what phase 1 held.
"""

import triton.language as tl

from groupnorm._engines.gpu.compiler import kernel
from groupnorm._engines.gpu.parts import merge_moments, merge_sums, publish_moments, publish_sums
from groupnorm._engines.gpu.sync import barrier
from groupnorm._engines.gpu.tiles import (
    finish,
    finish_gradient,
    held_moments,
    held_sums,
    load_tile,
    place,
    read_statistics,
    rstd_of,
    slab_groups,
    start_gradient,
    without,
    write_row_sums,
    write_statistics,
)

__all__ = ["split_backward", "split_forward"]


@kernel
def split_forward(
    X, Y, WEIGHT, BIAS, SCALE, SHIFT, RESIDUAL, MASK, MEAN, RSTD, LOW, MOMENTS, PARTIALS, COUNTERS, slabs, across,
    VECTORS,
    VECTOR: tl.constexpr, C: tl.constexpr, G: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, LAYOUT: tl.constexpr, EPS: tl.constexpr, ACTIVATION: tl.constexpr,
    PHASE: tl.constexpr,
):  # fmt: skip
    """y and statistics: a lane takes each `lanes`-th slab, a program one part of it."""
    PER_GROUP: tl.constexpr = C // G
    S = VECTORS * VECTOR  # so that the compiler knows what divides it
    part, parts = tl.program_id(0), tl.num_programs(0)
    lane, lanes = tl.program_id(1), tl.num_programs(1)
    for slab in range(lane, slabs, lanes):
        n, group, channel, rows, cols, at, steps, inside, real = place(
            slab, part, across, 0, 1, MASK, S, C, G, P, ROWS, COLS, LAYOUT
        )
        x = load_tile(X, at, steps, real, "evict_first")
        if PHASE < 2:
            count, mean, low, m2 = held_moments(x, real, rows, cols, MASK, PER_GROUP, GROUPS)
            publish_moments(PARTIALS, slab, part, count, mean, low, m2, BLOCK)
        if PHASE == 0:
            barrier(COUNTERS + lane, parts, part == 0)
        if PHASE != 1:
            count, mean, low, m2 = merge_moments(PARTIALS, slab, parts, GROUPS, BLOCK)
            spot, exists = slab_groups(n, group, G, P, GROUPS)
            rstd = rstd_of(count, m2, EPS)
            if part == 0:
                write_statistics(MEAN, RSTD, LOW, MOMENTS, spot, exists, count, mean, low, m2, rstd)
            finish(x, mean, low, rstd, Y, WEIGHT, BIAS, SCALE, SHIFT, RESIDUAL, MASK, n, channel, at, steps, inside,
                   real, S, C, G, LAYOUT, ACTIVATION)  # fmt: skip


@kernel
def split_backward(
    X, DY, DX, WEIGHT, BIAS, SCALE, SHIFT, RESIDUAL, MASK, MEAN, RSTD, LOW, LOST, DRESIDUAL, SUMS, N, PARTIALS,
    COUNTERS, slabs, across, VECTORS,
    VECTOR: tl.constexpr, C: tl.constexpr, G: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """dx, dresidual and the sums by channel: a lane takes each `lanes`-th slab, a program one part of it."""
    PER_GROUP: tl.constexpr = C // G
    S = VECTORS * VECTOR
    part, parts = tl.program_id(0), tl.num_programs(0)
    lane, lanes = tl.program_id(1), tl.num_programs(1)
    for slab in range(lane, slabs, lanes):
        n, group, channel, rows, cols, at, steps, inside, real = place(
            slab, part, across, 0, 1, MASK, S, C, G, P, ROWS, COLS, LAYOUT
        )
        x = load_tile(X, at, steps, real, "evict_first")
        dy = load_tile(DY, at, steps, real, "evict_first")
        spot, exists = slab_groups(n, group, G, P, GROUPS)
        mean, low, rstd = read_statistics(MEAN, RSTD, LOW, spot, exists)
        xhat, dz, gain = start_gradient(x, dy, mean, low, rstd, WEIGHT, BIAS, SCALE, SHIFT, RESIDUAL, n, channel, at,
                                        steps, inside, real, S, C, G, LAYOUT, ACTIVATION)  # fmt: skip
        if PHASE < 2:
            count, s1, s2, s0, a, b = held_sums(dz, xhat, gain, real, rows, cols, MASK, LOST, PER_GROUP, GROUPS)
            publish_sums(PARTIALS, slab, part, count, s1, s2, s0, BLOCK)
            if SUMS is not None:
                write_row_sums(SUMS, n, part % across, across, channel, rows, a, b, N, C)
        if PHASE == 0:
            barrier(COUNTERS + lane, parts, part == 0)
        if PHASE != 1:
            count, s1, s2, lost = merge_sums(PARTIALS, LOST, slab, parts, mean, rstd, GROUPS, BLOCK)
            if LOST is not None and part == 0:
                tl.store(LOST + spot, lost, mask=exists)
            xhat = without(xhat, lost, LOST, PER_GROUP)
            finish_gradient(xhat, dz, gain, rstd, count, s1, s2, DX, DRESIDUAL, MASK, at, steps, inside, real,
                            PER_GROUP)  # fmt: skip
