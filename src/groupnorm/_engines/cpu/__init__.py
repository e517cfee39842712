"""The CPU engine: kernels in Python, compiled by Numba, run by a pool of threads.

From outside in: `plan.py` decides how a problem is cut, `channels_first/` and `channels_last/` are the kernels,
`statistics.py`, `epilogue.py` and `parameters.py` their parts, `simd.py` and `memory.py` the vectors they are written
in, `records.py` what they are told, `compiler.py` and `threads.py` what compiles and runs them; `copy.py` is the limit
to measure against.
"""

import struct
import threading
from typing import Any

import numpy as np

from groupnorm._core import buffers
from groupnorm._core.problem import Problem
from groupnorm._engines import fill_empty
from groupnorm._engines.cpu.copy import stream_copy
from groupnorm._engines.cpu.memory import THROUGH
from groupnorm._engines.cpu.plan import Plan, make_plan
from groupnorm._engines.cpu.records import ARRAYS
from groupnorm._engines.cpu.threads import POOL

__all__ = ["backward", "forward", "plan", "run_at", "stream_copy", "supports"]

_SCRATCH = 1 << 13  # float64 numbers that each calling thread keeps for itself
_own = threading.local()
_CALL = struct.Struct(f"{len(ARRAYS) + 1}q")  # the addresses, and the way to write


def supports(problem: Problem) -> str | None:
    """It takes every problem that the front end lets through."""
    return None


def plan(problem: Problem, num_threads: int) -> Plan:
    """The plan; compiles the kernels that it needs."""
    return make_plan(problem, num_threads)


def forward(
    plan: Plan, x: Any, y: Any, weight: Any, bias: Any, scale: Any, shift: Any, residual: Any, mask: Any, mean: Any,
    rstd: Any, moments: Any,
) -> None:  # fmt: skip
    """Fill y, and mean and rstd or moments where given."""
    if not plan.launches:
        fill_empty(plan.problem, mean, rstd, (moments,))
        return
    work = np.empty(plan.work) if plan.work else None
    rows = np.empty(plan.rows) if plan.rows else None
    arrays = (x, y, weight, bias, scale, shift, residual, mask, mean, rstd, moments, None, None, None, None, None, None,
              None, work, None, rows, None)  # fmt: skip
    way = THROUGH if plan.way == THROUGH or buffers.first_write(y) else plan.way
    POOL.run(plan.launches[0].address, arrays, way, plan.threads)


def backward(
    plan: Plan, dy: Any, x: Any, dx: Any, weight: Any, bias: Any, scale: Any, shift: Any, residual: Any, mask: Any,
    mean: Any, rstd: Any, dweight: Any, dbias: Any, dscale: Any, dshift: Any, dresidual: Any,
) -> None:  # fmt: skip
    """Fill dx and every other gradient that is given."""
    if not plan.launches:
        fill_empty(plan.problem, None, None, (dweight, dbias, dscale, dshift))
        return
    moments = None
    if plan.statistics is not None:
        moments = np.empty((plan.problem.N, plan.problem.G, 3))
        forward(plan.statistics, x, None, None, None, None, None, None, mask, None, None, moments)
    work = np.empty(plan.work) if plan.work else None
    rows = np.empty(plan.rows) if plan.rows else None
    kept = np.empty(plan.kept) if plan.kept else None
    arrays = (x, None, weight, bias, scale, shift, residual, mask, mean, rstd, moments, dy, dx, dweight, dbias, dscale,
              dshift, dresidual, work, np.empty(plan.sums), rows, kept)  # fmt: skip
    way = THROUGH if plan.way == THROUGH or buffers.first_write(dx) else plan.way
    POOL.run(plan.launches[0].address, arrays, way, plan.threads)


def run_at(
    plan: Plan, fresh: bool, x: int, y: int, weight: int, bias: int, scale: int, shift: int, residual: int, mask: int,
    mean: int, rstd: int, moments: int = 0, dy: int = 0, dx: int = 0, dweight: int = 0, dbias: int = 0, dscale: int = 0,
    dshift: int = 0, dresidual: int = 0,
) -> None:  # fmt: skip
    """Forward or backward, whatever the plan is for, on addresses in memory, 0 where there is no such array. `fresh`:
    the output lies in memory that was never written. For a plan that has launches, and for backward with mean and rstd.
    """
    work = sums = rows = kept = 0
    if plan.scratch:
        work, _alive = _scratch(plan.scratch)
        sums = work + 8 * plan.work
        rows = sums + 8 * plan.sums
        kept = rows + 8 * plan.rows
    call = _CALL.pack(x, y, weight, bias, scale, shift, residual, mask, mean, rstd, moments, dy, dx, dweight, dbias,
                      dscale, dshift, dresidual, work, sums, rows, kept, THROUGH if fresh else plan.way)  # fmt: skip
    POOL.run_at(plan.launches[0].address, call, plan.threads)


def _scratch(size: int) -> tuple[int, Any]:
    """Where memory for so many float64 numbers begins, and what keeps it; a thread has a small one for itself, since
    looking for an array's address takes a microsecond, half of a tiny norm.
    """
    found: tuple[int, Any] | None = getattr(_own, "scratch", None) if size <= _SCRATCH else None
    if found is None:
        array = np.empty(max(size, _SCRATCH))
        found = array.ctypes.data, array
        if size <= _SCRATCH:
            _own.scratch = found
    return found
