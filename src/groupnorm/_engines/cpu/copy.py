"""A copy past the cache: the least that any kernel which reads x and writes y has to do, for measurements to stand
beside.
"""

from functools import cache
from typing import Any

import numpy as np

from groupnorm._engines.cpu.compiler import compiled
from groupnorm._engines.cpu.memory import FLOAT32, fence, load, pointer, stream
from groupnorm._engines.cpu.records import ARRAYS, PLAN, call_at, plan_at
from groupnorm._engines.cpu.simd import LANES
from groupnorm._engines.cpu.threads import POOL

__all__ = ["stream_copy"]

_PIECE = 1 << 16  # elements of a task: 256 KB


def stream_copy(source: Any, target: Any, num_threads: int) -> None:
    """Copy a flat float32 array into another with non-temporal stores; both start at a cache line, and their length is
    a multiple of 16 (what is beyond the last multiple is left alone).
    """
    record = np.zeros((), PLAN)
    record["kernel"], record["S"] = _kernel().address, source.size
    record["tasks"], record["workers"] = -(-source.size // _PIECE), num_threads - 1
    arrays = {"x": source, "y": target}
    POOL.run(record.ctypes.data, tuple(arrays.get(name) for name in ARRAYS), False, num_threads)


@cache
def _kernel() -> Any:
    def kernel(plan, call, task):
        x, y = pointer(call_at(call).x, FLOAT32), pointer(call_at(call).y, FLOAT32)
        for i in range(task * _PIECE, min((task + 1) * _PIECE, plan_at(plan).S) - LANES + 1, LANES):
            stream(y, i, load(x, i))
        fence()

    return compiled(kernel, "stream_copy")
