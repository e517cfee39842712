"""Times of several callables taken in turns: median, quartiles, and how often each one ran.

Machines drift (other processes, clock, temperature), so contestants are never timed one after the other. They take
turns, in one order and then in the reverse, and what is compared was measured within the same second.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Timing", "measure", "measure_cold", "measure_long"]

_CLOCK_S = 100e-6  # a sample takes at least this long: 1000 times what reading the clock costs
_STATELESS_S = 20e-3  # what takes longer does not depend on what was in the caches before
_PAUSE_S = (
    1e-3  # between contestants: idle OpenMP workers spin for about that long and would take a core from the next one
)
_MAX_SAMPLES = 200


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call. `repeats` is the number of samples, each the mean of `calls` calls."""

    median_s: float
    q1_s: float
    q3_s: float
    repeats: int
    calls: int


def measure(
    contestants: Mapping[str, Callable[[], Any]], *, budget_s: float = 1.0, min_repeats: int = 5
) -> dict[str, Timing]:
    """Warm times of each contestant, all taken in turns.

    budget_s: seconds of samples for each contestant; at least `min_repeats` are taken in any case. Before every
    sample of a short callable one call goes unmeasured, so that each finds its own data in the caches.
    """
    calls = {name: _calibrate(run) for name, run in contestants.items()}
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    while order:
        for name in order:
            count, expected_s = calls[name]
            time.sleep(_PAUSE_S)
            if expected_s < _STATELESS_S:
                contestants[name]()
            samples[name].append(_sample(contestants[name], count))
        order = [name for name in reversed(order) if _wants_more(samples[name], calls[name][0], budget_s, min_repeats)]
    return {name: _summary(taken, calls[name][0]) for name, taken in samples.items()}


def measure_long(contestants: Mapping[str, Callable[[], Any]], *, repeats: int = 3) -> dict[str, Timing]:
    """The same for callables that were called before and take many seconds: so many calls each, in turns."""
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for _ in range(repeats):
        for name in order:
            samples[name].append(_sample(contestants[name], 1))
        order.reverse()
    return {name: _summary(taken, 1) for name, taken in samples.items()}


def measure_cold(
    contestants: Mapping[str, Callable[[], Any]], cache_bytes: int, *, repeats: int = 5
) -> dict[str, float]:
    """Median seconds of one call with nothing of its data in a cache: a larger array is rewritten before each call."""
    sweep = np.zeros(max(1 << 20, 2 * cache_bytes // 8))
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for _ in range(repeats):
        for name in order:
            np.add(sweep, 1.0, out=sweep)
            samples[name].append(_sample(contestants[name], 1))
        order.reverse()
    return {name: statistics.median(taken) for name, taken in samples.items()}


def _calibrate(run: Callable[[], Any]) -> tuple[int, float]:
    """Calls per sample, and seconds of one call. The first call compiles, the second allocates; neither counts."""
    run()
    run()
    once_s = _sample(run, 1)
    count = 1
    while once_s * count < _CLOCK_S:
        count = max(count + 1, int(1.2 * _CLOCK_S / max(once_s, 1e-9)))
        once_s = _sample(run, count)
    return count, once_s


def _wants_more(samples: list[float], calls: int, budget_s: float, min_repeats: int) -> bool:
    return len(samples) < min_repeats or (sum(samples) * calls < budget_s and len(samples) < _MAX_SAMPLES)


def _sample(run: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _summary(samples: list[float], calls: int) -> Timing:
    q1_s, median_s, q3_s = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return Timing(median_s, q1_s, q3_s, len(samples), calls)
