"""The GPU as a plan needs to know it."""

import functools
import json
import re
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from groupnorm._engines.gpu.compiler import INTERPRETED, VERSION
from groupnorm.errors import EngineError

__all__ = ["Device", "Limits", "current_device", "current_stream", "describe_device", "has_clusters", "on_device"]

_TUNED = Path(__file__).parent / "tuned"
_NOTHING = nullcontext()
_OLDEST = 70  # Volta: release and acquire at the device's scope
_CLUSTERS = 90  # Hopper


@dataclass(frozen=True, slots=True)
class Limits:
    """The numbers that choose between regimes; elements of float32 or shorter types, half as many of float64.

    These are predictions from offline compilation (docs/gpu.md: what fits registers without a spill) until
    `make bench-gpu` has measured a device; then they come from tuned/<device>.json.
    """

    held: int = 1 << 15  # elements of a slab that one program holds in forward; 16 warps, 128 registers a thread
    held_backward: int = 1 << 14  # x and dy, and with an activation what its slope needs
    part: int = 1 << 13  # elements of a part, forward; twice as many in as many warps more make split spill
    part_backward: int = 1 << 12
    per_warp: int = 1 << 10  # elements that a warp holds; of twice as many split needs 255 registers
    cluster: int = 8  # multiprocessors of a cluster at most: more are not portable; below 2 there is none
    together: int = 1 << 12  # elements below which a program takes several groups
    lanes: int = 2  # slabs at a time, at least, for split to keep memory busy while one of them waits
    in_l2: float = 0.4  # share of L2 that what lies between the two readings of the ticketed regime may take
    lag: int = 1  # slabs between these readings
    waves: int = 8  # programs of the first of two passes for each multiprocessor


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU: its number among the visible ones, name, compute capability (90 is 9.0), multiprocessors, bytes of L2
    and of registers (of one multiprocessor); whether several of them can hold one program together.
    """

    index: int
    name: str
    capability: int
    multiprocessors: int
    l2_bytes: int
    register_bytes: int = 256 << 10
    clusters: bool = False
    limits: Limits = field(default_factory=Limits)

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


# What the interpreter stands in for. Its plans are those of this GPU.
_STAND_IN = Device(0, "NVIDIA H200", 90, 132, 60 << 20, clusters=True)


def has_clusters(capability: int) -> bool:
    """Whether a program can have several multiprocessors: the GPU needs thread block clusters, Triton reductions across
    them. 3.6 stops at one, 3.7 and 3.8 have them but their code was not looked at.
    """
    return capability >= _CLUSTERS and VERSION >= (3, 9)


@functools.lru_cache(maxsize=64)
def describe_device(index: int) -> Device:
    """The GPU of this number. Raises EngineError if it is too old."""
    if INTERPRETED:
        return _STAND_IN
    import torch

    found: Any = torch.cuda.get_device_properties(index)
    capability = 10 * found.major + found.minor
    if torch.version.hip is None and capability < _OLDEST:
        raise EngineError(f"the GPU engine needs compute capability {_OLDEST / 10}: got {capability / 10} "
                          f"({found.name}); use CPU tensors, or torch.nn.functional.group_norm")  # fmt: skip
    l2 = getattr(found, "L2_cache_size", 0) or 4 << 20
    clusters = torch.version.hip is None and has_clusters(capability)
    device = Device(index, found.name, capability, found.multi_processor_count, l2, clusters=clusters)
    return replace(device, limits=_tuned(device.slug))


def current_device() -> Device:
    """The GPU that is current in this thread."""
    if INTERPRETED:
        return describe_device(0)
    import torch

    return describe_device(torch.cuda.current_device())


def current_stream(index: int) -> int:
    """The current stream of a device, as the driver's handle."""
    if INTERPRETED:
        return 0
    import torch

    return int(torch._C._cuda_getCurrentRawStream(index))


def on_device(index: int) -> Any:
    """A context in which the device is the current one; nothing if it is already."""
    if INTERPRETED:
        return _NOTHING
    import torch

    return _NOTHING if torch._C._cuda_getDevice() == index else torch.cuda.device(index)


def _tuned(slug: str) -> Limits:
    """What was measured on this device, or the predictions."""
    path = _TUNED / f"{slug}.json"
    if not path.exists():
        return Limits()
    known = {f.name for f in fields(Limits)}
    given = json.loads(path.read_text(encoding="utf-8"))["limits"]
    return Limits(**{**asdict(Limits()), **{name: given[name] for name in known & given.keys()}})
