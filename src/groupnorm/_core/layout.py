"""Layouts by name, and arrays seen as (N, C, S) by their strides.

Group Normalization does not care about the order of the spatial positions, only that every array of a call visits them
in the same order. So an array can be walked without a copy whenever its spatial axes, sorted as they lie in memory,
collapse into a single step, and either positions or channels are neighbours.
"""

from typing import Any, NamedTuple

from groupnorm.errors import OptionError, ShapeError

__all__ = ["LAYOUTS", "Walk", "channel_axis", "memory_order", "walk"]

_CHANNELS_FIRST = {"NCHW": None, "NC": 2, "NCL": 3, "NCDHW": 5}  # name -> rank, None for every rank
_CHANNELS_LAST = {"NHWC": None, "NLC": 3, "NDHWC": 5}
LAYOUTS = (*_CHANNELS_FIRST, *_CHANNELS_LAST)


def channel_axis(layout: Any, ndim: int) -> int:
    """The axis of the channels in an array of `ndim` axes; OptionError for an unknown name, ShapeError for a rank it
    has not.
    """
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise OptionError(f"layout must be one of {', '.join(LAYOUTS)}: got {layout!r}; "
                          'use "NCHW" for channels on axis 1 and "NHWC" for channels last')  # fmt: skip
    if ndim < 2:
        raise ShapeError(f"x must have a batch and a channel axis: got {ndim} axes; add axes of length 1, e.g. x[None]")
    rank = {**_CHANNELS_FIRST, **_CHANNELS_LAST}[layout]
    if rank is not None and rank != ndim:
        raise ShapeError(f'layout "{layout}" is for {rank} axes: got an array with {ndim}; use '
                         f'"{"NCHW" if layout in _CHANNELS_FIRST else "NHWC"}", which fits every rank')  # fmt: skip
    return 1 if layout in _CHANNELS_FIRST else ndim - 1


class Walk(NamedTuple):
    """Steps, in elements, from one sample, channel and position to the next."""

    n: int
    c: int
    s: int


def memory_order(shape: tuple[int, ...], strides: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The spatial axes (all but 0 and `axis`), outermost in memory first. Those of length 1, whose strides mean
    nothing, stay where they are.
    """
    spatial = [i for i in range(1, len(shape)) if i != axis]
    long = iter(sorted((i for i in spatial if shape[i] > 1), key=lambda i: -strides[i]))
    return tuple(next(long) if shape[i] > 1 else i for i in spatial)


def walk(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, axis: int, order: tuple[int, ...]
) -> Walk | None:
    """How to step through an array of this shape and these strides (bytes) with its spatial axes in `order`.

    None when no single step visits the positions, or when neither channels nor positions are neighbours in memory, or
    when a stride is negative or not a whole number of elements.
    """
    if 0 in shape:
        return Walk(0, 1, 1)
    if any(s % itemsize or s < 0 for s, size in zip(strides, shape, strict=True) if size > 1):
        return None
    step, reach = 0, 1  # stride of the innermost spatial axis longer than 1, and positions covered so far
    for i in reversed(order):
        if shape[i] > 1:
            if strides[i] == 0 or (step and strides[i] != step * reach):
                return None
            step = step or strides[i]
            reach *= shape[i]
    found = Walk(
        n=strides[0] // itemsize if shape[0] > 1 else 0,
        c=strides[axis] // itemsize if shape[axis] > 1 else 1,
        s=step // itemsize if reach > 1 else 1,
    )
    return found if 1 in (found.c, found.s) else None
