"""Where a measurement was taken: processor, cores, caches, memory, and the versions of what ran."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from groupnorm._version import __version__

__all__ = ["Machine", "describe", "versions"]

_CPU = Path("/sys/devices/system/cpu")


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
        """Bytes of the last cache before memory; 32 MB where the system does not tell."""
        return max(self.caches.values(), default=32 << 20)


def describe() -> Machine:
    """The machine that runs this. Reads a few small files; asks `sysctl` on macOS."""
    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        _cpu_name(), _cores(logical), logical, _caches(), _memory_bytes(), f"{platform.system()} {platform.machine()}"
    )


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Versions of Python, this package, NumPy, Numba, and of those of `packages` that are installed."""
    found = {"python": platform.python_version(), "groupnorm": __version__, "numpy": np.__version__}
    for name in ("numba", "llvmlite", "ml_dtypes", *packages):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(\S.*)$", text, re.MULTILINE)
    name = (
        found.group(1) if found else _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()
    )
    return re.sub(r"\((R|TM|r|tm)\)|\bCPU\b|@.*$", " ", name).replace("  ", " ").strip() or "unknown"


def _sysctl(key: str) -> str:
    if sys.platform != "darwin":
        return ""
    try:
        return subprocess.run(
            ["sysctl", "-n", key], capture_output=True, text=True, timeout=5, check=False
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _cores(logical: int) -> int:
    """Physical cores that this process may use: logical CPUs without their hyper-thread siblings."""
    siblings = set()
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(logical)
    for cpu in allowed:
        try:
            siblings.add((_CPU / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii").strip())
        except OSError:
            counted = _sysctl("hw.physicalcpu")
            return int(counted) if counted.isdecimal() else logical
    return len(siblings)


def _caches() -> dict[str, int]:
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
    for name, key in (("L1d", "hw.l1dcachesize"), ("L2", "hw.l2cachesize"), ("L3", "hw.l3cachesize")):
        if not found.get(name) and _sysctl(key).isdecimal() and int(_sysctl(key)):
            found[name] = int(_sysctl(key))
    return found


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        pass
    text = _sysctl("hw.memsize")
    return int(text) if text.isdecimal() else None
