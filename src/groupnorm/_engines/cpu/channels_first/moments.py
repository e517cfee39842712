"""Channels first: how a group is cut, and the moments of its pieces."""

from groupnorm._engines.cpu.compiler import inlined, jitted
from groupnorm._engines.cpu.groups import group_channels
from groupnorm._engines.cpu.memory import FLOAT64, load_one, pointer, store_one
from groupnorm._engines.cpu.simd import maximum, minimum
from groupnorm._engines.cpu.statistics import few_moments, merge, moments_by_element, out_of_range, run_moments

__all__ = [
    "APPLY",
    "MERGE",
    "MOMENTS",
    "SUMS",
    "group_moments",
    "load_moments",
    "store_moments",
    "unit_extent",
    "unit_moments",
]

MOMENTS = SUMS = 1  # what a launch does first
APPLY, MERGE = 2, 4


@jitted
def unit_extent(p, g, unit):
    """First channel, channels, first position and positions of a unit of group g; no channels if g has not so many
    units.
    """
    first, last = group_channels(p, g)
    if p.parts == 1:  # the usual case, without the divisions, which cost as much as the work of a tiny unit
        c = first + unit * p.unit
        return c, maximum(minimum(p.unit, last - c), 0), 0, p.S
    c = first + unit // p.parts * p.unit
    start = unit % p.parts * p.part
    return c, maximum(minimum(p.unit, last - c), 0), start, maximum(minimum(p.part, p.S - start), 0)


@jitted
def unit_moments(p, x, mask, n, g, unit):
    """Moments of a unit."""
    c, channels, start, length = unit_extent(p, g, unit)
    at = n * p.x_n + c * p.x_c + start
    if channels > 1 and mask is None and p.x_c == p.S:  # the unit's channels are one run
        length, channels = length * channels, 1
    return run_moments(x, mask, at, n * p.S + start, channels, length, p.x_c, p.chunk_rows, p.chunk)


@inlined
def group_moments(p, a, x, mask, n, g):
    """Moments of a group: its units merged, from `work` in a launch of its own, else computed here."""
    first, last = group_channels(p, g)
    at = n * p.x_n + first * p.x_c
    if mask is None and p.few:
        found = few_moments(x, at, 1, (last - first) * p.S, 0)
    else:
        found = (0.0, 0.0, 0.0, 0.0)
        for unit in range(p.units):
            if p.phase == MERGE:
                piece = load_moments(a, (n * p.G + g) * p.units + unit)
            else:
                piece = unit_moments(p, x, mask, n, g, unit)
            found = merge(found, piece)
    count, _, _, m2 = found
    if out_of_range(x, m2, count, p.eps):
        found = moments_by_element(x, mask, at, n * p.S, last - first, p.x_c, p.S, 1)
    return found


@jitted
def load_moments(a, index):
    """The moments that `store_moments` put in place `index` of work."""
    w = pointer(a.work, FLOAT64)
    return load_one(w, index * 4), load_one(w, index * 4 + 1), load_one(w, index * 4 + 2), load_one(w, index * 4 + 3)


@jitted
def store_moments(a, index, found):
    """Keep moments in place `index` of work."""
    w = pointer(a.work, FLOAT64)
    for i in range(4):
        store_one(w, index * 4 + i, found[i])
