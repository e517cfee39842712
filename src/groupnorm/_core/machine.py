"""What the machine is: processor, cores, caches, memory, and the versions of what runs on it."""

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from groupnorm._version import __version__

__all__ = ["CACHES", "Caches", "Machine", "describe", "memory_limit", "versions"]

_CPU = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


class Caches(NamedTuple):
    """Bytes of each level: of one core for L1 and L2; for L3 of one of them, which some of the CPUs share."""

    l1: int
    l2: int
    l3: int
    cpus: int  # that this process may use ...
    l3s: int  # ... and the L3 caches that they have

    def l3_of(self, threads: int) -> int:
        """Bytes of the L3 caches that so many threads have together at least: close to each other."""
        return self.l3 * min(-(-threads * self.l3s // self.cpus), self.l3s)

    def l3_spread(self, threads: int) -> int:
        """Bytes of the L3 caches that so many threads have together at most: each by another one."""
        return self.l3 * min(threads, self.l3s)


@dataclass(frozen=True, slots=True)
class Machine:
    """A computer, as far as it matters here. `caches`: "L1d", "L2", "L3" -> bytes of one instance, where known."""

    cpu: str
    cores: int
    logical_cpus: int
    caches: dict[str, int]
    memory_bytes: int | None
    system: str

    @property
    def slug(self) -> str:
        """The name of its folder under results/: processor and cores."""
        return f"{re.sub(r'[^a-z0-9]+', '-', self.cpu.lower()).strip('-')}-{self.cores}c"

    @property
    def largest_cache_bytes(self) -> int:
        """Bytes of all last caches before memory; 32 MB where the system does not tell."""
        return max(*self.caches.values(), CACHES.l3_spread(self.logical_cpus)) if self.caches else 32 << 20


def describe() -> Machine:
    """The machine that runs this. Reads a few small files; asks `sysctl` on macOS."""
    import platform

    logical = len(_cpus())
    return Machine(
        _cpu_name(), _cores(logical), logical, _caches(), _memory_bytes(), f"{platform.system()} {platform.machine()}"
    )


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Versions of Python, this package, NumPy, Numba, and of those of `packages` that are installed."""
    import platform
    from importlib import metadata

    import numpy as np

    found = {"python": platform.python_version(), "groupnorm": __version__, "numpy": np.__version__}
    for name in ("numba", "llvmlite", "ml_dtypes", *packages):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpus() -> set[int]:
    """The CPUs that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _cpu_name() -> str:
    import platform

    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(\S.*)$", text, re.MULTILINE)
    name = (
        found.group(1) if found else _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()
    )
    name = re.sub(r"\((R|TM|r|tm)\)|\bCPU\b|@.*$", " ", name).replace("  ", " ").strip() or "unknown"
    kind = [re.search(rf"^{key}\s*:\s*(\d+)$", text, re.MULTILINE) for key in ("cpu family", "model")]
    if not re.search(r"\d", name) and all(kind):  # virtual machines hide which one it is: results would mix
        name += f" family {kind[0][1]} model {kind[1][1]}"  # type: ignore[index]
    return name


def memory_limit() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's; 1 GB where nobody says."""
    found = _memory_bytes() or 1 << 30
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of control groups, version 2 and 1
        try:
            text = (_CGROUP / name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdecimal():
            found = min(found, int(text))
    return found


def _sysctl(key: str) -> str:
    if sys.platform != "darwin":
        return ""
    import subprocess

    try:
        return subprocess.run(
            ["sysctl", "-n", key], capture_output=True, text=True, timeout=5, check=False
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _cores(logical: int) -> int:
    """Physical cores that this process may use: logical CPUs without their hyper-thread siblings."""
    siblings = set()
    for cpu in _cpus():
        try:
            siblings.add((_CPU / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii").strip())
        except OSError:
            counted = _sysctl("hw.physicalcpu")
            return int(counted) if counted.isdecimal() else logical
    return len(siblings)


def _caches() -> dict[str, int]:
    found = _caches_of_linux()
    for name, key in (("L1d", "hw.l1dcachesize"), ("L2", "hw.l2cachesize"), ("L3", "hw.l3cachesize")):
        if not found.get(name) and _sysctl(key).isdecimal() and int(_sysctl(key)):
            found[name] = int(_sysctl(key))
    return found


def _caches_of_linux() -> dict[str, int]:
    """What Linux says in /sys; elsewhere nothing."""
    found: dict[str, int] = {}
    for index in sorted((_CPU / "cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text(encoding="ascii").strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1:], 1)
        digits = size.rstrip("KMG")
        if kind != "Instruction" and digits.isdecimal():
            found[f"L{level}{'d' if kind == 'Data' and level == '1' else ''}"] = int(digits) * unit
    return found


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        pass
    text = _sysctl("hw.memsize")
    return int(text) if text.isdecimal() else None


def _known_caches() -> Caches:
    """What Linux tells, else a usual size. Plans use it for speed only, never for results."""
    found, cpus = _caches_of_linux(), _cpus()
    rest, l3s = set(cpus), 0
    while rest:
        rest -= _cpus_of_l3(min(rest)) or rest
        l3s += 1
    return Caches(found.get("L1d", 32 << 10), found.get("L2", 1 << 20), found.get("L3", 16 << 20), len(cpus), l3s)


def _cpus_of_l3(cpu: int) -> set[int]:
    """The CPUs that share the L3 cache of this one; none where the system does not tell."""
    try:
        text = (_CPU / f"cpu{cpu}/cache/index3/shared_cpu_list").read_text(encoding="ascii")
        ends = [part.split("-") for part in text.split(",")]  # such as 0-7,96-103
        return {number for first, *last in ends for number in range(int(first), int(last[0] if last else first) + 1)}
    except (OSError, ValueError):
        return set()


CACHES = _known_caches()
