"""A copy past the cache: the least that any kernel which reads x and writes y has to do, for measurements to stand
beside.
"""

from functools import cache
from typing import Any

import numpy as np

from groupnorm._engines.cpu.compiler import compiled
from groupnorm._engines.cpu.memory import (
    FLOAT32,
    PAST,
    THROUGH,
    elements_to_line,
    fence,
    load,
    load_first,
    pointer,
    store_first,
    write,
)
from groupnorm._engines.cpu.records import ARRAYS, PLAN, call_at, plan_at
from groupnorm._engines.cpu.simd import LANES, minimum
from groupnorm._engines.cpu.threads import MAX_WORKERS, POOL

__all__ = ["stream_copy"]

_PIECE = 1 << 16  # elements of a task: 256 KB


def stream_copy(source: Any, target: Any, num_threads: int) -> None:
    """Copy a flat array of bytes into another of the same size with non-temporal stores."""
    record = np.zeros((), PLAN)
    elements = source.nbytes // 4
    record["kernel"], record["S"] = _kernel().address, elements
    record["tasks"] = tasks = -(-elements // _PIECE)
    threads = max(1, min(num_threads, tasks, MAX_WORKERS + 1))
    record["workers"] = threads - 1
    arrays = {"x": source, "y": target}
    POOL.run(record.ctypes.data, tuple(arrays.get(name) for name in ARRAYS), THROUGH, threads)
    target[4 * elements :] = source[4 * elements :]


@cache
def _kernel() -> Any:
    def kernel(plan, call, task, worker):
        x, y = pointer(call_at(call).x, FLOAT32), pointer(call_at(call).y, FLOAT32)
        at, end = task * _PIECE, minimum((task + 1) * _PIECE, plan_at(plan).S)
        way = PAST if elements_to_line(y, at) < LANES else THROUGH
        if way == PAST:
            head = minimum(elements_to_line(y, at), end - at)
            store_first(y, at, load_first(x, at, head), head)
            at += head
        while at + LANES <= end:
            write(y, at, load(x, at), way, 0)
            at += LANES
        if at < end:
            store_first(y, at, load_first(x, at, end - at), end - at)
        fence()

    return compiled(kernel, "stream_copy")
