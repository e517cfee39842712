"""Shapes as people write them on a command line: 2x320x64x64, or with commas."""

import re

from groupnorm.errors import OptionError

__all__ = ["sizes_of"]


def sizes_of(text: str, option: str = "SHAPE", *, axes: int = 2) -> tuple[int, ...]:
    """The sizes in `text`; OptionError, which names `option`, if it is not at least `axes` numbers."""
    if re.fullmatch(r"\d{1,18}([x,]\d{1,18})*", text) is None or len(re.split("[x,]", text)) < axes:
        raise OptionError(f"{option} must be numbers with x between them, such as 2x320x64x64: got {text!r}")
    return tuple(int(size) for size in re.split("[x,]", text))
