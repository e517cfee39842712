"""Memory beside the arrays of a call: counters, which live on, and scratch, which does not.

Nobody clears counters between launches (see `sync.py`). Each stream has its own, since its launches follow one another,
some for barriers and others for what counts from 0. A launch that a CUDA graph captures has some that nobody else ever
uses: two graphs may run at the same time. They come from a block that was cleared before, so that graphs need not clear
them either.

What lives on is allocated by a thread of its own. A thread may be told to allocate from the memory of a graph that will
be captured (as torch.compile's mode "reduce-overhead" does, on a stream of its own), and what lies there is taken for
something else later.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from groupnorm._engines.gpu.compiler import INTERPRETED

__all__ = ["Workspace", "workspace"]

_AT_LEAST = 1 << 12  # counters for each stream
_FOR_GRAPHS = 1 << 20  # counters for captured launches, 4 MB on each device where the engine was used


class Workspace:
    """The memory of one device."""

    def __init__(self, device: int) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._counters: dict[tuple[int, bool], Any] = {}
        self._outgrown: list[Any] = []
        self._for_graphs: Any = None
        self._taken = 0

    def counters(self, count: int, stream: int, *, barrier: bool) -> int:
        """The address of so many int32 counters, for launches on this stream: of a barrier, or 0 each."""
        with self._lock:
            if _is_capturing():
                return self._for_capture(count)
            if not INTERPRETED and (self._for_graphs is None or self._taken > _FOR_GRAPHS // 2):
                # Not in a capture, where clearing would become part of the graph: each of its replays would clear these
                # counters while other graphs use them. Those of a block that is half used stay with their graphs.
                self._outgrown.append(self._for_graphs)
                self._for_graphs, self._taken = _lasting(self.device, _FOR_GRAPHS), 0
            found = self._counters.get((stream, barrier))
            if found is None or found[1] < count:
                size = max(count, _AT_LEAST)
                self._outgrown.append(found)  # a launch that was given its address may not have begun
                found = self._counters[stream, barrier] = _lasting(self.device, size), size
            return _address(found[0])

    def scratch(self, size: int) -> tuple[int, Any]:
        """The address of so many bytes, and what keeps them."""
        memory = np.empty(size // 8 + 1) if INTERPRETED else _bytes(self.device, size)
        return _address(memory), memory

    def _for_capture(self, count: int) -> int:
        count = -(-count // 4) * 4  # 16 bytes
        if self._for_graphs is None or self._taken + count > _FOR_GRAPHS:  # the graph clears some of its own each time
            memory = _zeros(self.device, count)
            self._counters[-1 - self._taken, False] = memory, count
            self._taken += count
            return _address(memory)
        self._taken += count
        return _address(self._for_graphs) + 4 * (self._taken - count)


_known: dict[int, Workspace] = {}


def workspace(device: int) -> Workspace:
    """The memory of the device of this number."""
    found = _known.get(device)
    return found if found is not None else _known.setdefault(device, Workspace(device))


def _is_capturing() -> bool:
    if INTERPRETED:
        return False
    import torch

    return bool(torch.cuda.is_current_stream_capturing())


def _zeros(device: int, count: int) -> Any:
    if INTERPRETED:
        return np.zeros(count, np.int32)
    import torch

    return torch.zeros(count, dtype=torch.int32, device=f"cuda:{device}")


def _lasting(device: int, count: int) -> Any:
    """Zeros that every stream sees from now on, from the device's usual memory."""

    def zeros() -> Any:
        made = _zeros(device, count)
        if not INTERPRETED:
            import torch

            torch.cuda.current_stream(device).synchronize()
        return made

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(zeros).result()


def _bytes(device: int, size: int) -> Any:
    import torch

    return torch.empty(size, dtype=torch.uint8, device=f"cuda:{device}")


def _address(memory: Any) -> int:
    return int(memory.ctypes.data if INTERPRETED else memory.data_ptr())
