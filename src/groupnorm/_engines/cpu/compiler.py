"""Compiling kernels, and keeping what was compiled on disk.

A kernel is a plain function of int64 arguments that becomes a C function. Numba keeps the machine code in its cache: in
NUMBA_CACHE_DIR, else beside this package, else, where that is read-only, in the user's cache folder; where nothing can
be written, the kernel is compiled anew in each process.
"""

import hashlib
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import cfunc, njit, types

__all__ = ["compiled", "inlined", "jitted", "merged"]

_OPTIONS = {"error_model": "numpy"}  # Python's check for division by zero would put a branch into every loop
_INNER = {
    **_OPTIONS,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}  # never called from Python: 20 ms less for each

jitted = njit(**_INNER)  # a function that kernels call
merged = njit(
    **_INNER, inline="always"
)  # becomes part of its one caller before types are known: a level less to optimise
inlined = njit(**_INNER, forceinline=True)  # the same, always inlined: what runs once per vector

_lock = threading.RLock()  # two threads that need the same kernel compile it once

# A fork waits until no kernel is being compiled: Numba's own lock and what LLVM holds would stay held in the child.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


@cache
def _sources() -> str:
    """A digest of this engine's source text. Numba looks at the age of a kernel's own file only, and would go on using
    code compiled before a function in another file changed; so the digest is part of the name under which code is kept.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def compiled(function: Callable[..., None], name: str, arguments: int = 4) -> Any:
    """The C function of `function`, which takes int64 arguments and returns nothing: has .address and .ctypes.

    `name` says what the function is specialised for, in letters, digits and underscores. Takes 0.3 to 2 s the first
    time ever, a few milliseconds from disk.
    """
    function.__qualname__ = f"{name}_{_sources()}"
    signature = types.void(*[types.int64] * arguments)
    with _lock:
        try:
            return cfunc(signature, cache=True, nopython=True, **_OPTIONS)(function)
        except Exception:  # nowhere to write, or a file of the cache is broken; a true error is raised again below
            return cfunc(signature, nopython=True, **_OPTIONS)(function)
