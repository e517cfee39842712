"""Predicts how long the CPU engine takes, from machine figures: a model of what it does, not a measurement.

Two passes over the data. The first reads everything where it lies; the second finds what a group (channels last: a
sample) needs again in the cache that holds it, if every thread has a group of its own, and writes the result. Where
data lies: as much as fits in each cache is taken to be there from before, as it is when a network's layers follow each
other. The time is a sum of terms, each in seconds at the machine's peaks, times how many such peaks' worth the kernels
need: `EFFORTS`, fitted to the records under results/ by `groupnorm.bench.fit`. docs/roofline.md shows prediction and
measurement for each record.
"""

from typing import NamedTuple

from groupnorm._core.traffic import ITEM_BYTES
from groupnorm.analysis.figures import Level, Speeds
from groupnorm.analysis.operations import operations_per_element

__all__ = ["EFFORTS", "Terms", "move_s", "predicted_seconds", "terms"]


class Terms(NamedTuple):
    """Parts of a call's time; as EFFORTS, what each is multiplied by (for groups and channels: seconds of one)."""

    caches: float  # moving what caches hold
    memory: float  # moving what they do not
    operations: float  # loads, stores and arithmetic
    conversion: float  # from and to 16 bits
    activation: float
    groups: float  # closing the sums of one group
    channels: float  # and of one channel


EFFORTS = {  # (channels last, direction); machine: AMD EPYC, 2 cores, November 2026
    (False, "forward"): Terms(1.65, 1, 0.687, 2.19, 1.52, 53.1e-9, 3.94e-9),
    (False, "backward"): Terms(1.93, 1, 0.5, 1.17, 2.4, 353e-9, 18.6e-9),
    (True, "forward"): Terms(2.39, 1, 0.5, 1.95, 1.04, 304e-9, 0.192e-9),
    (True, "backward"): Terms(2.49, 1, 0.5, 1.7, 2.93, 371e-9, 10.4e-9),
}


def move_s(moved_bytes: float, held_bytes: float, levels: tuple[Level, ...], loop: str) -> list[float]:
    """Seconds to move bytes of arrays that hold `held_bytes`, for each level: what fits the caches moves at their
    speeds. loop: "read", "copy", "triad", or "best" of these.
    """
    seconds, below = [], 0.0
    for level in levels:
        capacity = held_bytes if level.capacity_bytes is None else min(held_bytes, level.capacity_bytes)
        share = max(capacity - below, 0.0) / held_bytes if held_bytes else 0.0
        seconds.append(moved_bytes * share / getattr(level, f"{loop}_bytes_per_s"))
        below = max(below, capacity)
    return seconds


def terms(
    N: int, C: int, S: int, G: int, *, dtype: str, channels_last: bool, direction: str, activation: str | None,
    speeds: Speeds,
) -> Terms:  # fmt: skip
    """The parts of one call's time at the machine's peaks, before EFFORTS."""
    elements, threads = N * C * S, speeds.threads
    array = elements * ITEM_BYTES[dtype]
    inputs = 1 if direction == "forward" else 2
    held = (inputs + 1) * array
    pieces = N if channels_last else N * G
    again = min(held, inputs * array * threads / pieces) if pieces >= threads else held
    levels = speeds.levels
    passes = (move_s(inputs * array, held, levels, "read"), move_s(inputs * array, again, levels, "read"),
              move_s(array, held, levels, "copy"))  # fmt: skip
    by_level = [sum(seconds) for seconds in zip(*passes, strict=True)]
    counted = operations_per_element(direction, activation, dtype)
    second = elements * (2 if dtype == "float64" else 1) / speeds.operations_per_s
    return Terms(
        caches=sum(by_level[:-1]),
        memory=by_level[-1],
        operations=second * (counted["load"] + counted["store"] + counted["arithmetic"]),
        conversion=second * counted["conversion"],
        activation=second * counted["activation"],
        groups=N * G / threads,
        channels=N * C / threads,
    )


def predicted_seconds(
    N: int, C: int, S: int, G: int, *, dtype: str, channels_last: bool, direction: str, activation: str | None,
    speeds: Speeds, launch_s: float, threads: int | None = None,
) -> float:  # fmt: skip
    """Seconds that the CPU engine is predicted to take for one call. threads: perhaps fewer than `speeds` are for,
    which use up the memory's speed as well.
    """
    if N * S == 0:
        return launch_s
    found = terms(N, C, S, G, dtype=dtype, channels_last=channels_last, direction=direction, activation=activation,
                  speeds=speeds)  # fmt: skip
    more = max(1.0, speeds.threads / (threads or speeds.threads))
    found = Terms(*(more * term for term in found))._replace(memory=found.memory)
    efforts = EFFORTS[channels_last, direction]
    return launch_s + sum(term * effort for term, effort in zip(found, efforts, strict=True))
