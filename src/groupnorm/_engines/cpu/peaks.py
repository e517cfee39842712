"""What the machine can do at most: loops that only read, copy, combine, multiply or issue, in the vectors that the
kernels are written in, for measurements to stand beside.

A task works on a slice of its own, `elements` long, and goes over it `passes` times: with as many tasks as threads and
a slice that fits a cache, that cache is measured.
"""

from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np

from groupnorm._engines.cpu.compiler import compiled
from groupnorm._engines.cpu.memory import (
    FLOAT32,
    FLOAT64,
    THROUGH,
    elements_ahead,
    fence,
    load,
    pointer,
    store,
    write,
    zeros,
)
from groupnorm._engines.cpu.records import ARRAYS, PLAN, call_at, plan_at
from groupnorm._engines.cpu.simd import LANES, fma
from groupnorm._engines.cpu.threads import MAX_WORKERS, POOL

__all__ = ["COPY", "ISSUE", "MULTIPLY", "OPERATIONS", "READ", "STEP", "TRIAD", "run_peak", "vector_lanes"]

READ, COPY, TRIAD, MULTIPLY, ISSUE = range(5)  # TRIAD: y = x + 3*residual
_MULTIPLIED = 12  # accumulators: a multiply-add has to wait 4 cycles for the last one, and 2 may start in each
OPERATIONS = {MULTIPLY: _MULTIPLIED, ISSUE: 18}  # operations on LANES lanes in a step of a pass; steps are 4 vectors
STEP = 4 * int(LANES)  # elements; a slice is a multiple of this


def run_peak(
    kind: int, x: Any, y: Any, other: Any, elements: int, passes: int, num_threads: int, *, way: int = THROUGH
) -> None:
    """Go `passes` times over the slices of flat arrays x, y and `other`, each thread over its own `elements`, a
    multiple of STEP: READ x; COPY x to y; TRIAD: y = x + 3*other; MULTIPLY and ISSUE: OPERATIONS[kind] operations for
    each STEP elements. `way` of writing: for PAST, y begins at a cache line. x is float32, or float64 for
    MULTIPLY alone.
    """
    record = np.zeros((), PLAN)
    threads = max(1, min(num_threads, MAX_WORKERS + 1))
    record["kernel"] = _kernel(FLOAT64 if x.dtype == np.float64 else FLOAT32).address
    record["tasks"], record["workers"] = threads, threads - 1
    record["phase"], record["S"], record["per_task"] = kind, elements, passes
    arrays = {"x": x, "y": y, "residual": other}
    POOL.run(record.ctypes.data, tuple(arrays.get(name) for name in ARRAYS), way, threads)


def vector_lanes() -> int:
    """float32 lanes of this machine's vectors."""
    features = llvm.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx2") else 4


@cache
def _kernel(element: int) -> Any:
    def kernel(plan, call, task, worker):
        p, a = plan_at(plan), call_at(call)
        x, y, other = pointer(a.x, element), pointer(a.y, element), pointer(a.residual, element)
        first = task * p.S
        way, ahead = a.way, elements_ahead(x, 1, 1)
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = s8 = s9 = s10 = s11 = zeros(x)
        for _ in range(p.per_task):
            if p.phase == READ:
                for i in range(first, first + p.S, 4 * LANES):
                    s0 += load(x, i)
                    s1 += load(x, i + LANES)
                    s2 += load(x, i + 2 * LANES)
                    s3 += load(x, i + 3 * LANES)
            elif p.phase == COPY:
                for i in range(first, first + p.S, LANES):
                    write(y, i, load(x, i), way, ahead)
            elif p.phase == TRIAD:
                for i in range(first, first + p.S, LANES):
                    write(y, i, fma(load(other, i), 3.0, load(x, i)), way, ahead)
            elif p.phase == MULTIPLY:
                v, w = load(x, first), load(x, first + LANES)
                for _i in range(0, p.S, 4 * LANES):
                    s0, s1, s2, s3 = fma(s0, v, w), fma(s1, v, w), fma(s2, v, w), fma(s3, v, w)
                    s4, s5, s6, s7 = fma(s4, v, w), fma(s5, v, w), fma(s6, v, w), fma(s7, v, w)
                    s8, s9, s10, s11 = fma(s8, v, w), fma(s9, v, w), fma(s10, v, w), fma(s11, v, w)
            else:  # what statistics are made of: loads, additions and multiply-adds, six of each
                v = load(x, first)
                for i in range(first, first + p.S, 4 * LANES):
                    t0, t1, t2, t3 = load(x, i), load(x, i + LANES), load(x, i + 2 * LANES), load(x, i + 3 * LANES)
                    t4, t5 = load(x, i + 4 * LANES), load(x, i + 5 * LANES)
                    s0, s1, s2, s3, s4, s5 = s0 + t0, s1 + t1, s2 + t2, s3 + t3, s4 + t4, s5 + t5
                    s6, s7, s8 = fma(t0, v, s6), fma(t1, v, s7), fma(t2, v, s8)
                    s9, s10, s11 = fma(t3, v, s9), fma(t4, v, s10), fma(t5, v, s11)
        fence()
        if p.phase == READ or p.phase >= MULTIPLY:  # a result that is written down cannot be left out
            store(y, task * LANES, s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7 + s8 + s9 + s10 + s11)

    return compiled(kernel, f"peaks_{element}")
