"""Recycled memory for outputs: what a dead array leaves, the next large output takes.

Writing to memory that the process never touched costs a page fault per page, several times what Group Normalization
itself costs (on the reference machine 103 MB: 25 ms of faults against 6 ms of work). So a large output lies in a block
that comes back here when the last array that views it is gone. Free blocks are bounded; `empty_cache` gives them back
to the system. A new block takes the place of free ones that do not fit: a model whose tensors grow from layer to layer
would keep one of each size otherwise.
"""

import contextlib
import mmap
import os
import threading
from collections import deque
from typing import Any

import numpy as np

__all__ = ["empty", "empty_cache", "first_write"]

_SMALLEST = 1 << 20  # bytes; below, NumPy's allocator recycles memory by itself
_WASTE = 1.25  # a block may be this much larger than what is asked for

_returned: deque[Any] = (
    deque()
)  # blocks that came back since the last look; appended to from any thread, without a lock
_free: list[Any] = []  # free blocks, the one used last at the end
_lock = threading.Lock()


class _Lease(np.ndarray[Any, Any]):
    """A block on loan: every array that lives in the block has this one as its base, and its death brings the block
    back.
    """

    block: Any = None
    fresh = False

    def __del__(self, give_back: Any = _returned.append) -> None:
        if self.block is not None:
            give_back(self.block)


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """An uninitialised contiguous array; a large one starts at a cache line, in recycled memory if there is some."""
    size = dtype.itemsize
    for length in shape:
        size *= length
    if size < _SMALLEST:
        return np.empty(shape, dtype)
    with _lock:
        _collect(_LIMIT)
        fitting = [i for i, block in enumerate(_free) if size <= len(block) <= size * _WASTE]
        block = _free.pop(min(fitting, key=lambda i: (len(_free[i]), -i))) if fitting else None
        if block is None:
            _collect(sum(map(len, _free)) - size)
    fresh = block is None
    if block is None:
        block = _new_block(size)
    # The lease stands right on the mapping: over an array NumPy would look through it and keep that array as the base.
    lease = _Lease((size,), np.uint8, buffer=block)
    lease.block, lease.fresh = block, fresh
    return np.ndarray(shape, dtype, buffer=lease)


def first_write(array: Any) -> bool:
    """Whether the array came from `empty` in memory that was never written, asked just before it is: streamed stores
    into such memory are slow (45 ms for 103 MB on the reference machine, against 25 ms of ordinary ones).
    """
    base = array.base
    while base.__class__ is np.ndarray:
        base = base.base
    if base.__class__ is not _Lease or not base.fresh:
        return False
    base.fresh = False
    return True


def empty_cache() -> None:
    """Give all recycled memory that is not in use back to the system."""
    with _lock:
        _returned.clear()
        _free.clear()


def _collect(limit: int) -> None:
    """Take in what came back, and drop the blocks that were not used for longest while there are more bytes."""
    while _returned:
        _free.append(_returned.popleft())
    excess = sum(map(len, _free)) - limit
    while excess > 0 and _free:
        excess -= len(_free.pop(0))


def _new_block(size: int) -> Any:
    """Memory of its own from the system, starting at a page; large pages where the system has them."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, size)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _renew_lock() -> None:
    """In a forked child: whoever held the lock is not there to let go of it."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def _limit() -> int:
    """Bytes of free blocks to keep: an eighth of the machine's memory, 512 MB where that is unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8
    except (AttributeError, ValueError, OSError):
        return 1 << 29


_LIMIT = _limit()
