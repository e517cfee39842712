"""What a kernel is told: the record of its plan, the record of its call, and the coefficients of a channel.

A kernel is a C function of three numbers: the address of a PLAN, which belongs to a kind of call and never changes, the
address of a CALL, which holds where this call's arrays are, and the number of the task.
"""

from typing import Any

import numpy as np
from numba import from_dtype
from numba.core import types
from numba.extending import intrinsic

from groupnorm._engines.cpu.compiler import inlined, jitted
from groupnorm._engines.cpu.memory import BF16, F16, FLOAT32, FLOAT64, NONE, load_one, pointer, store_one

__all__ = [
    "ARRAYS",
    "CALL",
    "FROM_MOMENTS",
    "PLAN",
    "SHAPED",
    "call_at",
    "channel_affine",
    "coefficient",
    "plan_at",
    "store_coefficient",
]

FROM_MOMENTS = 2  # backward in phases: a launch before it has left the moments
SHAPED = ("x", "y", "residual", "dy", "dx", "dresidual")  # arrays that are walked by steps
ARRAYS = ("x", "y", "weight", "bias", "scale", "shift", "residual", "mask", "mean", "rstd", "moments", "dy", "dx",
          "dweight", "dbias", "dscale", "dshift", "dresidual", "work", "sums", "rows")  # fmt: skip

PLAN = np.dtype(
    [(name, np.int64) for name in (
        "kernel", "tasks", "workers",  # the launch: an address, how many tasks, and how many threads may help
        "N", "C", "S", "G", "D",
        *(f"{array}_{axis}" for array in SHAPED for axis in "ncs"),  # steps in elements
        "weight", "bias", "scale", "shift",  # element codes, NONE where there is no such array
        "phase",  # what this launch does, a sum of the phases of the kernel's file
        "unit", "units", "per_task", "parts", "slab",  # how the work is cut, see the kernel's file
        "part", "chunk_rows",  # channels first: positions of a part, channels of a chunk
        "chunk",  # channels first: elements whose moments are taken while they are in the L1 cache
        "stats",  # 1: statistics are given, moments for forward, mean and rstd for backward; FROM_MOMENTS
        "sum_n", "sum_c", "sum_part", "sum_next",  # backward: steps in the sums of dz, and on to dz*d and d
    )] + [("eps", np.float64)],
    align=True,
)  # fmt: skip
CALL = np.dtype([(name, np.int64) for name in (*ARRAYS, "stream")], align=True)  # stream: 1 to write past the cache


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
def coefficient(address, code, index, default):
    """Element `index` of a parameter as float64; the default if there is no such array. The type is looked up at run
    time: a parameter is read once per row, and a kernel for each mixture of types would be compiled for nothing.
    """
    if code == NONE or address == 0:
        return default
    if code == FLOAT32:
        return np.float64(load_one(pointer(address, FLOAT32), index))
    if code == FLOAT64:
        return load_one(pointer(address, FLOAT64), index)
    if code == BF16:
        return np.float64(load_one(pointer(address, BF16), index))
    return np.float64(load_one(pointer(address, F16), index))


@inlined
def channel_affine(p, a, n, c):
    """A and B of z = xhat*A + B for channel c of sample n: weight*(1 + scale) and bias*(1 + scale) + shift."""
    factor = 1.0 + coefficient(a.scale, p.scale, n * p.C + c, 0.0)
    return (
        coefficient(a.weight, p.weight, c, 1.0) * factor,
        coefficient(a.bias, p.bias, c, 0.0) * factor + coefficient(a.shift, p.shift, n * p.C + c, 0.0),
    )


@jitted
def store_coefficient(address, code, index, value):
    """Write element `index` of a parameter's gradient, if there is one, in the parameter's type."""
    if address == 0:
        return
    if code == FLOAT32:
        store_one(pointer(address, FLOAT32), index, np.float32(value))
    elif code == FLOAT64:
        store_one(pointer(address, FLOAT64), index, value)
    elif code == BF16:
        store_one(pointer(address, BF16), index, np.float32(value))
    elif code == F16:
        store_one(pointer(address, F16), index, np.float32(value))
