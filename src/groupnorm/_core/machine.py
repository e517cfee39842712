"""What the machine is: the sizes of its caches, as far as the system tells."""

from pathlib import Path
from typing import NamedTuple

__all__ = ["CACHES", "Caches"]


class Caches(NamedTuple):
    """Bytes of each level: of one core for L1 and L2, shared for L3."""

    l1: int
    l2: int
    l3: int


def _read() -> Caches:
    """Linux says it in /sys; elsewhere a usual size is taken. Plans use it for speed only, never for results."""
    found = {1: 32 << 10, 2: 1 << 20, 3: 16 << 20}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            if kind != "Instruction" and size.endswith("K"):
                found[int(level)] = int(size[:-1]) << 10
        except (OSError, ValueError):
            continue
    return Caches(found[1], found[2], found[3])


CACHES = _read()
