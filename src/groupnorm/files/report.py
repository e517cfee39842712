"""What a run moved, how fast, and whether the disk or the memory was what it waited for."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Report", "Timeline"]


@dataclass(frozen=True, slots=True)
class Report:
    """One finished run; bytes and seconds, each second counted where it was spent although the three overlap.

    `road` is how the file was cut: "samples" (whole samples), "groups" (groups of one sample) or "pieces" (pieces of a
    group, read in several passes). `disk_s` is the time in which a read, a write or the final sync was under way,
    `compute_s` that in which a kernel was; the longer one is the `bound`, "disk" or "memory". "Disk" includes the
    system's file cache.
    """

    x: str
    y: str
    shape: tuple[int, ...]
    dtype: str
    num_groups: int
    road: str
    parts: int
    bytes_read: int
    bytes_written: int
    bytes_computed: int
    read_s: float
    compute_s: float
    write_s: float
    disk_s: float
    total_s: float
    startup_s: float

    @property
    def disk_bandwidth_bytes_per_s(self) -> float:
        """Bytes read and written in each second of disk_s."""
        return (self.bytes_read + self.bytes_written) / max(self.disk_s, 1e-9)

    @property
    def memory_bandwidth_bytes_per_s(self) -> float:
        """Bytes that kernels read and wrote in each second of compute_s."""
        return self.bytes_computed / max(self.compute_s, 1e-9)

    @property
    def bound(self) -> str:
        """Which of "disk" and "memory" was busy for longer."""
        return "disk" if self.disk_s >= self.compute_s else "memory"

    def __str__(self) -> str:
        return (
            f"{self.y}: {self.dtype} {self.shape}, {self.num_groups} groups, by {self.road} in {self.parts} parts\n"
            f"read {_amount(self.bytes_read)} in {self.read_s:.3g} s, computed in {self.compute_s:.3g} s, "
            f"wrote {_amount(self.bytes_written)} in {self.write_s:.3g} s; {self.total_s:.3g} s in all\n"
            f"disk {self.disk_bandwidth_bytes_per_s / 1e9:.2f} GB/s, "
            f"memory {self.memory_bandwidth_bytes_per_s / 1e9:.2f} GB/s: the bound was the {self.bound}"
        )


class Timeline:
    """When reading, computing and writing were under way; filled from three threads, read when they are done."""

    def __init__(self) -> None:
        self._spans: dict[str, list[tuple[float, float]]] = {"read": [], "compute": [], "write": []}

    @contextmanager
    def span(self, kind: str) -> Iterator[None]:
        """Count the time inside as `kind`: "read", "compute" or "write"."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spans[kind].append((start, time.perf_counter()))

    def busy_s(self, *kinds: str) -> float:
        """Seconds in which at least one of the kinds was under way."""
        total, reached = 0.0, float("-inf")
        for start, stop in sorted(span for kind in kinds for span in self._spans[kind]):
            total += max(0.0, stop - max(start, reached))
            reached = max(reached, stop)
        return total


def _amount(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
