"""How much of a problem goes where: layouts of tiles, slabs, and how a slab is cut into parts.

Nothing here depends on N: a sample is cut in the same way alone and in a batch, so that it gives the same bits.
"""

from dataclasses import dataclass

from groupnorm._core.problem import Problem
from groupnorm._engines.gpu.device import Device

__all__ = [
    "MOST_CHANNELS", "MOST_PARTS", "MOST_WARPS", "Cut", "above", "cut_busily", "cut_slabs", "groups_of_slab",
    "held_elements", "layout_of", "most_held", "vector_of", "wants_sums", "warps_for",
]  # fmt: skip

MOST_PARTS = 1024  # of a slab: what all of them left is read by each
MOST_WARPS = 16  # of a program; of a multiprocessor, if a thread is to have 128 of its 64 K registers
MOST_CHANNELS = 1 << 13  # of a group whose channels are the rows of a tile, which are not cut
_NARROW = 64  # bytes of a row of a channels-last slab below which sectors of memory are wasted
_MOST_ROWS = 512  # of a channels-last slab


def held_elements(p: Problem, elements: int) -> int:
    """So many elements of 32 bits take the place of how many of the arithmetic of this problem."""
    return elements // 2 if p.dtype == "float64" else elements


def most_held(p: Problem, device: Device) -> int:
    """Elements of a slab that one program holds."""
    limits = device.limits
    return held_elements(p, limits.held_backward if p.task == "backward" else limits.held)


def wants_sums(p: Problem) -> bool:
    """Whether backward needs sums by channel."""
    return p.task == "backward" and any((p.weight, p.bias, p.scale, p.shift))


def above(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def warps_for(device: Device, elements: int) -> int:
    """Warps of a program that holds so many elements."""
    return max(1, min(MOST_WARPS, above(elements // device.limits.per_warp)))


def layout_of(p: Problem) -> str:
    """What a row of a tile is, "first" or "last"; a single position is no row, but a column, unless it has so many
    channels that these have to be cut.
    """
    return "last" if (p.channels_last and p.S > 1) or (p.S == 1 and p.D <= MOST_CHANNELS) else "first"


def groups_of_slab(p: Problem, device: Device) -> int:
    """How many groups lie in a slab of channels last: rows of at least 64 bytes that begin where 16 bytes may be loaded
    at once, padded little to a power of two, and slabs of one size.
    """
    vector = 16 // p.itemsize

    def quality(groups: int) -> tuple[float, int]:
        rows = groups * p.D
        fill = rows / above(rows)
        even = p.G / (-(-p.G // groups) * groups)
        aligned = 1.0 if rows % vector == 0 or groups == p.G else 0.5
        wide = min(1.0, rows * p.itemsize / _NARROW)
        busy = min(1.0, -(-p.G // groups) / device.multiprocessors) ** 0.5 if small else 1.0
        return fill * even * aligned * wide * busy, -groups

    candidates = range(1, max(1, min(p.G, _MOST_ROWS // p.D)) + 1)
    held = [
        groups for groups in candidates
        if above(groups * p.D) * above(p.S) <= most_held(p, device)
        and (groups * p.D * p.itemsize >= _NARROW or groups == p.G)
    ]  # fmt: skip
    small = bool(held)  # a program takes a slab: there must be many; of larger ones the parts are many in any case
    return max(held or candidates, key=quality)


def vector_of(p: Problem) -> int:
    """The largest power of two up to 16 that divides the number of positions."""
    return min(16, p.S & -p.S)


@dataclass(frozen=True, slots=True)
class Cut:
    """A slab cut into parts of one tile."""

    groups: int
    rows: int
    cols: int
    across: int
    parts: int
    slabs: int  # of one sample
    layout: str


def cut_slabs(p: Problem, device: Device, elements: int) -> Cut:
    """Slabs in parts of at most so many elements."""
    layout = layout_of(p)
    if layout == "last":
        groups = groups_of_slab(p, device)
        rows = above(groups * p.D)
        cols = min(above(p.S), max(1, elements // rows))
        down = 1
    else:
        groups = 1
        cols = min(above(p.S), elements)
        rows = max(1, min(above(p.D), elements // cols))
        down = -(-p.D // rows)
    across = -(-p.S // cols)
    return Cut(groups, rows, cols, across, across * down, -(-p.G // groups), layout)


def cut_busily(p: Problem, device: Device) -> Cut:
    """The largest parts that are at least as many in one sample as there are multiprocessors."""
    limits = device.limits
    elements = held_elements(p, limits.part_backward if p.task == "backward" else limits.part)
    cut = cut_slabs(p, device, elements)
    while elements > 1024 and cut.parts * cut.slabs < device.multiprocessors:
        elements //= 2
        smaller = cut_slabs(p, device, elements)
        if smaller.parts > MOST_PARTS:
            break
        cut = smaller
    return cut
