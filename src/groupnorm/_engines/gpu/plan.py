"""How a problem will be done: a pure function from (problem, device) to a Plan that explains itself.

Groups are taken up in slabs, slabs are cut into parts (see `tiles.py`), and the regime follows from how large a slab
is:

    resident   it fits one multiprocessor              x is read once
    clustered  it fits a cluster of multiprocessors    x is read once
    split      it fits all multiprocessors             x is read once, programs wait for each other
    ticketed   it fits L2                              x is read twice, once from memory
    two_pass   it is larger than that                  x is read twice
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from groupnorm._core.problem import Problem
from groupnorm._engines.gpu.compiler import INTERPRETED
from groupnorm._engines.gpu.cut import (
    MOST_CHANNELS,
    MOST_PARTS,
    MOST_WARPS,
    Cut,
    above,
    cut_busily,
    cut_slabs,
    groups_of_slab,
    held_elements,
    layout_of,
    most_held,
    vector_of,
    wants_sums,
    warps_for,
)
from groupnorm._engines.gpu.device import Device
from groupnorm.errors import EngineError

__all__ = ["REGIMES", "Launch", "Plan", "make_plan", "refusal"]

REGIMES = ("resident", "clustered", "split", "ticketed", "two_pass")

_REGISTERS = 128  # of a thread, so that 16 warps fit a multiprocessor; unasked ptxas takes fewer and spills instead
_LEAST = 1 << 10  # elements on a multiprocessor below which a slab is not spread over more of them
_SUM_ROWS, _SUM_CHANNELS = 256, 8  # the tile of the kernels that sum up gradients of parameters


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: a kernel by name, its grid, the numbers it is given, and those it is compiled for; warps of a
    program, for each of the multiprocessors that it has (more than one: a cluster).
    """

    kernel: str
    grid: tuple[int, ...]
    numbers: dict[str, int]
    constants: dict[str, Any]
    warps: int
    multiprocessors: int = 1
    cooperative: bool = False
    most_registers: int | None = None  # of a thread


@dataclass(frozen=True, slots=True)
class Plan:
    """How the GPU engine does a problem: launches in order, and the memory they need beside the arrays of the call."""

    problem: Problem
    device: Device
    regime: str
    reasons: tuple[str, ...]
    launches: tuple[Launch, ...]
    counters: int = 0  # int32 numbers, 0 before and after
    partials: int = 0  # numbers in the type of the arithmetic
    sums: int = 0
    totals: int = 0
    lost: int = 0  # of given means: by how much xhat is off
    statistics: "Plan | None" = None  # backward without given statistics: what computes them first
    statistics_kept: bool = False  # mean, low and rstd have to be kept, whether or not the call wants them
    float_bytes: int = 4  # of one number in the type of the arithmetic
    without: frozenset[str] = frozenset()  # regimes that were not to be
    ready: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # what `launch.py` keeps

    def __str__(self) -> str:
        p = self.problem
        lines = [
            f"{p.task}: N={p.N} C={p.C} S={p.S} G={p.G}, {p.dtype}, channels {'last' if p.channels_last else 'first'}",
            f"device: {self.device.name}, {self.device.multiprocessors} multiprocessors",
            f"regime: {self.regime}",
            *(f"  because {reason}" for reason in self.reasons),
            *(f"launch {i}: {x.kernel}, grid {'x'.join(map(str, x.grid))}, {x.warps} warps"
              f"{f' on each of {x.multiprocessors} multiprocessors' * (x.multiprocessors > 1)}"
              f"{', cooperative' * x.cooperative}" for i, x in enumerate(self.launches, 1)),
            f"memory beside the arrays: {4 * self.counters + self.float_bytes * self.floats} bytes",
        ]  # fmt: skip
        return "\n".join(lines)

    @property
    def floats(self) -> int:
        """Numbers in the type of the arithmetic that lie beside the arrays of the call."""
        kept = 3 * self.problem.N * self.problem.G if self.statistics_kept else 0
        return self.partials + self.sums + self.totals + self.lost + kept


def refusal(p: Problem) -> str | None:
    """Why the engine cannot take a problem, or None."""
    if p.uneven and p.C % p.G:
        return f"groups must be of one size: got {p.C} channels in {p.G} groups"
    if p.S >= 1 << 31:
        return f"channels of 2^31 positions and more have no 32-bit places: got {p.S}"
    if layout_of(p) == "last" and p.D > MOST_CHANNELS:
        return f"groups, channels last, may have {MOST_CHANNELS} channels: got {p.D}"
    if p.channels_last:
        dense = {"n": p.S * p.C, "c": 1, "s": p.C}
    else:
        dense = {"n": p.C * p.S, "c": p.S, "s": 1}
    sizes = {"n": p.N, "c": p.C, "s": p.S}
    for name, walk in p.walks.items():
        steps = {"n": walk.n, "c": walk.c, "s": walk.s}
        if p.N * p.S and any(sizes[axis] > 1 and steps[axis] != dense[axis] for axis in "ncs"):
            return f"{name} must be dense, and lie in memory as x does: got the steps {tuple(walk)}"
    return None


def make_plan(p: Problem, device: Device, regime: str | None = None, *, without: frozenset[str] = frozenset()) -> Plan:
    """The plan for a problem on a device; with a regime, in that one; `without`: in none of these. Raises EngineError
    where the regime cannot be.
    """
    if p.N * p.S == 0:
        return Plan(p, device, "empty", ("there are no elements",), ())
    plan = next(iter(_plans(p, device, regime, without)), None)
    if plan is None:
        raise EngineError(f"the {regime} regime cannot take this problem; use another one, or let the plan choose")
    statistics = None
    if p.task == "backward" and not p.stats:
        moments = replace(p, task="moments", walks={"x": p.walks["x"]}, activation=None, weight=None, bias=None,
                          scale=None, shift=None)  # fmt: skip
        statistics = make_plan(moments, device, without=without)
    kept = statistics is not None or (p.task == "forward" and plan.regime == "two_pass")
    return replace(plan, statistics=statistics, statistics_kept=kept, float_bytes=8 if p.dtype == "float64" else 4,
                   without=without)  # fmt: skip


def _plans(p: Problem, device: Device, regime: str | None, without: frozenset[str]) -> Iterator[Plan]:
    """The plans of each regime that can take the problem, the best one first."""
    makers = dict(zip(REGIMES, (_resident, _clustered, _split, _ticketed, _two_pass), strict=True))
    for name, make in makers.items():
        if name not in without and regime in (None, name) and (p.task != "normalize" or name == "two_pass"):
            plan = make(p, device, forced=regime is not None)
            if plan is not None:
                yield plan


# ---- what launches are told -----------------------------------------------------------------------------------------


def _common(p: Problem, groups: int, rows: int, cols: int, layout: str) -> dict[str, Any]:
    given: dict[str, Any] = {
        "C": p.C, "G": p.G, "P": groups, "ROWS": rows, "COLS": cols, "GROUPS": above(groups), "LAYOUT": layout,
        "EPS": p.eps, "ACTIVATION": p.activation,
    }  # fmt: skip
    if p.task == "backward":
        del given["EPS"]
    return given


# ---- whole slabs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Slab:
    """A slab as one tile, and how many elements of one a multiprocessor holds."""

    groups: int
    rows: int
    cols: int
    layout: str
    most: int


def _whole_slab(p: Problem, device: Device, together: int) -> _Slab:
    """A slab as one tile; channels first one group, or several of them up to so many elements."""
    most = most_held(p, device)
    layout = layout_of(p)
    if layout == "last":
        groups = groups_of_slab(p, device)
        rows, cols = above(groups * p.D), above(p.S)
        if p.itemsize > 2:  # a whole tile of float32 and the sums by row do not fit together
            most //= 2
    else:
        groups = 1
        while groups < p.G and 2 * groups * p.D * p.S <= held_elements(p, together):
            groups *= 2
        flat = not wants_sums(p) and (p.S * p.itemsize % 16 > 0 or above(p.D) * above(p.S) >= 2 * p.D * p.S)
        layout = "flat" if flat else "first"
        rows, cols = (above(groups), above(p.D * p.S)) if flat else (above(groups * p.D), above(p.S))
    return _Slab(groups, rows, cols, layout, most)


def _resident(p: Problem, device: Device, *, forced: bool) -> Plan | None:
    slab = _whole_slab(p, device, device.limits.together)
    return None if slab.rows * slab.cols > slab.most else _held(p, device, "resident", slab, slab.most, 1)


def _clustered(p: Problem, device: Device, *, forced: bool) -> Plan | None:
    """As few multiprocessors for a slab as hold it and as keep three of four busy with one sample. Channels first only:
    Triton gives each multiprocessor some of the rows, and channels last these are neighbours in memory. One group at a
    time: the numbers of several would be gathered across multiprocessors, which Triton does not do.
    """
    slab = _whole_slab(p, device, 0)
    tile, most = slab.rows * slab.cols, slab.most // 2  # what one holds alone spills here, in 14 to 86 places
    size, slabs = 2, -(-p.G // slab.groups)
    while 2 * size <= device.limits.cluster and (
        tile > size * most or (4 * slabs * size < 3 * device.multiprocessors and tile > size * _LEAST)
    ):
        size *= 2
    if not device.clusters or slab.layout == "last" or size > device.limits.cluster or tile > size * most:
        return None
    return _held(p, device, "clustered", slab, most, size)


def _held(p: Problem, device: Device, regime: str, slab: _Slab, most: int, multiprocessors: int) -> Plan:
    """The plan of a problem whose slabs are held by one program each, `most` elements on a multiprocessor."""
    slabs = p.N * -(-p.G // slab.groups)
    share = slab.rows * slab.cols // multiprocessors
    constants = {"S": p.S, **_common(p, slab.groups, slab.rows, slab.cols, slab.layout)}
    holders = f"a cluster of {multiprocessors} multiprocessors" if multiprocessors > 1 else "one program"
    reasons = (f"{slabs} slabs of {slab.groups} groups, {slab.groups * p.D * p.S} elements each: "
               f"{multiprocessors * most} may be held by {holders}",)  # fmt: skip
    if p.task != "backward":
        launch = Launch("resident_forward", (slabs,), {}, constants, warps_for(device, share), multiprocessors)
        return Plan(p, device, regime, reasons, (launch,))
    launch = Launch("resident_backward", (slabs,), {"N": p.N}, constants, warps_for(device, 2 * share),
                    multiprocessors)  # fmt: skip
    return _backward(p, device, regime, reasons, [launch], across=1)


# ---- slabs in parts --------------------------------------------------------------------------------------------------


def _cut_constants(p: Problem, cut: Cut) -> dict[str, Any]:
    return {
        "VECTOR": vector_of(p), **_common(p, cut.groups, cut.rows, cut.cols, cut.layout), "BLOCK": above(cut.parts),
    }  # fmt: skip


def _partials(p: Problem, cut: Cut, parts: int) -> int:
    return p.N * cut.slabs * 4 * above(cut.groups) * above(parts)


def _tile_warps(p: Problem, device: Device, cut: Cut) -> int:
    """Warps for a part. Channels last a thread holds half as much: with the sums by row and by group it would spill."""
    arrays = (2 if p.task == "backward" else 1) * (2 if cut.layout == "last" else 1)
    return warps_for(device, cut.rows * cut.cols * arrays)


def _split(p: Problem, device: Device, *, forced: bool) -> Plan | None:
    if p.task == "moments" or (p.task == "backward" and not p.dx):
        return None
    backward = p.task == "backward"
    cut = cut_busily(p, device)
    warps = _tile_warps(p, device, cut)
    at_once = device.multiprocessors * max(1, MOST_WARPS // warps)
    slabs, lanes = p.N * cut.slabs, at_once // cut.parts
    if lanes < 1 or cut.parts > MOST_PARTS or (not forced and lanes < min(device.limits.lanes, cut.slabs)):
        return None
    lanes = min(lanes, slabs)
    numbers = {"slabs": slabs, "across": cut.across, "VECTORS": p.S // vector_of(p)}
    reasons = (
        f"{slabs} slabs of {cut.parts} parts of {cut.rows * cut.cols} elements: the device holds {at_once} parts, "
        f"so {lanes} slabs at a time",
    )
    phases = (1, 2) if INTERPRETED and cut.parts > 1 else (0,)
    name = "split_backward" if backward else "split_forward"
    constants = _cut_constants(p, cut)
    if backward:
        numbers["N"] = p.N
    launches = [
        Launch(name, (cut.parts, lanes), numbers, {**constants, "PHASE": phase}, warps, cooperative=phase == 0,
               most_registers=_REGISTERS)
        for phase in phases
    ]  # fmt: skip
    memory: dict[str, Any] = {"counters": lanes, "partials": _partials(p, cut, cut.parts)}
    if not backward:
        return Plan(p, device, "split", reasons, tuple(launches), **memory)
    return _backward(p, device, "split", reasons, launches, cut.across, **memory)


def _ticketed(p: Problem, device: Device, *, forced: bool) -> Plan | None:
    if p.task == "moments" or (p.task == "backward" and not p.dx):
        return None
    backward = p.task == "backward"
    limits = device.limits
    cut = cut_slabs(p, device, held_elements(p, limits.part_backward if backward else limits.part))
    slab_bytes = cut.groups * p.D * p.S * p.itemsize * (2 if backward else 1)
    between = (limits.lag + 1) * slab_bytes
    room = limits.in_l2 * device.l2_bytes
    if cut.parts > MOST_PARTS or (not forced and between > room):
        return None
    warps = _tile_warps(p, device, cut)
    if backward and cut.layout == "last":
        warps = max(1, warps // 2)  # nothing is held between the two readings; with 16 warps sm_80 spilled
    slabs = p.N * cut.slabs
    programs = min(device.multiprocessors * max(1, 2 * MOST_WARPS // warps), cut.parts * slabs)
    numbers = {"slabs": slabs, "parts": cut.parts, "across": cut.across, "lag": limits.lag,
               "VECTORS": p.S // vector_of(p)}  # fmt: skip
    if backward:
        numbers["N"] = p.N
    reasons = (
        f"slabs of {cut.parts} parts are too large for {device.multiprocessors} multiprocessors to hold several",
        f"{between} bytes lie between the two readings of a slab: L2 has room for {int(room)}",
    )
    name = "ticketed_backward" if backward else "ticketed_forward"
    launches = [Launch(name, (programs,), numbers, _cut_constants(p, cut), warps, most_registers=_REGISTERS)]
    memory: dict[str, Any] = {"counters": slabs + 1, "partials": _partials(p, cut, cut.parts)}
    if not backward:
        return Plan(p, device, "ticketed", reasons, tuple(launches), **memory)
    return _backward(p, device, "ticketed", reasons, launches, cut.across, **memory)


def _two_pass(p: Problem, device: Device, *, forced: bool) -> Plan:
    backward = p.task == "backward"
    limits = device.limits
    cut = cut_slabs(p, device, held_elements(p, limits.part_backward if backward else limits.part))
    wanted = limits.waves * device.multiprocessors
    tiles = max(1, cut.parts * cut.slabs // wanted, -(-cut.parts // MOST_PARTS))
    across = -(-cut.across // tiles)
    parts = across * (cut.parts // cut.across)
    warps = _tile_warps(p, device, cut)
    vectors = p.S // vector_of(p)
    constants = {**_cut_constants(p, cut), "BLOCK": above(parts)}
    reading = {"parts": parts, "across": across, "tiles": tiles, "VECTORS": vectors}
    writing = {"parts": cut.parts, "across": cut.across, "VECTORS": vectors}
    plain = {name: value for name, value in constants.items() if name != "BLOCK"}
    slabs = p.N * cut.slabs
    grids = (slabs * parts,), (slabs * cut.parts,)
    reasons = (f"{slabs} slabs of {cut.parts} parts: nothing on the chip holds them until they are read again",)
    partials = _partials(p, cut, parts)
    if p.task == "normalize":
        reasons = ("the statistics are given",)
        return Plan(p, device, "two_pass", reasons, (Launch("apply_forward", grids[1], writing, plain, warps),))
    if not backward:
        first = {name: value for name, value in constants.items() if name != "ACTIVATION"}
        launches = [Launch("moments_of_slabs", grids[0], reading, first, warps)]
        if p.task == "moments":
            reasons = ("nothing but the moments is wanted",)
        else:
            launches.append(Launch("apply_forward", grids[1], writing, plain, warps))
        return Plan(p, device, "two_pass", reasons, tuple(launches), counters=slabs, partials=partials)
    launches = [Launch("sums_of_slabs", grids[0], {**reading, "N": p.N}, constants, warps)]
    if p.dx:
        launches.append(Launch("apply_gradient", grids[1], {**writing, "N": p.N}, plain, warps))
    return _backward(p, device, "two_pass", reasons, launches, across, counters=slabs, partials=partials,
                     totals=3 * p.N * p.G if p.dx or p.stats else 0)  # fmt: skip


def _backward(
    p: Problem, device: Device, regime: str, reasons: tuple[str, ...], launches: list[Launch], across: int,
    **memory: Any,
) -> Plan:  # fmt: skip
    """The plan of a backward whose sums by channel come from `across` parts of each sample."""
    sums = 2 * p.N * across * p.C if wants_sums(p) else 0
    blocks = -(-p.C // _SUM_CHANNELS)
    constants = {"C": p.C, "G": p.G, "CHANNELS": _SUM_CHANNELS, "ROWS": _SUM_ROWS}
    if p.weight or p.bias:
        numbers = {"rows": p.N * across, "across": across}
        launches.append(Launch("parameter_gradients", (blocks,), numbers, constants, 4))
    if p.scale or p.shift:
        numbers = {"N": p.N, "across": across}
        launches.append(Launch("sample_gradients", (p.N * blocks,), numbers, constants, 4))
    lost = p.N * p.G if p.stats and regime not in ("resident", "clustered") else 0  # else made up for at once
    return Plan(p, device, regime, reasons, tuple(launches), sums=sums, lost=lost, **memory)
