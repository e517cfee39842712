"""What every rival gives: something to time, and how to look at its result."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Ready", "Unsupported"]


class Unsupported(Exception):  # noqa: N818 - not an error: the rival has no such operation, and the record says so
    """The rival cannot do this work; the message says why."""


@dataclass(frozen=True, slots=True)
class Ready:
    """`run` is timed; `arrays` turns its result into NumPy arrays in the layout of x: (y,) or (dx, dweight, dbias)."""

    run: Callable[[], Any]
    arrays: Callable[[Any], tuple[Any, ...]]
