"""Recycled memory for outputs: what a dead array leaves, the next large output takes.

Writing to memory that the process never touched costs a page fault per page, several times what Group Normalization
itself costs (on the reference machine 103 MB: 25 ms of faults against 6 ms of work). The C library's allocator recycles
small memory, and takes large blocks from the system each time. So a large output lies in a block that comes back here
when the last array that views it is gone. A smaller output takes a piece of a block, whose rest stays free, and
neighbouring pieces that are free are one again.

At most two outputs of the largest size asked for are held in this way, in use or free: what a forward and its backward,
or two layers of a model in inference, have at the same time. Beyond that outputs come from the usual allocator: in
training, where every output stays until backward, blocks of ours would be memory that nobody else can use, and new
ones in every step. A new block takes the place of free ones that are too small.
"""

import contextlib
import mmap
import os
import platform
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

__all__ = ["LARGE", "empty", "empty_cache", "first_write", "lend"]

# Bytes from which an output lies in recycled memory. What is smaller the C library recycles by itself, for everybody:
# glibc keeps up to twice the largest block that was freed, so that in a model only the largest outputs miss it. Norms
# of one inference, in ms, with 1, 8 and 32 MB here: ResNet-50 35, 31, 56; SD UNet 7.0, 5.4, 5.5; VAE 31, 30, 28 (AMD
# EPYC, November 2026). Other libraries keep less.
LARGE = 8 << 20 if platform.libc_ver()[0] == "glibc" else 1 << 20
_HELD = 2  # what is held, in outputs of the largest size asked for
_PAGE = 4096  # blocks are cut at multiples of this


class _Span(NamedTuple):
    """A piece of a block, from byte to byte."""

    block: Any
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        return self.size == len(self.block)


_returned: deque[_Span] = deque()  # what came back since the last look; appended to from any thread, without a lock
_free: list[_Span] = []  # what is free, the piece that came back last at the end
_lock = threading.RLock()
_busy = False  # whoever holds the lock is in the middle of something
_largest = 0  # bytes of the largest output so far
_held = 0  # bytes of all blocks


class _Lease(np.ndarray[Any, Any]):
    """A piece on loan: every array that lives in it has this one as its base, and its death brings the piece back.
    Without a span it is memory of its own.
    """

    span: Any = None
    fresh = False

    def __del__(self) -> None:
        if self.span is not None and _returned is not None:  # None while the interpreter ends
            _returned.append(self.span)


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """An uninitialised contiguous array; a large one lies in recycled memory if there is some."""
    size = dtype.itemsize
    for length in shape:
        size *= length
    if size < LARGE:
        return np.empty(shape, dtype)
    lent = lend(size)
    if lent is None:
        lent = _Lease((size,), np.uint8)
        lent.fresh = True  # so much memory mostly comes from the system
    return np.ndarray(shape, dtype, buffer=lent)


def lend(size: int) -> Any:
    """Recycled memory of so many bytes as an array of uint8 that begins at a page; None if enough of it is in use."""
    with _alone() as alone:
        span, fresh = _cut_off(-(-size // _PAGE) * _PAGE) if alone else (None, False)
    if span is None:
        return None
    # The lease stands right on the mapping: over an array NumPy would look through it and keep that array as the base.
    lease = _Lease((size,), np.uint8, buffer=span.block, offset=span.start)
    lease.span, lease.fresh = span, fresh
    return lease


def first_write(array: Any) -> bool:
    """Whether the array lies in a block that was never written, asked just before it is: streamed stores into such
    memory are slow (45 ms for 103 MB on the reference machine, against 25 ms of ordinary ones).
    """
    base = array
    while base.__class__ is np.ndarray:
        base = base.base
    if base.__class__ is not _Lease or not base.fresh:
        return False
    base.fresh = False
    return True


def empty_cache() -> None:
    """Give all recycled memory that is not in use back to the system."""
    global _largest
    with _alone() as alone:
        if alone:
            _largest = 0
            _take_in()
            _drop(_held)


@contextlib.contextmanager
def _alone() -> Iterator[bool]:
    """Nobody else looks at the spans meanwhile; False for a finalizer or a signal handler that comes in the middle of
    this thread's own work on them, and has to do without.
    """
    global _busy
    with _lock:
        if _busy:
            yield False
            return
        _busy = True
        try:
            yield True
        finally:
            _busy = False


def _cut_off(room: int) -> tuple[_Span | None, bool]:
    """A span of so many bytes, and whether it lies in a new block; None where enough memory is in use."""
    global _largest, _held
    before, _largest = _largest, max(_largest, room)
    _take_in()
    fitting = [i for i, span in enumerate(_free) if span.size >= room]
    if fitting:
        span = _free.pop(min(fitting, key=lambda i: (_free[i].size, -i)))
        if span.size > room:
            _free.append(span._replace(start=span.start + room))
        return span._replace(stop=span.start + room), False
    excess = _held + room - _HELD * _largest
    if excess > sum(span.size for span in _free if span.is_whole):
        return None, False
    _drop(max(excess, room))
    try:
        block = _new_block(room)
    except OSError:  # the system has no more: the usual allocator is asked, and says so
        _largest = before
        return None, False
    _held += room
    return _Span(block, 0, room), True


def _take_in() -> None:
    """Make what came back free again, one with its neighbours."""
    while _returned:
        span = _returned.popleft()
        for other in [other for other in _free if other.block is span.block]:
            if span.start == other.stop or span.stop == other.start:
                _free.remove(other)
                span = _Span(span.block, min(span.start, other.start), max(span.stop, other.stop))
        _free.append(span)


def _drop(excess: int) -> None:
    """Give so many bytes back to the system, if there are as many in free blocks: first what was free for longest."""
    global _held
    for span in [span for span in _free if span.is_whole]:
        if excess > 0:
            _free.remove(span)
            _held -= span.size
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
    global _lock, _busy
    _lock, _busy = threading.RLock(), False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
