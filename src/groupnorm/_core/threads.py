"""How many threads a call may use: one number for the process, read by the engines at every call; and whether the
process has lost threads that it inherited.
"""

import os
import sys

from groupnorm.errors import OptionError

__all__ = ["get_num_threads", "is_forked", "set_num_threads"]

_num_threads = 0  # 0: not asked for yet


def get_num_threads() -> int:
    """Threads that a call on NumPy arrays may use: what `set_num_threads` said, else GROUPNORM_NUM_THREADS, else every
    CPU that this process may run on.
    """
    return _num_threads or _first_num_threads()


def set_num_threads(num_threads: int) -> None:
    """Use at most `num_threads` threads from the next call on. Results do not depend on it. OptionError below 1."""
    global _num_threads
    if isinstance(num_threads, bool) or not hasattr(num_threads, "__index__") or num_threads.__index__() < 1:
        raise OptionError(f"num_threads must be a whole number, at least 1: got {num_threads!r}; use 1 to run serially")
    _num_threads = num_threads.__index__()


def _first_num_threads() -> int:
    wish = os.environ.get("GROUPNORM_NUM_THREADS")
    if wish is not None:
        if not wish.strip().isdecimal() or int(wish) < 1:
            raise OptionError(
                f"GROUPNORM_NUM_THREADS must be a whole number, at least 1: got {wish!r}; unset it for all CPUs"
            )
        set_num_threads(int(wish))
    elif hasattr(os, "sched_getaffinity"):
        set_num_threads(len(os.sched_getaffinity(0)))
    else:
        set_num_threads(os.cpu_count() or 1)
    return _num_threads


def _is_forked_at_import() -> bool:
    """Whether a forked child of `multiprocessing` imports this package only now, too late for the hook below."""
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is None or multiprocessing.parent_process() is None:
        return False
    return bool(multiprocessing.get_start_method() != "spawn")


_forked = _is_forked_at_import()


def is_forked() -> bool:
    """Whether this process is a forked child, in which a pool of threads that the parent used hangs."""
    return _forked


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
