"""What a kernel is told: the record of its plan, the record of its call, and the coefficients of a channel.

A kernel is a C function of four numbers: the address of a PLAN, which belongs to a kind of call and never changes, the
address of a CALL, which holds where this call's arrays are, the number of the task, and that of the thread which does
it, from 0 to below the launch's number of threads.
"""

from typing import Any

import numpy as np
from numba import from_dtype
from numba.core import types
from numba.extending import intrinsic

from groupnorm._engines.cpu.compiler import inlined, jitted
from groupnorm._engines.cpu.memory import BF16, F16, FLOAT32, FLOAT64, NONE, load_first, pointer, store_first, zeros
from groupnorm._engines.cpu.simd import fma, narrow, widen

__all__ = [
    "ARRAYS",
    "CALL",
    "DZ",
    "DZH",
    "FROM_MOMENTS",
    "GIVEN",
    "PLAN",
    "SHAPED",
    "H",
    "call_at",
    "channel_affine",
    "coefficients",
    "plan_at",
    "store_coefficients",
    "sums_at",
]

GIVEN, FROM_MOMENTS = 1, 2  # statistics: the caller gave them; a launch before (of backward in phases) left moments
SHAPED = ("x", "y", "residual", "dy", "dx", "dresidual")  # arrays that are walked by steps
ARRAYS = ("x", "y", "weight", "bias", "scale", "shift", "residual", "mask", "mean", "rstd", "moments", "dy", "dx",
          "dweight", "dbias", "dscale", "dshift", "dresidual", "work", "sums", "rows", "kept")  # fmt: skip

DZ, DZH, H = np.arange(3)  # kinds of sums of backward: of dz, dz*xhat and xhat

PLAN = np.dtype(
    [(name, np.int64) for name in (
        "kernel", "tasks", "workers",  # the launch: an address, how many tasks, and how many threads may help
        "next",  # the address of the launch that follows, or 0
        "N", "C", "S", "G", "D",
        *(f"{array}_{axis}" for array in SHAPED for axis in "ncs"),  # steps in elements
        "weight", "bias", "scale", "shift",  # element codes, NONE where there is no such array
        "phase",  # what this launch does, a sum of the phases of the kernel's file
        "unit", "units", "per_task", "block", "parts", "slab",  # how the work is cut, see the kernel's file
        "part", "chunk_rows",  # channels first: positions of a part, channels of a chunk
        "ahead",  # channels first: with an activation, how many channels further on memory is asked for
        "few",  # 1 if the moments of a group are taken as those of few elements, see statistics.py
        "dense",  # channels first: 1 if channels have fewer than LANES positions and follow each other in memory
        "chunk",  # channels first: elements whose moments are taken while they are in the L1 cache
        "kept",  # backward: elements of a group (of a slab, in channels last) whose dz is kept, 0 where none is
        "stats",  # 0, GIVEN (moments for forward, mean and rstd for backward) or FROM_MOMENTS
    )] + [("eps", np.float64)],
    align=True,
)  # fmt: skip
CALL = np.dtype([(name, np.int64) for name in (*ARRAYS, "way")], align=True)  # way: of writing, see memory.py


def _record_at(dtype: Any) -> Any:
    record = from_dtype(dtype)

    def typing(typingctx: Any, address: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(record))

        return record(types.int64), lower

    return intrinsic(typing)


plan_at = _record_at(PLAN)
call_at = _record_at(CALL)


@inlined
def sums_at(p, n, part, kind):
    """Where the sums of a part (of a unit, in channels last) of sample n begin, by channel; kind is DZ, DZH or H."""
    return ((n * p.parts + part) * 3 + kind) * p.C


@inlined
def coefficients(address, code, index, lanes, default):
    """Elements index to index + lanes of a parameter as a float64 vector; the default in every lane if there is no such
    array. The type is looked up at run time: a parameter is read once for sixteen channels, and a kernel for each
    mixture of types would be compiled for nothing.
    """
    if code == FLOAT32 and address != 0:  # the usual case, without the call
        return widen(load_first(pointer(address, FLOAT32), index, lanes))
    return _other_coefficients(address, code, index, lanes, default)


@jitted
def _other_coefficients(address, code, index, lanes, default):
    """The same for the rarer types."""
    if code == NONE or address == 0:
        return zeros(pointer(address, FLOAT64)) + default
    if code == FLOAT64:
        return load_first(pointer(address, FLOAT64), index, lanes)
    if code == BF16:
        return widen(load_first(pointer(address, BF16), index, lanes))
    return widen(load_first(pointer(address, F16), index, lanes))


@inlined
def channel_affine(p, a, n, c, lanes):
    """A and B of z = xhat*A + B for channels c to c + lanes of sample n, as float64 vectors: weight*(1 + scale) and
    bias*(1 + scale) + shift.
    """
    weight, bias = coefficients(a.weight, p.weight, c, lanes, 1.0), coefficients(a.bias, p.bias, c, lanes, 0.0)
    if p.scale == NONE and p.shift == NONE:
        return weight, bias
    factor = coefficients(a.scale, p.scale, n * p.C + c, lanes, 0.0) + 1.0
    return weight * factor, fma(bias, factor, coefficients(a.shift, p.shift, n * p.C + c, lanes, 0.0))


@jitted
def store_coefficients(address, code, index, values, lanes):
    """Write elements index to index + lanes of a parameter's gradient, if there is one, in the parameter's type."""
    if address == 0:
        return
    if code == FLOAT32:
        to = pointer(address, FLOAT32)
        store_first(to, index, narrow(values, zeros(to)), lanes)
    elif code == FLOAT64:
        store_first(pointer(address, FLOAT64), index, values, lanes)
    elif code == BF16:
        half = pointer(address, BF16)
        store_first(half, index, narrow(values, zeros(half)), lanes)
    elif code == F16:
        short = pointer(address, F16)
        store_first(short, index, narrow(values, zeros(short)), lanes)
