"""Shapes as people write them on a command line: 2x320x64x64, or with commas."""

import re

from groupnorm.errors import OptionError

__all__ = ["sizes_of"]

_DIGITS = 18  # of a size: it fits 64 bits


def sizes_of(text: str, option: str = "SHAPE", *, axes: int = 2) -> tuple[int, ...]:
    """The sizes in `text`; OptionError, which names `option`, if it is not at least `axes` numbers."""
    if re.fullmatch(r"[0-9]+([x,][0-9]+)*", text) is None or len(re.split("[x,]", text)) < axes:
        raise OptionError(f"{option} must be numbers with x between them, such as 2x320x64x64: got {text!r}")
    if any(len(size) > _DIGITS for size in re.split("[x,]", text)):
        raise OptionError(f"{option} {text[:80]} is too large for an array")
    return tuple(int(size) for size in re.split("[x,]", text))
