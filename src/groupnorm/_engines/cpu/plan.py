"""How a problem will be done: a pure function from (problem, threads, caches) to a Plan that explains itself.

Two roads for each layout. *Whole*: a task takes a group (channels first) or a slab of channels of a sample (channels
last) through all phases while it is in cache. *Phases*: one launch per phase over pieces of all groups, for few and
large groups. Both cut the data at the same places, so they give the same bits.
"""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import llvmlite.binding as llvm
import numpy as np

from groupnorm._core.machine import CACHES
from groupnorm._core.problem import Problem
from groupnorm._engines.cpu import channels_first, channels_last, parameters
from groupnorm._engines.cpu.epilogue import ACTIVATION_CODES
from groupnorm._engines.cpu.memory import CODES, FETCHED, PAST, THROUGH
from groupnorm._engines.cpu.records import FROM_MOMENTS, PLAN, SHAPED
from groupnorm._engines.cpu.simd import LANES
from groupnorm._engines.cpu.statistics import FEW
from groupnorm._engines.cpu.threads import MAX_WORKERS

__all__ = ["Launch", "Plan", "make_plan"]

# elements: channels first, 16 to a lane; beside one outlier of 1e5 std a lane loses 5 roundings, with 64 to a lane 22
_CHUNK = 1024
_UNIT = 8 * _CHUNK  # elements: channels first, smallest unit; float32 ones fit the L1 cache for a second reading
_TOGETHER = 1 << 12  # elements: channels first, groups taken through each phase together; x and y fit the L1 cache
_PART = 1 << 18  # elements: channels first, largest unit, so that one huge channel feeds many threads
_UNIT_LAST = 1 << 16, 1 << 18  # elements: channels last, smallest and largest unit; large ones 1.03 to 1.36x as fast
_UNITS = 16  # channels last, units of a sample that is large enough: work for so many threads
_FEW_ROWS = 8  # channels last, rows whose groups are summed at once; with 16 64x64x3x3 took 92 us, with 8 61
_TASK = 1 << 14  # elements: smallest task; 5 us of work against 0.2 us for taking a task
_SERIAL = 1 << 15  # elements for each thread that takes part; below, waking one costs more than it saves
_TASKS_PER_THREAD = 4  # so that a thread that is put aside delays the end by a quarter at most
_SLAB = 128  # bytes: narrowest slab; strips of 64 bytes took twice as long as whole rows
_COSTLY = {"silu", "gelu", "gelu_tanh", "sigmoid", "tanh"}  # activations whose slopes take an exponential
_KEPT = "slopes are costly and dz fits the cache: it is computed once and kept"
_WAYS = {THROUGH: "through the cache", PAST: "past the cache (non-temporal stores)",
         FETCHED: "through the cache, lines fetched ahead"}  # fmt: skip
# Cores that wait longest for L3, and gain if lines are fetched before they are written there: on a Cascade Lake,
# 2x320x64x64 forward takes 0.79 of the time in float32, channels last 0.82, backward 0.91, in bfloat16 the same.
_SLOW_L3 = llvm.get_host_cpu_name() in {"skylake-avx512", "cascadelake", "cooperlake"}
_STREAMED_RUN = 2048  # bytes: channels first, shortest run that is written past the cache and not in whole lines


@dataclass(frozen=True, slots=True)
class Launch:
    """One job for the pool: the record that its kernel reads, and the threads it may use."""

    name: str
    record: Any = field(repr=False)
    address: int = field(repr=False)
    tasks: int
    threads: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How the CPU engine does a problem: launches in order, and the memory they need beside the arrays of the call."""

    problem: Problem
    road: str
    reasons: tuple[str, ...]
    launches: tuple[Launch, ...]
    work: int  # float64 numbers of moments of units
    sums: int  # float64 numbers of sums of backward
    rows: int  # lane numbers of planes, channels last
    kept: int  # float64 numbers in whose place dz is kept between two phases of backward
    statistics: "Plan | None"  # backward in phases without given statistics: what computes them first
    way: int  # of writing y or dx, where that has been written before
    threads: int = 1
    scratch: int = field(init=False)  # work, sums, rows and kept

    def __post_init__(self) -> None:
        object.__setattr__(self, "scratch", self.work + self.sums + self.rows + self.kept)

    def __str__(self) -> str:
        p = self.problem
        lines = [
            f"{p.task}: N={p.N} C={p.C} S={p.S} G={p.G}, {p.dtype}, channels {'last' if p.channels_last else 'first'}",
            f"road: {self.road}",
            *(f"  because {reason}" for reason in self.reasons),
            *(f"launch {i}: {x.name}, {x.tasks} tasks on {x.threads} threads" for i, x in enumerate(self.launches, 1)),
            f"memory beside the arrays: {8 * self.scratch} bytes",
            f"output: {_WAYS[self.way]}",
        ]
        return "\n".join(lines)


def make_plan(problem: Problem, num_threads: int) -> Plan:
    """The plan for a problem on `num_threads` threads; compiles the kernels it needs."""
    if problem.N * problem.S == 0:
        return Plan(problem, "empty", ("there are no elements",), (), 0, 0, 0, 0, None, THROUGH)
    return (_last if problem.channels_last else _first)(problem, num_threads)


def _first(p: Problem, num_threads: int) -> Plan:
    last_channels = p.C - (p.G - 1) * p.D
    parts = -(-p.S // _PART)
    unit = max(1, _UNIT // p.S) if parts == 1 else 1
    units = -(-last_channels // unit) * parts
    part = -(-p.S // (parts * LANES)) * LANES
    chunk = _CHUNK // 2 if p.dtype == "float64" else _CHUNK
    # Four accumulators share a row's vectors but for the last, which the first takes, as it takes all under a mask.
    fours, rest = (0, p.S) if p.mask else divmod(p.S, 4 * LANES)
    chunk_rows = max(1, chunk // (4 * LANES) // (fours + -(-rest // LANES)))
    if p.mask:
        chunk //= 4
    cut = {
        "unit": unit, "parts": parts, "part": part, "units": units, "chunk": chunk, "chunk_rows": chunk_rows,
        "few": int(last_channels * p.S <= FEW and p.walks["x"].c == p.S and p.dtype != "float64"),
        "dense": int(p.S < LANES and all(walk.c == p.S for walk in p.walks.values())),
    }  # fmt: skip
    threads = _threads(p, num_threads)
    groups = p.N * p.G
    whole = p.dx and _balanced(groups, threads)
    backward = p.task == "backward"
    reasons = [f"{groups} groups of {last_channels * p.S} elements for {threads} threads"]
    per_group = p.D * p.S
    groups_per_task = _per_task(groups, per_group, threads)
    # While an activation is computed memory is idle, and the next group is fetched; else that would be in the way.
    arrays = 2 if backward else 1
    if whole and p.activation and 3 * arrays * last_channels * p.S * p.itemsize <= CACHES.l2:
        cut["ahead"] = p.D
        groups_per_task = max(1, groups // (_TASKS_PER_THREAD * threads))
    if whole and _keeps(p, last_channels * p.S, threads):
        cut["kept"] = -(-last_channels * p.S // LANES) * LANES
        reasons.append(_KEPT)
    units_per_task = _per_task(groups * units, max(per_group // units, 1), threads)
    by_group = (-(-groups // groups_per_task), groups_per_task * units)
    by_unit = (-(-groups * units // units_per_task), units_per_task)
    together = max(1, min(int(LANES), _TOGETHER // (last_channels * p.S * arrays)))
    maker = _Maker(p, cut, channels_first)
    both = channels_first.MOMENTS + channels_first.MERGE + channels_first.APPLY
    if whole:
        reasons.append("groups keep all threads busy: each is taken through all phases while it is in cache")
        launches = [maker.launch("groups", both, *by_group, threads, together * units)]
    elif backward:
        launches = [maker.launch("sums", channels_first.SUMS, *by_unit, threads),
                    maker.launch("merge", channels_first.MERGE, *by_group, threads, units)]  # fmt: skip
        if p.dx:
            launches.append(maker.launch("gradient", channels_first.APPLY, *by_unit, threads))
    elif p.task == "normalize":
        launches = [maker.launch("normalize", channels_first.APPLY, *by_unit, threads)]
    else:
        step = (*by_group, threads, units) if p.task == "moments" else (*by_unit, threads)
        launches = [
            maker.launch("moments", channels_first.MOMENTS, *by_unit, threads),
            maker.launch("merge", channels_first.MERGE, *by_group, threads, units),
            maker.launch("normalize", channels_first.APPLY, *step),
        ]
    return maker.plan(whole, reasons, launches, work=0 if whole else groups * 2 if backward else groups * units * 4,
                      sums=p.N * p.C * parts * 3, together=together)  # fmt: skip


def _last(p: Problem, num_threads: int) -> Plan:
    tile = channels_last.TILE
    smallest, largest = _UNIT_LAST
    unit = max(1, min(max(smallest, p.C * p.S // _UNITS), largest) // p.C // tile) * tile
    units = -(-p.S // unit)
    threads = _threads(p, num_threads)
    slab = _slab(p, threads)
    few = int(p.S <= _FEW_ROWS and p.dtype != "float64")  # then what is done by channel would take longer than the rows
    cut = {"unit": unit, "units": units, "parts": units, "slab": slab, "few": few}
    slabs = p.N * max(p.C // slab, 1)
    whole = p.dx and _balanced(slabs, threads)
    reasons = [f"{slabs} slabs of {slab} channels for {threads} threads"]
    if whole and _keeps(p, slab * p.S, threads):
        cut["kept"] = -(-slab * p.S // LANES) * LANES
        reasons.append(_KEPT)
    maker = _Maker(p, cut, channels_last)
    backward = p.task == "backward"
    moments, merge, apply = channels_last.MOMENTS, channels_last.MERGE, channels_last.APPLY
    units_per_task = _per_task(p.N * units, p.C * unit, threads)
    by_unit = (-(-p.N * units // units_per_task), units_per_task)
    by_sample = (p.N, 1)
    slots = p.N
    if whole:
        reasons.append("slabs keep all threads busy: each is taken through all phases while it is in cache")
        slabs_per_task = slabs if threads == 1 else max(1, slabs // (_TASKS_PER_THREAD * threads))
        slots = -(-slabs // slabs_per_task)  # tasks, each with one place for what it keeps about the slab at hand
        launches = [maker.launch("slabs", moments + merge + apply, slots, slabs_per_task, threads)]
    elif backward:
        launches = [maker.launch("planes", channels_last.PLANES, *by_sample, threads),
                    maker.launch("sums", channels_last.SUMS, *by_unit, threads),
                    maker.launch("merge", merge, *by_sample, threads)]  # fmt: skip
        if p.dx:
            launches.append(maker.launch("gradient", apply, *by_unit, threads))
    else:
        launches = [] if p.task == "normalize" else [maker.launch("moments", moments, *by_unit, threads)]
        launches.append(maker.launch("merge", merge, *by_sample, threads))
        if p.task != "moments":
            launches.append(maker.launch("normalize", apply, *by_unit, threads))
    planes = channels_last.BACKWARD_PLANES if backward else channels_last.FORWARD_PLANES
    return maker.plan(
        whole, reasons, launches, work=0 if p.stats or p.task == "normalize" else slots * units * 3 * p.C,
        sums=p.N * units * 3 * p.C, rows=0 if p.task == "moments" else slots * planes * p.C,
    )  # fmt: skip


class _Maker:
    """Fills the records of a plan's launches."""

    def __init__(self, problem: Problem, cut: dict[str, int], kernels: Any) -> None:
        self.problem, self.cut = problem, cut
        codes = (CODES[problem.dtype], ACTIVATION_CODES[problem.activation], "residual" in problem.walks, problem.mask)
        if problem.task == "backward":
            self.kernel = kernels.backward_kernel(*codes, "kept" in cut)
        else:
            self.kernel = kernels.forward_kernel(*codes)

    def launch(
        self, name: str, phase: int, tasks: int, per_task: int, threads: int, block: int = 1, kernel: Any = None
    ) -> Launch:
        p = self.problem
        record = np.zeros((), PLAN)
        threads = max(1, min(threads, tasks))
        values = {
            "kernel": (kernel or self.kernel).address, "tasks": tasks, "workers": threads - 1, "phase": phase,
            "per_task": per_task, "block": block, "N": p.N, "C": p.C, "S": p.S, "G": p.G, "D": p.D, "eps": p.eps,
            "stats": p.stats or p.task == "normalize", **self.cut,
            **{name: CODES[getattr(p, name)] for name in ("weight", "bias", "scale", "shift")},
        }  # fmt: skip
        for array in SHAPED:
            if array in p.walks:
                values |= {f"{array}_{axis}": step for axis, step in zip("ncs", p.walks[array], strict=True)}
        for field_name, value in values.items():
            record[field_name] = value
        return Launch(name, record, record.ctypes.data, tasks, threads)

    def plan(
        self, whole: bool, reasons: list[str], launches: list[Launch], work: int, sums: int, rows: int = 0,
        together: int = 1,
    ) -> Plan:  # fmt: skip
        p = self.problem
        backward = p.task == "backward"
        if backward and any((p.weight, p.bias, p.scale, p.shift)):
            tasks = -(-p.C // parameters.CHANNELS_PER_TASK)
            threads = 1 if p.N * p.C < _SERIAL else launches[0].threads
            launches = [
                *launches,
                self.launch("parameters", 0, tasks, 1, threads, kernel=parameters.parameters_kernel()),
            ]
        statistics = None
        if backward and not p.stats and not whole:
            moments = replace(p, task="moments", walks={"x": p.walks["x"]}, activation=None, weight=None, bias=None,
                              scale=None, shift=None)  # fmt: skip
            statistics = make_plan(moments, max(launch.threads for launch in launches))
            for launch in launches:
                launch.record["stats"] = FROM_MOMENTS
        for launch, following in pairwise(launches):
            launch.record["next"] = following.address
        road = "whole" if whole else "phases"
        sums = sums if backward else 0
        kept = 0
        if "kept" in self.cut:  # and a cache line, so that the first one can begin there
            kept = launches[0].threads * together * self.cut["kept"] // (1 if p.dtype == "float64" else 2) + 8
        most = max(launch.threads for launch in launches)
        return Plan(p, road, tuple(reasons), tuple(launches), work, sums, rows, kept, statistics, _way(p, most),
                    most)  # fmt: skip


def _way(p: Problem, threads: int) -> int:
    """How the output is written. Past the cache where it does not fit there together with what is read (before that,
    whoever reads it next would miss it: 2x320x64x64 backward and a sum of dx, 0.78x), and if its runs are long or whole
    lines, since parts of lines are slow to write so (32x1024x14x14 forward 0.79x, 7x7 0.72x, 28x28 1.16x). Its lines
    are fetched ahead where they lie in the L3 cache and that is slow.
    """
    arrays = {"moments": 0, "backward": 3}.get(p.task, 2)
    run = p.S * p.itemsize
    size = arrays * p.N * p.C * run
    whole_lines = p.channels_last or run % 64 == 0 or run >= _STREAMED_RUN
    if size >= CACHES.l3_of(threads) and whole_lines:
        return PAST
    return FETCHED if _SLOW_L3 and size > CACHES.l2 * threads else THROUGH


def _threads(p: Problem, num_threads: int) -> int:
    return max(1, min(num_threads, MAX_WORKERS + 1, p.N * p.C * p.S // _SERIAL))


def _balanced(pieces: int, threads: int) -> bool:
    """Whether whole pieces keep the threads busy: the busiest has at most a fifth more than its share."""
    return -(-pieces // threads) * threads <= 1.2 * pieces


def _keeps(p: Problem, elements: int, threads: int) -> bool:
    """Whether backward keeps dz of the pieces of so many elements that it has at hand between its phases, in lane type,
    instead of computing it twice: where the slope of the activation is costly (0.45 ns, against 0.1 for keeping), and
    x, dy and dz of a piece fit the L2 cache, or these and dx of all threads the L3 cache.
    """
    if p.task != "backward" or p.activation not in _COSTLY:
        return False
    lane = 8 if p.dtype == "float64" else 4
    in_l2 = elements * (2 * p.itemsize + lane) <= CACHES.l2
    return in_l2 or elements * (3 * p.itemsize + lane) * threads <= CACHES.l3_of(threads)


def _per_task(pieces: int, elements: int, threads: int) -> int:
    """Pieces of `elements` elements in a task: enough to be worth taking, few enough to share out evenly."""
    worth = -(-_TASK // max(elements, 1))
    return max(1, min(worth, -(-pieces // (_TASKS_PER_THREAD * threads)))) if threads > 1 else pieces


def _slab(p: Problem, threads: int) -> int:
    """Channels of a slab: all where the samples at hand stay in half of the L3 cache, since whole rows are read from
    there faster than strips of them (1x512x64x64 backward, 530 us against 800); else whole groups and whole vectors, as
    many as stay in the L2 cache; all where no slab fits or where the last group is larger than the others.
    """
    arrays = 2 if p.task == "backward" else 1
    smallest = int(np.lcm(p.D, _SLAB // p.itemsize))
    bytes_of_channel = p.S * p.itemsize * arrays
    in_l3 = p.C * bytes_of_channel * min(threads, p.N) * 2 <= CACHES.l3_of(threads)
    if in_l3 or p.uneven or p.C % smallest or smallest * bytes_of_channel > CACHES.l2:
        return p.C
    slab = smallest
    while p.C % (slab * 2) == 0 and slab * 2 * bytes_of_channel <= CACHES.l2:
        slab *= 2
    return slab
