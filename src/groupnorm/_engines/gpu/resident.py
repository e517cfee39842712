"""Resident: one program holds a slab on chip. It reads x once and writes y once, and waits for nobody.

For groups that fit the registers of one multiprocessor: 2 units of traffic forward, 3 backward (1 unit is the size of
x), which is the least there is. The data's way: memory, L2, registers; statistics from registers; registers, L2,
memory. Compiled for the number of positions, so that columns beyond it cost no registers.

Clustered: the same kernels, and the program has 2, 4 or 8 multiprocessors. Triton cuts the tile and adds up across
them, by way of their shared memory. The hardware starts all multiprocessors of a cluster at once or none, so nothing
can hang where one waits for another; clusters queue up as programs do: any grid will do.
"""

import triton.language as tl

from groupnorm._engines.gpu.compiler import kernel
from groupnorm._engines.gpu.tiles import (
    finish,
    finish_gradient,
    held_moments,
    held_rest,
    held_sums,
    load_tile,
    place,
    read_statistics,
    rstd_of,
    slab_groups,
    start_gradient,
    write_row_sums,
    write_statistics,
)

__all__ = ["resident_backward", "resident_forward"]


@kernel
def resident_forward(
    X, Y, WEIGHT, BIAS, SCALE, SHIFT, RESIDUAL, MASK, MEAN, RSTD, LOW, MOMENTS,
    S: tl.constexpr, C: tl.constexpr, G: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    GROUPS: tl.constexpr, LAYOUT: tl.constexpr, EPS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y and statistics: program i takes the i-th slab."""
    PER_GROUP: tl.constexpr = 1 if LAYOUT == "flat" else C // G
    n, group, channel, rows, cols, at, steps, inside, real = place(
        tl.program_id(0), 0, 1, 0, 1, MASK, S, C, G, P, ROWS, COLS, LAYOUT
    )
    x = load_tile(X, at, steps, real, "evict_first")
    count, mean, low, m2 = held_moments(x, real, rows, cols, MASK, PER_GROUP, GROUPS)
    spot, exists = slab_groups(n, group, G, P, GROUPS)
    rstd = rstd_of(count, m2, EPS)
    write_statistics(MEAN, RSTD, LOW, MOMENTS, spot, exists, count, mean, low, m2, rstd)
    if Y is not None:
        finish(x, mean, low, rstd, Y, WEIGHT, BIAS, SCALE, SHIFT, RESIDUAL, MASK, n, channel, at, steps, inside, real,
               S, C, G, LAYOUT, ACTIVATION)  # fmt: skip


@kernel
def resident_backward(
    X, DY, DX, WEIGHT, BIAS, SCALE, SHIFT, RESIDUAL, MASK, MEAN, RSTD, LOW, DRESIDUAL, SUMS, N,
    S: tl.constexpr, C: tl.constexpr, G: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    GROUPS: tl.constexpr, LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """dx, dresidual and the sums by channel: program i takes the i-th slab."""
    PER_GROUP: tl.constexpr = 1 if LAYOUT == "flat" else C // G
    n, group, channel, rows, cols, at, steps, inside, real = place(
        tl.program_id(0), 0, 1, 0, 1, MASK, S, C, G, P, ROWS, COLS, LAYOUT
    )
    x = load_tile(X, at, steps, real, "evict_first")
    dy = load_tile(DY, at, steps, real, "evict_first")
    spot, exists = slab_groups(n, group, G, P, GROUPS)
    mean, low, rstd = read_statistics(MEAN, RSTD, LOW, spot, exists)
    if LOW is None:
        low = held_rest(x, mean, real, rows, cols, MASK, PER_GROUP, GROUPS)
    xhat, dz, gain = start_gradient(x, dy, mean, low, rstd, WEIGHT, BIAS, SCALE, SHIFT, RESIDUAL, n, channel, at,
                                    steps, inside, real, S, C, G, LAYOUT, ACTIVATION)  # fmt: skip
    count, s1, s2, _, a, b = held_sums(dz, xhat, gain, real, rows, cols, MASK, None, PER_GROUP, GROUPS)
    if SUMS is not None:
        write_row_sums(SUMS, n, 0, 1, channel, rows, a, b, N, C)
    if DX is not None:
        finish_gradient(xhat, dz, gain, rstd, count, s1, s2, DX, DRESIDUAL, MASK, at, steps, inside, real, PER_GROUP)
