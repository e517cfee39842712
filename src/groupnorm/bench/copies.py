"""The machine's copy speed: the yardstick that every time is divided by."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module, util
from itertools import pairwise
from typing import Any

import numpy as np

__all__ = ["STREAMED", "copies"]

Array = Any

STREAMED = "streamed copy"  # past the caches: about half the time of an ordinary copy of what does not fit in them
_SHARE = 1 << 20  # bytes that are worth a thread of their own


def copies(x: Array, threads: int) -> dict[str, Callable[[], Any]]:
    """Ways to copy x into memory that exists: ordinary ones (the fastest counts), and the engine's streamed one.

    The engine offers the streamed one as `stream_copy(source, target, num_threads)` in `groupnorm._engines.cpu`, for
    contiguous bytes; without it that entry is absent.
    """
    source = x.reshape(-1).view(np.uint8)
    target = np.empty_like(source)
    target[...] = 1  # every page exists
    found: dict[str, Callable[[], Any]] = {"numpy copy": _numpy_copy(source, target, threads)}
    if util.find_spec("torch") is not None:
        import torch

        a, b = torch.from_numpy(source), torch.from_numpy(target)
        found["torch copy"] = lambda: b.copy_(a)
    stream_copy = _stream_copy()
    if stream_copy is not None:
        found[STREAMED] = lambda: stream_copy(source, target, threads)
    return found


def _numpy_copy(source: Array, target: Array, threads: int) -> Callable[[], Any]:
    shares = min(threads, source.nbytes // _SHARE)
    if shares < 2:
        return lambda: np.copyto(target, source)
    pool = ThreadPoolExecutor(shares)
    cuts = [source.size * i // shares for i in range(shares + 1)]
    pairs = [(target[a:b], source[a:b]) for a, b in pairwise(cuts)]
    return lambda: list(
        pool.map(lambda pair: np.copyto(*pair), pairs)
    )  # NumPy lets go of the interpreter while it copies


def _stream_copy() -> Callable[[Array, Array, int], Any] | None:
    try:
        engine = import_module("groupnorm._engines.cpu")
    except ImportError:
        return None
    found: Callable[[Array, Array, int], Any] | None = getattr(engine, "stream_copy", None)
    return found
