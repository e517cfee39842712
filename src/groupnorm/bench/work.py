"""The work of one measurement: its arrays, and the float64 results that every rival is held to before it is timed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from groupnorm import reference
from groupnorm.bench.cases import Case

__all__ = ["TOLERANCE", "Work", "block_results", "numpy_dtype", "worst_error"]

Array = Any

# The largest error of a result, as a fraction of its largest value. It is there to catch a rival that computes
# something else, so it leaves room for statistics in a single float32 accumulator (3e-4 over 262,144 positions) and
# for rounding twice to 16 bits.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "float16": 2**-8, "bfloat16": 2**-5}

_JUMPS = {"relu": (0.0,), "hardswish": (-3.0, 3.0)}  # where slopes do

_BLOCK = (
    1 << 21
)  # elements that go through the specification at once; it makes a dozen float64 temporaries of that size


def numpy_dtype(name: str) -> Any:
    """The NumPy dtype called `name`; bfloat16 comes from ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


@dataclass(frozen=True)
class Work:
    """One case in one dtype, layout, direction and activation. All arrays have x's dtype, so that no rival converts.

    `given` holds arrays (x, dy, weight, bias) that are used instead of drawn ones.
    """

    case: Case
    dtype: str
    layout: str
    direction: str
    activation: str | None
    threads: int
    given: Mapping[str, Array] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def x(self) -> Array:
        """Normal numbers around 0.5, in the layout that is measured."""
        return self._draw("x", 1, self._shape(), 0.5)

    @cached_property
    def dy(self) -> Array:
        """Normal numbers around 0, of x's shape; 0 where the activation's slope jumps within rounding of z, since
        either side is right there.
        """
        dy = self._draw("dy", 2, self._shape(), 0.0)
        if self.activation in _JUMPS and "dy" not in self.given:
            plain = replace(self, direction="forward", activation=None)
            (z,) = plain.expected
            near = TOLERANCE["float32"] * float(np.abs(z).max(initial=0.0))
            for at in _JUMPS[self.activation]:
                dy[np.abs(z - at) <= near] = 0
        return dy

    @cached_property
    def weight(self) -> Array:
        """Normal numbers around 1, of shape (C,)."""
        return self._draw("weight", 3, (self.case.shape[1],), 1.0)

    @cached_property
    def bias(self) -> Array:
        """Normal numbers around 0, of shape (C,)."""
        return self._draw("bias", 4, (self.case.shape[1],), 0.0)

    @property
    def axis(self) -> int:
        """The axis of the channels."""
        return 1 if self.layout == "NCHW" else len(self.case.shape) - 1

    @property
    def minimum_bytes(self) -> int:
        """What must move at least of arrays of x's shape: forward reads x and writes y, backward reads x and dy and
        writes dx. Parameters and statistics are left out: a copy, which this is compared with, has none.
        """
        size: int = self.x.nbytes
        return size * (2 if self.direction == "forward" else 3)

    @cached_property
    def expected(self) -> tuple[Array, ...]:
        """(y,) or (dx, dweight, dbias) by the specification; kept in float32 unless x is float64."""
        kept = np.float64 if self.dtype == "float64" else np.float32
        big = np.empty(self.x.shape, kept)
        channels = self.case.shape[1]
        sums = np.zeros((2, channels))
        for block, found in block_results(self, self.weight, self.bias):
            big[block.index] = found[0]
            if self.direction == "backward":
                sums[0, block.channels] += found[1]
                sums[1, block.channels] += found[2]
        return (big,) if self.direction == "forward" else (big, *sums)

    def _shape(self) -> tuple[int, ...]:
        n, c, *spatial = self.case.shape
        return (n, c, *spatial) if self.layout == "NCHW" else (n, *spatial, c)

    def _draw(self, name: str, seed: int, shape: tuple[int, ...], mean: float) -> Array:
        if name in self.given:
            return self.given[name]
        numbers = np.random.default_rng(seed).standard_normal(shape, np.float32)
        numbers += np.float32(mean)
        return numbers.astype(numpy_dtype(self.dtype), copy=False)


@dataclass(frozen=True, slots=True)
class _Block:
    """Some groups of one sample: `index` picks them from an array of x's shape."""

    index: Any
    channels: slice
    groups: int


def _blocks(work: Work) -> Iterator[_Block]:
    n, c, *_ = work.case.shape
    per_group = work.case.elements // (n * work.case.num_groups)
    step = max(1, _BLOCK // max(1, per_group))
    width = c // work.case.num_groups
    for sample in range(n):
        for first in range(0, work.case.num_groups, step):
            count = min(step, work.case.num_groups - first)
            channels = slice(first * width, (first + count) * width)
            rest = (slice(None),) * (work.x.ndim - 1 - work.axis)
            yield _Block(
                (slice(sample, sample + 1), *(slice(None),) * (work.axis - 1), channels, *rest), channels, count
            )


def block_results(work: Work, weight: Array, bias: Array) -> Iterator[tuple[_Block, tuple[Array, ...]]]:
    """The specification, piece by piece: groups are independent, and in one piece it would need gigabytes."""
    for block in _blocks(work):
        options: dict[str, Any] = {"eps": work.case.eps, "layout": work.layout, "activation": work.activation}
        parameters = (weight[block.channels], bias[block.channels])
        x = work.x[block.index]
        if work.direction == "forward":
            yield block, reference.group_norm(x, block.groups, *parameters, **options)[:1]
        else:
            yield block, reference.group_norm_backward(work.dy[block.index], x, block.groups, *parameters, **options)


def worst_error(got: tuple[Array, ...], expected: tuple[Array, ...]) -> float:
    """The largest error of any result, as a fraction of its largest value; infinity for a wrong shape or a NaN."""
    if len(got) != len(expected):
        return float("inf")
    worst = 0.0
    for array, want in zip(got, expected, strict=True):
        if array.shape != want.shape:
            return float("inf")
        for first in range(max(1, array.shape[0])):  # by rows: no further temporary of x's size in float64
            error = np.abs(array[first : first + 1].astype(np.float64) - want[first : first + 1])
            if not np.isfinite(error).all():
                return float("inf")
            worst = max(worst, float(error.max(initial=0.0)) / (float(np.abs(want).max(initial=0.0)) or 1.0))
    return worst
