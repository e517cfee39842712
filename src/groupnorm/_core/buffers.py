"""Recycled memory for outputs: what a dead array leaves, the next large output takes.

Writing to memory that the process never touched costs a page fault per page, several times what Group Normalization
itself costs (on the reference machine 103 MB: 25 ms of faults against 6 ms of work). The C library's allocator recycles
small memory, and takes large blocks from the system each time. So a large output lies in a block that comes back here
when the last array that views it is gone. A smaller output takes a piece of a block, whose rest stays free, and
neighbouring pieces that are free are one again.

Of free memory two outputs of the largest size are kept, which is what a forward and its backward let go of; the rest,
and all of it by `empty_cache`, goes back to the system. A new block takes the place of free ones that are too small: a
model whose tensors grow from layer to layer would keep one of each size otherwise.
"""

import contextlib
import mmap
import os
import platform
import threading
from collections import deque
from typing import Any, NamedTuple

import numpy as np

__all__ = ["LARGE", "empty", "empty_cache", "first_write"]

# Bytes from which an output lies in recycled memory. What is smaller the C library recycles by itself, for everybody:
# glibc keeps up to twice the largest block that was freed, so that in a model only the largest outputs miss it. Norms
# of one inference, in ms, with 1, 8 and 32 MB here: ResNet-50 35, 31, 56; SD UNet 7.0, 5.4, 5.5; VAE 31, 30, 28 (AMD
# EPYC, November 2026). Other libraries keep less.
LARGE = 8 << 20 if platform.libc_ver()[0] == "glibc" else 1 << 20
_KEPT = 2  # free memory that is kept, in outputs of the largest size asked for
_PAGE = 4096  # blocks are cut at multiples of this


class _Span(NamedTuple):
    """A piece of a block, from byte to byte."""

    block: Any
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


_returned: deque[_Span] = deque()  # what came back since the last look; appended to from any thread, without a lock
_free: list[_Span] = []  # what is free, the piece that came back last at the end
_lock = threading.Lock()
_largest = 0  # bytes


class _Lease(np.ndarray[Any, Any]):
    """A piece on loan: every array that lives in it has this one as its base, and its death brings the piece back."""

    span: Any = None
    fresh = False

    def __del__(self) -> None:
        if self.span is not None and _give_back is not None:  # None while the interpreter ends
            _give_back(self.span)


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """An uninitialised contiguous array; a large one starts at a page, in recycled memory if there is some."""
    global _largest
    size = dtype.itemsize
    for length in shape:
        size *= length
    if size < LARGE:
        return np.empty(shape, dtype)
    room = -(-size // _PAGE) * _PAGE
    with _lock:
        _largest = max(_largest, room)
        _collect(_KEPT * _largest)
        fitting = [i for i, span in enumerate(_free) if span.size >= room]
        span = _free.pop(min(fitting, key=lambda i: (_free[i].size, -i))) if fitting else None
        if span is None:
            _collect(sum(span.size for span in _free) - room)
        elif span.size > room:
            _free.append(span._replace(start=span.start + room))
    fresh = span is None
    if span is None:
        span = _Span(_new_block(room), 0, room)
    # The lease stands right on the mapping: over an array NumPy would look through it and keep that array as the base.
    lease = _Lease((size,), np.uint8, buffer=span.block, offset=span.start)
    lease.span, lease.fresh = span._replace(stop=span.start + room), fresh
    return np.ndarray(shape, dtype, buffer=lease)


def first_write(array: Any) -> bool:
    """Whether the array came from `empty` in a block that was never written, asked just before it is: streamed stores
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
    global _largest
    with _lock:
        _largest = 0
        _collect(0)


def _give_back(span: _Span) -> None:
    """Called by whatever ends an array: any thread, also inside `empty`, when the lock is taken."""
    _returned.append(span)
    if _lock.acquire(blocking=False):
        try:
            _collect(_KEPT * _largest)
        finally:
            _lock.release()


def _collect(limit: int) -> None:
    """Take in what came back, and drop the blocks that were free for longest while there are more bytes."""
    while _returned:
        span = _returned.popleft()
        for other in [other for other in _free if other.block is span.block]:
            if span.start == other.stop or span.stop == other.start:
                _free.remove(other)
                span = _Span(span.block, min(span.start, other.start), max(span.stop, other.stop))
        _free.append(span)
    excess = sum(span.size for span in _free) - limit
    for span in list(_free):
        if excess > 0 and span.size == len(span.block):
            _free.remove(span)
            excess -= span.size


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
