"""How an array in a file is cut so that each part fits in memory.

A box is a range on every axis, taken in the order of the file (outermost first), such that its elements lie in one
stretch: single indices, then one range, then whole axes. A unit is a box of whole groups of whole samples: no statistic
leaves it. A unit that fits in memory is done in one pass, any other piece by piece in several. Boxes come in the order
of the file, and are made as they are asked for: there may be millions.
"""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise
from math import prod
from typing import NamedTuple

__all__ = ["Box", "Grid", "Unit"]

Box = tuple[tuple[int, int], ...]  # (start, stop) on each axis of the file


class Unit(NamedTuple):
    """Whole groups of whole samples; `whole` says that one pass will do."""

    box: Box
    whole: bool


class Grid(NamedTuple):
    """An array in a file: its shape in the order of the file, and which of those axes are batch and channels.

    `edges` holds the G + 1 channels at which groups begin and end.
    """

    shape: tuple[int, ...]
    batch: int
    channel: int
    edges: tuple[int, ...]

    def everything(self) -> Box:
        """The box of the whole array."""
        return tuple((0, n) for n in self.shape)

    def groups(self, box: Box) -> tuple[int, int]:
        """The range of groups that the box touches."""
        start, stop = box[self.channel]
        return bisect_right(self.edges, start) - 1, bisect_right(self.edges, max(stop - 1, start))

    def offset(self, box: Box) -> int:
        """Where the box begins, in elements from the beginning of the array."""
        position = 0
        for (start, _), length in zip(box, self.shape, strict=True):
            position = position * length + start
        return position

    def units(self, wish: int, limit: int) -> Iterator[Unit]:
        """The array as units of at most `wish` elements, where whole samples and groups allow it.

        Those of more than `limit` are to be done in pieces.
        """
        return self._units(self.everything(), wish, limit)

    def pieces(self, box: Box, most: int) -> Iterator[Box]:
        """A unit's box as boxes of at most `most` elements, each of whole groups or inside a single one."""
        axis = _first_long_axis(box)
        if size(box) <= most or axis is None:
            yield box
            return
        for part in self._cut(box, axis, most):
            yield from self.pieces(part, most)

    def _units(self, box: Box, wish: int, limit: int) -> Iterator[Unit]:
        axis = _first_long_axis(box)
        first, last = self.groups(box)
        free = axis == self.batch or (axis == self.channel and last - first > 1)  # no statistic crosses such a cut
        if size(box) <= wish or axis is None or not free:
            yield Unit(box, size(box) <= limit)
            return
        for part in self._cut(box, axis, wish):
            yield from self._units(part, wish, limit)

    def _cut(self, box: Box, axis: int, most: int) -> Iterator[Box]:
        """The box cut along its first long axis into ranges of at most `most` elements; of one index or group, if need
        be.
        """
        start, stop = box[axis]
        step = max(1, most // (size(box) // (stop - start)))
        first, last = self.groups(box)
        if axis != self.channel or last - first == 1:
            cuts = [*range(start, stop, step), stop]
        else:
            per_group = self.edges[1] - self.edges[0]
            # A last group that is larger is a part of its own: the calls on other parts could not tell where it begins.
            whole = last - (self.edges[last] - self.edges[last - 1] != per_group)
            cuts = [self.edges[g] for g in range(first, whole, max(1, step // per_group))]
            cuts += [self.edges[g] for g in sorted({whole, last})]
        for begin, end in pairwise(cuts):
            yield (*box[:axis], (begin, end), *box[axis + 1 :])


def size(box: Box) -> int:
    """Elements in a box."""
    return prod(stop - start for start, stop in box)


def _first_long_axis(box: Box) -> int | None:
    return next((i for i, (start, stop) in enumerate(box) if stop - start > 1), None)
