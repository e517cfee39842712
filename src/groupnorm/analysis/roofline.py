"""What bounds a call of the operator, and how long it takes at least.

A *bound* is a time that is not beaten: by nobody, the least bytes at the fastest that this memory was ever seen to move
bytes; by nobody who computes the centred formulas, which the promised accuracy needs, their flops at the peak of the
arithmetic units; by no call of this engine, its own instructions and its shortest call. The longest of them binds.
Source of the idea: Williams, Waterman and Patterson, Roofline: an insightful visual performance model for multicore
architectures, CACM 2009.
"""

import operator
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import Any

from groupnorm._core.layout import channel_axis
from groupnorm._core.problem import check_activation, check_num_groups
from groupnorm._core.threads import get_num_threads
from groupnorm._core.traffic import ITEM_BYTES, least_traffic
from groupnorm.analysis.devices import STORAGE
from groupnorm.analysis.figures import MachineFigures, Speeds, figures_of
from groupnorm.analysis.operations import flops_per_element, operations_per_element
from groupnorm.analysis.prediction import move_s, predicted_seconds
from groupnorm.errors import DtypeError, OptionError, ShapeError

__all__ = ["DIRECTIONS", "Roofline", "roofline"]

DIRECTIONS = ("forward", "backward")
_LARGEST = 1 << 62  # elements


@dataclass(frozen=True, slots=True)
class Roofline:
    """One call, what it moves and computes at least, and the times that follow on a machine.

    bytes_read, bytes_written: the least that must move; bytes_saved: what stays until backward. flops: floating-point
    operations. instructions: vector instructions of our kernels by kind (load, store, arithmetic, activation,
    conversion). intensity: flops per byte moved. times_s: limit -> seconds, each a lower bound: "memory",
    "arithmetic", "instructions", "launch", and "storage" if data streams from a device. time_s: the longest, bound: its
    name. predicted_s: what our CPU engine is predicted to take; None for GPUs, and where data streams from a device.
    ridge: the flops per byte from which arithmetic would bind, at the speed of memory or of the device;
    launch_elements: elements of x below which the launch binds.
    """

    shape: tuple[int, ...]
    num_groups: int
    dtype: str
    layout: str
    direction: str
    activation: str | None
    machine: MachineFigures
    threads: int
    bytes_read: int
    bytes_written: int
    bytes_saved: int
    flops: int
    instructions: dict[str, int]
    times_s: dict[str, float]
    predicted_s: float | None
    ridge: float
    launch_elements: int

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written

    @property
    def intensity(self) -> float:
        """Flops per byte moved; 0 where nothing moves."""
        return self.flops / self.bytes if self.bytes else 0.0

    @property
    def bound(self) -> str:
        """The limit that binds: a key of times_s."""
        return max(self.times_s, key=lambda limit: self.times_s[limit])

    @property
    def time_s(self) -> float:
        """Seconds of the limit that binds: no call takes less."""
        return self.times_s[self.bound]

    @property
    def calls_per_s(self) -> float:
        """Calls per second at the bound."""
        return 1 / self.time_s

    @property
    def bytes_per_s(self) -> float:
        """Bytes moved per second at the bound."""
        return self.bytes / self.time_s

    def as_dict(self) -> dict[str, Any]:
        """Everything as numbers and strings, for JSON; the machine by its name and source."""
        fields = {name: getattr(self, name) for name in self.__slots__ if name != "machine"}
        derived = ("bytes", "intensity", "bound", "time_s", "calls_per_s", "bytes_per_s")
        machine = {name: getattr(self.machine, name) for name in ("name", "kind", "source", "notes")}
        return {**fields, **{name: getattr(self, name) for name in derived}, "machine": machine}

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        act = f" + {self.activation}" if self.activation else ""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.instructions.items() if count)
        rows = [
            (f"GroupNorm{act} {self.direction}", f"{size} {self.dtype} {self.layout}, {self.num_groups} groups"),
            ("machine", f"{self.machine.name} ({self.machine.source}), {_threads(self)}"),
            ("least bytes", f"{self.bytes_read:,} read, {self.bytes_written:,} written; "
                            f"{self.bytes_saved:,} saved for backward"),
            ("flops", f"{self.flops:,}; {self.intensity:.2f} per byte; arithmetic would bind from {self.ridge:.1f}"),
            ("instructions", kinds or "none"),
            *((f"{limit} bound", f"{_time(seconds)}{'  <- binds' if limit == self.bound else ''}")
              for limit, seconds in self.times_s.items()),
            ("at the bound", f"{_count(self.calls_per_s)} calls per second, {self.bytes_per_s / 1e9:.1f} GB/s"),
            ("launch binds", f"below {self.launch_elements:,} elements"),
        ]  # fmt: skip
        if self.predicted_s is not None:
            share = 100 * self.time_s / self.predicted_s
            rows.append(("our engine", f"{_time(self.predicted_s)} predicted, {share:.0f} % of the bound's speed"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name.ljust(width)}  {text}" for name, text in rows)


def roofline(
    shape: tuple[int, ...], num_groups: int, *, dtype: str = "float32", layout: str = "NCHW",
    direction: str = "forward", activation: str | None = None, machine: str | Path | MachineFigures | None = None,
    storage: str | float | None = None, affine: bool = True, scale_shift: bool = False, residual: bool = False,
) -> Roofline:  # fmt: skip
    """What bounds one call: the least bytes, the arithmetic, and the times they take on a machine.

    shape: of x, in the order that `layout` says. dtype, layout, direction ("forward" or "backward"), activation,
    affine (weight and bias), scale_shift and residual: what is computed, as in `group_norm`. machine: None is this one,
    whose figures are measured at the first call (some seconds) and kept; else a name such as "H200", a file of
    figures, or MachineFigures. storage: where data streams from and to, if not memory: "hdd", "sata", "nvme3",
    "nvme4", "nvme5", or bytes per second.

    Raises ShapeError, OptionError, DtypeError, FileError. Costs microseconds once figures are there.
    """
    sizes = _checked(shape)
    axis = channel_axis(layout, len(sizes))
    N, C = sizes[0], sizes[axis]
    S = prod(sizes) // (N * C)
    G = check_num_groups(num_groups, C, None)
    check_activation(activation)
    named: Any = dtype
    if not isinstance(named, str) or named not in ITEM_BYTES:
        raise DtypeError(f"dtype must be one of {', '.join(ITEM_BYTES)}: got {dtype!r}")
    if direction not in DIRECTIONS:
        raise OptionError(f"direction must be forward or backward: got {direction!r}")
    device = _device_bytes_per_s(storage)
    figures = figures_of(machine)
    threads = get_num_threads() if machine is None else figures.speeds[-1].threads
    speeds = figures.for_threads(threads)
    traffic = least_traffic(N, C, S, G, dtype, direction, affine=affine, scale_shift=scale_shift, residual=residual,
                            activation=activation)  # fmt: skip
    elements = N * C * S
    flops = elements * flops_per_element(direction, activation)
    counted = _instructions(elements, direction, activation, dtype, figures)
    instructions_per_s = speeds.operations_per_s / figures.lanes
    lane = "float64" if dtype == "float64" and "float64" in speeds.flops_per_s else "float32"
    times = {
        "memory": sum(move_s(traffic.moved, traffic.moved, speeds.levels, "best")),
        "arithmetic": flops / speeds.flops_per_s[lane],
        "instructions": sum(counted.values()) / instructions_per_s,
        "launch": figures.launch_s,
    }
    if device is not None:
        times["storage"] = traffic.moved / device
    slowest = min(speeds.levels[-1].best_bytes_per_s, device or inf)
    predicted = None
    if figures.kind == "cpu" and storage is None:
        predicted = predicted_seconds(
            N, C, S, G, dtype=dtype, channels_last=axis != 1 and S > 1, direction=direction, activation=activation,
            speeds=speeds, launch_s=figures.launch_s, threads=threads,
        )  # fmt: skip
    return Roofline(
        shape=sizes, num_groups=G, dtype=dtype, layout=layout, direction=direction, activation=activation,
        machine=figures, threads=threads, bytes_read=traffic.read, bytes_written=traffic.written,
        bytes_saved=traffic.saved, flops=flops, instructions=counted, times_s=times, predicted_s=predicted,
        ridge=speeds.flops_per_s[lane] / slowest,
        launch_elements=_launch_elements(
            traffic.moved / elements,
            max(times["arithmetic"], times["instructions"], times.get("storage", 0.0)) / elements,
            speeds, figures.launch_s,
        ),
    )  # fmt: skip


def _checked(shape: Any) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError as error:
        raise ShapeError(f"shape must be a tuple of whole numbers: got {shape!r}") from error
    if any(size < 1 for size in sizes):
        raise ShapeError(f"every size in shape must be a whole number, at least 1: got {sizes}")
    if prod(sizes) > _LARGEST:
        raise ShapeError("shape has more than 2^62 elements, which no memory holds; check the sizes")
    return sizes


def _device_bytes_per_s(storage: str | float | None) -> float | None:
    if storage is None:
        return None
    if isinstance(storage, str) and storage in STORAGE:
        return STORAGE[storage][0]
    try:
        speed = float(storage)
    except (TypeError, ValueError, OverflowError):
        speed = 0.0
    if not 0 < speed < float("inf"):
        raise OptionError(f"storage must be one of {', '.join(STORAGE)}, or bytes per second: got {storage!r}")
    return speed


def _instructions(
    elements: int, direction: str, activation: str | None, dtype: str, figures: MachineFigures
) -> dict[str, int]:
    """Vector instructions by kind. A CPU's vector holds `lanes` float32, for loads and stores as well, since 16-bit
    numbers are widened by them; a GPU's lane loads 16 bytes at once.
    """
    wide = 2 if dtype == "float64" else 1
    found = {}
    for kind, count in operations_per_element(direction, activation, dtype, kind=figures.kind).items():
        lanes = figures.lanes
        if figures.kind == "gpu" and kind in ("load", "store"):
            lanes *= 16 // ITEM_BYTES[dtype]
            wide = 1
        found[kind] = -(-elements * count * wide // lanes)
    return found


def _launch_elements(bytes_each: float, seconds_each: float, speeds: Speeds, launch_s: float) -> int:
    """Elements of x whose bytes move in the time of a launch, at the speed of the cache that holds them, and for which
    nothing else that takes `seconds_each` takes longer.
    """
    low, high = 0, min(1 << 40, int(launch_s / seconds_each) + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if sum(move_s(middle * bytes_each, middle * bytes_each, speeds.levels, "best")) < launch_s:
            low = middle
        else:
            high = middle
    return low


def _threads(found: Roofline) -> str:
    if found.machine.kind == "gpu":
        return "one GPU"
    return f"{found.threads} thread{'s' if found.threads > 1 else ''}"


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.3g}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} us" if seconds < 1e-2 else f"{seconds * 1e3:,.1f} ms"
