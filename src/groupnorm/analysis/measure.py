"""Measures what this machine can do at most: the loops of `_engines/cpu/peaks.py` for each cache and number of threads.

The best of several samples counts: the figures are limits, and a sample that was disturbed says nothing about a limit.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from groupnorm._core.machine import CACHES, describe
from groupnorm.analysis.figures import Level, MachineFigures, Speeds

__all__ = ["measure_figures"]

Array = Any

_SAMPLE_S = 3e-3  # a sample of a cache takes about this long: 15000 times what waking a thread costs
_SAMPLES = 7
_LAUNCHES = 10  # times as many samples of a call, whose time depends most on what else the machine does
_LARGEST = 1 << 29  # bytes of the arrays for memory, whatever the size of the L3 cache
_LINE = 64  # bytes: streamed stores need the beginning of a cache line


def measure_figures() -> MachineFigures:
    """The figures of this machine, for 1, 2, 4, ... threads and all CPUs that the process may use, whatever the number
    of threads is set to: they are kept for later processes.

    Takes one second on two cores and five on a hundred, and two more the first time ever (the loops are compiled), and
    three arrays of four times the L3 cache, 512 MB each at most.
    """
    from groupnorm._engines.cpu.peaks import ISSUE, MULTIPLY, STEP, vector_lanes

    here = describe()
    threads, counts = here.logical_cpus, [1]
    while counts[-1] < threads:
        counts.append(min(2 * counts[-1], threads))
    memory = min(max(4 * CACHES.l3, 1 << 27), _LARGEST)
    elements = memory // 4 // (STEP * counts[-1]) * STEP * counts[-1]
    arrays = tuple(_aligned(elements) for _ in range(3))
    found = []
    for count in counts:
        levels = (
            ("L1", CACHES.l1 * count, CACHES.l1 // 2),
            ("L2", CACHES.l2 * count, CACHES.l2 // 2),
            ("L3", CACHES.l3, CACHES.l3 // (2 * count)),
            ("memory", None, memory // count),
        )
        speeds = {
            "float32": _operations(MULTIPLY, arrays, count) * 2,
            "float64": _operations(MULTIPLY, tuple(a.view(np.float64) for a in arrays), count) * 2,
        }
        issued = _operations(ISSUE, arrays, count)
        found.append(
            Speeds(
                count, tuple(_level(name, size, share, arrays, count) for name, size, share in levels), speeds, issued
            )
        )
    name = f"{here.cpu}, {here.cores} cores"
    return MachineFigures(name, "cpu", "measured here", vector_lanes(), _launch_s(), tuple(found))


def _aligned(size: int) -> Array:
    """float32 ones that begin at a cache line; every page exists."""
    room = np.empty(size + _LINE // 4, np.float32)
    first = -room.ctypes.data // 4 % (_LINE // 4)
    array = room[first : first + size]
    array.fill(1.0)
    return array


def _level(name: str, capacity: int | None, share: int, arrays: Any, threads: int) -> Level:
    """Bytes per second where each thread works on `share` bytes."""
    from groupnorm._engines.cpu.peaks import COPY, READ, STEP, TRIAD, run_peak

    x, y, other = arrays
    best = []
    for kind, used in ((READ, 1), (COPY, 2), (TRIAD, 3)):
        elements = max(share // 4 // used // STEP, 1) * STEP
        moved = 4 * elements * used * threads
        ways = (False, True) if kind != READ and capacity is None else (False,)
        runs = [partial(run_peak, kind, x, y, other, elements, num_threads=threads, stream=way) for way in ways]
        best.append(max(_best(run, moved) for run in runs))
    return Level(name, capacity, *best)


def _operations(kind: int, arrays: Any, threads: int) -> float:
    """Operations on single lanes per second, in the L1 cache."""
    from groupnorm._engines.cpu.peaks import OPERATIONS, STEP, run_peak

    elements = STEP * 16
    steps = elements // STEP * threads
    lanes = STEP // 4
    x, y, other = arrays
    run = partial(run_peak, kind, x, y, other, elements, num_threads=threads)
    return _best(run, OPERATIONS[kind] * steps * lanes)


def _best(run: Callable[[int], None], amount: float) -> float:
    """The most that `run(passes)` does of `amount` in a second."""
    run(1)  # compiled, if it was not
    passes, once_s = 1, _seconds(run, 1)
    while once_s < _SAMPLE_S:
        passes = int(passes * min(max(1.3 * _SAMPLE_S / once_s, 2), 100))
        once_s = _seconds(run, passes)
    return amount * passes / min(_seconds(run, passes) for _ in range(_SAMPLES))


def _seconds(run: Callable[[int], None], passes: int) -> float:
    start = time.perf_counter()
    run(passes)
    return time.perf_counter() - start


def _launch_s() -> float:
    """Seconds of a call that has next to nothing to do."""
    from groupnorm.numpy import group_norm

    x, out = np.ones((1, 1, 1), np.float32), np.empty((1, 1, 1), np.float32)

    def calls(count: int) -> None:
        for _ in range(count):
            group_norm(x, 1, out=out)

    return min(1 / _best(calls, 1.0) for _ in range(_LAUNCHES))
