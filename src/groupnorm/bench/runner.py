"""Runs the benchmark: prepare every rival, verify it, time all of them in turns with the copies, make records."""

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import import_module, util
from typing import Any

import groupnorm as gn
from groupnorm._core.machine import Machine, describe, versions
from groupnorm.bench.cases import Case
from groupnorm.bench.copies import STREAMED, copies
from groupnorm.bench.ready import Ready, Unsupported
from groupnorm.bench.records import Record
from groupnorm.bench.rivals import Rival
from groupnorm.bench.timing import Timing, measure, measure_cold
from groupnorm.bench.work import TOLERANCE, Work, worst_error

__all__ = ["measure_work", "run", "works"]


def works(
    cases: Iterable[Case], *, dtypes: Iterable[str], layouts: Iterable[str], directions: Iterable[str],
    activations: Iterable[str], threads: int,
) -> Iterator[Work]:  # fmt: skip
    """Every combination. An activation is a name, "none", or "model": the one that the case's network has."""
    for case in cases:
        chosen = [{"none": None, "model": case.activation}.get(name, name) for name in activations]
        for dtype in dtypes:
            for layout in layouts:
                for direction in directions:
                    for activation in dict.fromkeys(chosen):
                        yield Work(case, dtype, layout, direction, activation, threads)


def run(
    todo: Iterable[Work], rivals: Iterable[Rival], *, budget_s: float = 1.0, cold: bool = False,
    report: Callable[[list[Record]], Any] = lambda records: None,
) -> list[Record]:  # fmt: skip
    """The records of all work, in its order; `report` sees those of each piece of work as soon as they exist."""
    machine, before = describe(), gn.get_num_threads()
    torch: Any = import_module("torch") if util.find_spec("torch") is not None else None
    torch_before = torch.get_num_threads() if torch else None
    found: list[Record] = []
    try:
        for work in todo:
            if torch:
                torch.set_num_threads(work.threads)
            records = measure_work(work, tuple(rivals), machine, budget_s=budget_s, cold=cold)
            found += records
            report(records)
            gc.collect()  # tensors of 140 MB times eight rivals
    finally:
        gn.set_num_threads(before)
        if torch:
            torch.set_num_threads(torch_before)
    return found


@dataclass(slots=True)
class _Entry:
    rival: Rival
    ready: Ready | None = None
    status: str = "ok"
    reason: str | None = None
    error: float | None = None


def measure_work(
    work: Work, rivals: tuple[Rival, ...], machine: Machine, *, budget_s: float = 1.0, cold: bool = False
) -> list[Record]:
    """One record for each rival; one that fails or is wrong is recorded with the reason and not timed."""
    entries = [_verified(rival, work) for rival in rivals]
    running = {entry.rival.name: entry.ready.run for entry in entries if entry.ready is not None}
    yardsticks = copies(work.x, work.threads)
    times = measure({**yardsticks, **running}, budget_s=budget_s)
    cold_times: dict[str, float] = {}
    if cold and 2 * work.x.nbytes < machine.largest_cache_bytes:  # beyond the caches every call is a cold one
        cold_times = measure_cold(running, machine.largest_cache_bytes)
    copy = min((name for name in yardsticks if name != STREAMED), key=lambda name: times[name].median_s)
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return [_record(entry, work, machine, times, cold_times.get(entry.rival.name), copy, date) for entry in entries]


def _verified(rival: Rival, work: Work) -> _Entry:
    entry = _Entry(rival)
    try:
        ready = rival.prepare(work)
        entry.error = worst_error(ready.arrays(ready.run()), work.expected)
    except Unsupported as reason:
        entry.status, entry.reason = "unsupported", str(reason)
    except Exception as error:  # whatever a rival raises goes into its record
        text = str(error).strip() or "no message"
        entry.status, entry.reason = "failed", f"{type(error).__name__}: {text.splitlines()[0]}"[:300]
    else:
        if entry.error <= TOLERANCE[work.dtype]:
            entry.ready = ready
        else:
            entry.status = "failed"
            entry.reason = (
                f"wrong result: error {entry.error:.1e} of the largest value, allowed {TOLERANCE[work.dtype]:.1e}"
            )
    return entry


def _record(
    entry: _Entry, work: Work, machine: Machine, times: dict[str, Timing], cold_s: float | None, copy: str, date: str
) -> Record:
    time = times.get(entry.rival.name)
    copied = 2 * work.x.nbytes
    bandwidth = copied / times[copy].median_s
    finite = entry.error is not None and entry.error != float("inf")
    return Record(
        machine={"slug": machine.slug, **asdict(machine)},
        versions=versions(entry.rival.packages),
        date=date,
        case=work.case.name, shape=list(work.case.shape), num_groups=work.case.num_groups,
        dtype=work.dtype, layout=work.layout, direction=work.direction, activation=work.activation,
        threads=work.threads,
        rival=entry.rival.name, status=entry.status, ok=entry.status == "ok", reason=entry.reason,
        error=_rounded(entry.error) if finite else None,
        median_s=_rounded(time.median_s if time else None), q1_s=_rounded(time.q1_s if time else None),
        q3_s=_rounded(time.q3_s if time else None),
        repeats=time.repeats if time else 0,
        cold_s=_rounded(cold_s),
        bytes=work.minimum_bytes,
        copy=copy, copy_s=float(f"{times[copy].median_s:.5g}"), copy_bandwidth=float(f"{bandwidth:.5g}"),
        stream_bandwidth=_rounded(copied / times[STREAMED].median_s if STREAMED in times else None),
        percent_of_copy=_rounded(100 * work.minimum_bytes / time.median_s / bandwidth if time else None),
    )  # fmt: skip


def _rounded(value: float | None) -> float | None:
    """Five digits: more is noise, and makes records hard to compare by eye."""
    return None if value is None else float(f"{value:.5g}")
