"""Ticketed: persistent programs draw tickets; a slab is read twice, the second time from L2.

For slabs too large to be held by all programs together, but small against L2. The data's way: memory, L2, registers for
the moments of each part; a little later, while the next slab is read from memory, L2, registers; L2, memory. 3 units go
through L2, 2 of them through memory (backward 5 and 3). No cooperative launch: any grid will do.

Tickets count pieces of work in this order: for each step the statistics of all parts of slab `step`, then the results
of all parts of slab `step - lag`. A program draws one, does it, and draws the next.

It cannot hang, under any scheduling: only results wait, for the statistics of their own slab. These have smaller
tickets, so each was drawn by a program that runs or is done; statistics wait for nothing, so each of them ends. A
program that was never started holds no ticket and nobody waits for it.
"""

import triton
import triton.language as tl

from groupnorm._engines.gpu.compiler import kernel
from groupnorm._engines.gpu.parts import merge_moments, merge_sums, publish_moments, publish_sums
from groupnorm._engines.gpu.sync import arrive, wait_for
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

__all__ = ["ticketed_backward", "ticketed_forward"]


@triton.jit
def _leave(COUNTERS, ticket, last, slabs):
    """The program that draws the last ticket of all comes when everybody is done: it sets the counters back to 0."""
    if ticket == last:
        for first in range(0, slabs + 1, 1024):
            at = first + tl.arange(0, 1024)
            tl.store(COUNTERS + at, tl.zeros([1024], tl.int32), mask=at <= slabs)


@kernel
def ticketed_forward(
    X, Y, WEIGHT, BIAS, SCALE, SHIFT, RESIDUAL, MASK, MEAN, RSTD, LOW, MOMENTS, PARTIALS, COUNTERS, slabs, parts,
    across, lag, VECTORS,
    VECTOR: tl.constexpr, C: tl.constexpr, G: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, LAYOUT: tl.constexpr, EPS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y and statistics. COUNTERS: one for each slab, then that of the tickets."""
    PER_GROUP: tl.constexpr = C // G
    S = VECTORS * VECTOR
    total = (slabs + lag) * 2 * parts
    ticket = tl.atomic_add(COUNTERS + slabs, 1)
    while ticket < total:
        step = ticket // (2 * parts)
        part = ticket % parts
        early = ticket % (2 * parts) < parts
        slab = tl.where(early, step, step - lag)
        if (slab >= 0) & (slab < slabs):
            n, group, channel, rows, cols, at, steps, inside, real = place(
                slab, part, across, 0, 1, MASK, S, C, G, P, ROWS, COLS, LAYOUT
            )
            if early:
                x = load_tile(X, at, steps, real, "evict_last")
                count, mean, low, m2 = held_moments(x, real, rows, cols, MASK, PER_GROUP, GROUPS)
                publish_moments(PARTIALS, slab, part, count, mean, low, m2, BLOCK)
                arrive(COUNTERS + slab)
            else:
                wait_for(COUNTERS + slab, parts)
                count, mean, low, m2 = merge_moments(PARTIALS, slab, parts, GROUPS, BLOCK)
                spot, exists = slab_groups(n, group, G, P, GROUPS)
                rstd = rstd_of(count, m2, EPS)
                if part == 0:
                    write_statistics(MEAN, RSTD, LOW, MOMENTS, spot, exists, count, mean, low, m2, rstd)
                x = load_tile(X, at, steps, real, "evict_first")
                finish(x, mean, low, rstd, Y, WEIGHT, BIAS, SCALE, SHIFT, RESIDUAL, MASK, n, channel, at, steps,
                       inside, real, S, C, G, LAYOUT, ACTIVATION)  # fmt: skip
        ticket = tl.atomic_add(COUNTERS + slabs, 1)
    _leave(COUNTERS, ticket, total + tl.num_programs(0) - 1, slabs)


@kernel
def ticketed_backward(
    X, DY, DX, WEIGHT, BIAS, SCALE, SHIFT, RESIDUAL, MASK, MEAN, RSTD, LOW, LOST, DRESIDUAL, SUMS, N, PARTIALS,
    COUNTERS, slabs, parts, across, lag, VECTORS,
    VECTOR: tl.constexpr, C: tl.constexpr, G: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """dx, dresidual and the sums by channel; counters as in forward."""
    PER_GROUP: tl.constexpr = C // G
    S = VECTORS * VECTOR
    total = (slabs + lag) * 2 * parts
    ticket = tl.atomic_add(COUNTERS + slabs, 1)
    while ticket < total:
        step = ticket // (2 * parts)
        part = ticket % parts
        early = ticket % (2 * parts) < parts
        slab = tl.where(early, step, step - lag)
        if (slab >= 0) & (slab < slabs):
            n, group, channel, rows, cols, at, steps, inside, real = place(
                slab, part, across, 0, 1, MASK, S, C, G, P, ROWS, COLS, LAYOUT
            )
            spot, exists = slab_groups(n, group, G, P, GROUPS)
            mean, low, rstd = read_statistics(MEAN, RSTD, LOW, spot, exists)
            x = load_tile(X, at, steps, real, "evict_last")
            dy = load_tile(DY, at, steps, real, "evict_last")
            xhat, dz, gain = start_gradient(x, dy, mean, low, rstd, WEIGHT, BIAS, SCALE, SHIFT, RESIDUAL, n, channel,
                                            at, steps, inside, real, S, C, G, LAYOUT, ACTIVATION)  # fmt: skip
            if early:
                count, s1, s2, s0, a, b = held_sums(dz, xhat, gain, real, rows, cols, MASK, LOST, PER_GROUP, GROUPS)
                publish_sums(PARTIALS, slab, part, count, s1, s2, s0, BLOCK)
                if SUMS is not None:
                    write_row_sums(SUMS, n, part % across, across, channel, rows, a, b, N, C)
                arrive(COUNTERS + slab)
            else:
                wait_for(COUNTERS + slab, parts)
                count, s1, s2, lost = merge_sums(PARTIALS, LOST, slab, parts, mean, rstd, GROUPS, BLOCK)
                if LOST is not None and part == 0:
                    tl.store(LOST + spot, lost, mask=exists)
                xhat = without(xhat, lost, LOST, PER_GROUP)
                finish_gradient(xhat, dz, gain, rstd, count, s1, s2, DX, DRESIDUAL, MASK, at, steps, inside, real,
                                PER_GROUP)  # fmt: skip
        ticket = tl.atomic_add(COUNTERS + slabs, 1)
    _leave(COUNTERS, ticket, total + tl.num_programs(0) - 1, slabs)
