"""Measures what this machine can do at most: the loops of `_engines/cpu/peaks.py` for each cache and number of threads.

The best of several samples counts: the figures are limits, and a sample that was disturbed says nothing about a limit.
"""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from groupnorm._core.machine import CACHES, describe, memory_limit
from groupnorm._core.threads import usable_cpus
from groupnorm.analysis.figures import Level, MachineFigures, Speeds

__all__ = ["measure_figures"]

Array = Any

_SAMPLE_S = 1.5e-3  # a sample of a cache takes about this long: 7000 times what waking a thread costs
_QUIET = 6  # rounds of one sample of everything that end it, if no limit rose by more than a twentieth in any of them:
_RISE = 1.05  # what disturbs the machine for a moment costs each limit one sample, what lasts makes more rounds ...
_MOST_ROUNDS = 40  # ... up to so many
_LAUNCHES = 70  # samples of a call, whose time depends most on what else the machine does
_LARGEST = 1 << 30  # bytes of the arrays for memory, whatever the size of the L3 caches
_MEASURING = threading.Lock()
_LINE = 64  # bytes: streamed stores need the beginning of a cache line


class Work(NamedTuple):
    """run(passes) does `amount` in each pass."""

    run: Callable[[int], None]
    amount: float


def measure_figures() -> MachineFigures:
    """The figures of this machine, for 1, 2, 4, ... threads and all CPUs that the process may use, whatever the number
    of threads is set to: they are kept for later processes.

    Takes one second on two cores and five on a hundred, up to five times that where other programs disturb it, and two
    more the first time ever (the loops are compiled), and three arrays of four times the L3 caches, 1 GB each at most.
    Threads are the engine's own, since a team of PyTorch's has the size that PyTorch was told.
    """
    from groupnorm._engines.cpu.peaks import vector_lanes
    from groupnorm._engines.cpu.threads import POOL

    here = describe()
    threads, counts = usable_cpus(), [1]
    while counts[-1] < threads:
        counts.append(min(2 * counts[-1], threads))
    arrays = _arrays(counts[-1])
    with _MEASURING, POOL.own_threads():
        rates = _rates({(count, *name): work for count in counts for name, work in _works(arrays, count).items()})
    speeds = tuple(_speeds(count, rates) for count in counts)
    name = f"{here.cpu}, {here.cores} cores"
    return MachineFigures(name, "cpu", "measured here", vector_lanes(), _launch_s(), speeds)


def _arrays(threads: int) -> tuple[Array, ...]:
    """Three arrays that no cache holds (as far as there is memory), of a whole number of steps for each thread."""
    from groupnorm._engines.cpu.peaks import STEP

    elements = _memory_bytes() // 4 // (STEP * threads) * STEP * threads
    return tuple(_aligned(elements) for _ in range(3))


def _memory_bytes() -> int:
    wanted = min(max(4 * CACHES.l3_spread(CACHES.cpus), 1 << 27), _LARGEST)
    return min(wanted, memory_limit() // 8)  # three of them leave room for the program


def _aligned(size: int) -> Array:
    """float32 ones that begin at a cache line; every page exists."""
    room = np.empty(size + _LINE // 4, np.float32)
    first = -room.ctypes.data // 4 % (_LINE // 4)
    array = room[first : first + size]
    array.fill(1.0)
    return array


def _levels(threads: int) -> Iterator[tuple[str, int | None, int]]:
    """Name, bytes that all threads together have there, and bytes that each thread works on to measure it."""
    yield "L1", CACHES.l1 * threads, CACHES.l1 // 2
    yield "L2", CACHES.l2 * threads, CACHES.l2 // 2
    l3 = CACHES.l3_spread(threads)
    yield "L3", l3, max(l3 // (2 * threads), 3 * CACHES.l2 // 2)  # beyond L2 where that is larger than a share of L3
    yield "memory", None, _memory_bytes() // threads


def _works(arrays: tuple[Array, ...], threads: int) -> dict[tuple[Any, ...], Work]:
    """What is measured with so many threads: (level, loop, way of writing), and (kind of operation,)."""
    from groupnorm._engines.cpu.memory import FETCHED, PAST, THROUGH
    from groupnorm._engines.cpu.peaks import COPY, ISSUE, MULTIPLY, OPERATIONS, READ, STEP, TRIAD, run_peak

    x, y, other = arrays
    works: dict[tuple[Any, ...], Work] = {}
    for name, _, share in _levels(threads):
        for loop, kind, used in (("read", READ, 1), ("copy", COPY, 2), ("triad", TRIAD, 3)):
            elements = max(min(share // used, x.nbytes // threads) // 4 // STEP, 1) * STEP
            ways = {"L3": (THROUGH, FETCHED), "memory": (THROUGH, FETCHED, PAST)}
            for way in ways.get(name, (THROUGH,)) if kind != READ else (THROUGH,):
                run = partial(run_peak, kind, x, y, other, elements, num_threads=threads, way=way)
                works[name, loop, way] = Work(run, 4 * elements * used * threads)
    elements = STEP * 16  # operations alone: in the L1 cache
    for name, kind, of in (("float32", MULTIPLY, x), ("float64", MULTIPLY, x.view(np.float64)), ("issued", ISSUE, x)):
        run = partial(run_peak, kind, of, y, other, elements, num_threads=threads)
        works[(name,)] = Work(run, OPERATIONS[kind] * 16 * threads * (STEP // 4))
    return works


def _speeds(threads: int, rates: dict[tuple[Any, ...], float]) -> Speeds:
    """`rates` of what _works lists, each name behind its number of threads, as they are kept."""
    levels = []
    for name, capacity, _ in _levels(threads):
        loops = [
            max(rate for work, rate in rates.items() if work[:3] == (threads, name, loop))
            for loop in ("read", "copy", "triad")
        ]
        levels.append(Level(name, capacity, *loops))
    flops = {dtype: 2 * rates[threads, dtype] for dtype in ("float32", "float64")}  # a multiply-add is two operations
    return Speeds(threads, tuple(levels), flops, rates[threads, "issued"])


def _rates(works: dict[Any, Work]) -> dict[Any, float]:
    """The most that each does of its amount in a second: in turns, as many as it takes until limits stop rising."""
    passes = {name: _passes(work.run) for name, work in works.items()}
    best = dict.fromkeys(works, 0.0)
    quiet = rounds = 0
    while quiet < _QUIET and rounds < _MOST_ROUNDS:
        quiet, rounds = quiet + 1, rounds + 1
        for name, (run, amount) in works.items():
            rate = amount * passes[name] / _seconds(run, passes[name])
            if rate > _RISE * best[name]:
                quiet = 0
            best[name] = max(best[name], rate)
    return best


def _passes(run: Callable[[int], None]) -> int:
    """Passes that take about as long as a sample."""
    run(1)  # compiled, if it was not
    passes, once_s = 1, _seconds(run, 1)
    while once_s < _SAMPLE_S:
        passes = int(passes * min(max(1.3 * _SAMPLE_S / once_s, 2), 100))
        once_s = _seconds(run, passes)
    return passes


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

    passes = _passes(calls)
    return min(_seconds(calls, passes) for _ in range(_LAUNCHES)) / passes
