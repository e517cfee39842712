"""How many threads a call may use: one number for the process, read by the engines at every call; and whether the
process has lost threads that it inherited.
"""

import os
import sys
from pathlib import Path

from groupnorm.errors import OptionError

__all__ = ["get_num_threads", "is_forked", "set_num_threads", "usable_cpus"]

_CGROUP = Path("/sys/fs/cgroup")
_num_threads = 0  # 0: not asked for yet


def get_num_threads() -> int:
    """Threads that a call on NumPy arrays may use: what `set_num_threads` said, else GROUPNORM_NUM_THREADS, else
    `usable_cpus()`.
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
    else:
        set_num_threads(usable_cpus())
    return _num_threads


def usable_cpus() -> int:
    """CPUs that this process may use at a time: those it may run on, or its container's quota. With more threads than
    the quota all of them would stand still for the rest of each period.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # control groups, version 2 and 1
        try:
            numbers = " ".join((_CGROUP / name).read_text(encoding="ascii") for name in names).split()
        except OSError:
            continue
        if len(numbers) == 2 and all(number.isdecimal() for number in numbers) and int(numbers[1]):
            cpus = min(cpus, max(1, -(-int(numbers[0]) // int(numbers[1]))))
    return cpus


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
