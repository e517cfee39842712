"""Gradients of weight, bias, scale and shift: sums of what the other kernels left by channel, in a fixed order.

With A = sum of dz and B = sum of dz*xhat over the positions of a channel of one sample (both summed over its parts;
where xhat is off by a group's LOST, B is less by LOST*A):

    dshift = A,  dscale = weight*B + bias*A;  dbias = sum over n of (1 + scale)*A,  dweight = sum over n of (1 +
    scale)*B

which are equations (9) to (13) of `groupnorm.reference`, with xhat*weight + bias written out. No float is added by an
atomic: results are the same from run to run.
"""

import triton.language as tl

from groupnorm._engines.gpu.compiler import kernel
from groupnorm._engines.gpu.epilogue import scale_factor

__all__ = ["parameter_gradients", "sample_gradients"]


@kernel
def parameter_gradients(SUMS, SCALE, LOST, DWEIGHT, DBIAS, rows, across, C: tl.constexpr, G: tl.constexpr,
                        ROWS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """dweight and dbias: program i takes the i-th block of channels, and all `rows` = N*across rows of SUMS (2, N,
    across, C), ROWS at a time.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    ACC: tl.constexpr = SUMS.dtype.element_ty
    a, b = tl.full([CHANNELS], 0.0, ACC), tl.full([CHANNELS], 0.0, ACC)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        known = (row < rows) & (channel < C)
        at = SUMS + tl.cast(row, tl.int64) * C + channel
        dz = tl.load(at, mask=known, other=0.0)
        dz_xhat = tl.load(at + tl.cast(rows, tl.int64) * C, mask=known, other=0.0)
        if LOST is not None:
            lost = tl.load(LOST + row // across * G + channel // (C // G), mask=known, other=0.0)
            dz_xhat = dz_xhat - lost * dz
        if SCALE is not None:
            factor = scale_factor(SCALE, row // across, channel, known, C, ACC)
            dz, dz_xhat = dz * factor, dz_xhat * factor
        a, b = a + tl.sum(dz, 0), b + tl.sum(dz_xhat, 0)
    spot = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    if DWEIGHT is not None:
        tl.store(DWEIGHT + spot, b.to(DWEIGHT.dtype.element_ty), mask=spot < C)
    if DBIAS is not None:
        tl.store(DBIAS + spot, a.to(DBIAS.dtype.element_ty), mask=spot < C)


@kernel
def sample_gradients(SUMS, WEIGHT, BIAS, LOST, DSCALE, DSHIFT, N, across, C: tl.constexpr, G: tl.constexpr,
                     ROWS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """dscale and dshift: a program takes a block of channels of a sample, one block after the other."""
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    n, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    channel = block * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    ACC: tl.constexpr = SUMS.dtype.element_ty
    a, b = tl.full([CHANNELS], 0.0, ACC), tl.full([CHANNELS], 0.0, ACC)
    for start in range(0, across, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        known = (row < across) & (channel < C)
        at = SUMS + (tl.cast(n, tl.int64) * across + row) * C + channel
        dz = tl.load(at, mask=known, other=0.0)
        dz_xhat = tl.load(at + tl.cast(N, tl.int64) * across * C, mask=known, other=0.0)
        a, b = a + tl.sum(dz, 0), b + tl.sum(dz_xhat, 0)
    spot = block * CHANNELS + tl.arange(0, CHANNELS)
    if LOST is not None:
        b = b - a * tl.load(LOST + n * G + spot // (C // G), mask=spot < C, other=0.0)
    if DSHIFT is not None:
        tl.store(DSHIFT + tl.cast(n, tl.int64) * C + spot, a.to(DSHIFT.dtype.element_ty), mask=spot < C)
    if DSCALE is not None:
        b = b.to(tl.float64)  # the two products may cancel; they are a few for each program
        if WEIGHT is not None:
            b = b * tl.load(WEIGHT + spot, mask=spot < C, other=0.0).to(tl.float64)
        if BIAS is not None:
            b = b + a.to(tl.float64) * tl.load(BIAS + spot, mask=spot < C, other=0.0).to(tl.float64)
        tl.store(DSCALE + tl.cast(n, tl.int64) * C + spot, b.to(DSCALE.dtype.element_ty), mask=spot < C)
