"""The promises about numbers, tried on this machine: the worst case of each, as a fraction of what is allowed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

import groupnorm as gn
from groupnorm import reference
from groupnorm.bench.work import numpy_dtype

__all__ = ["PROMISES", "SHAPES", "Finding", "check", "fraction_of_budget"]

Array = Any

_UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}  # half an ulp of 1
_TINY = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 0.0, "float64": 0.0}  # the smallest step near zero
_SLOPE = {
    None: 1.0,
    "relu": 1.0,
    "silu": 1.1,
    "gelu": 1.13,
    "gelu_tanh": 1.13,
    "sigmoid": 1.0,
    "tanh": 1.0,
    "hardswish": 1.5,
}

# Channels first. Odd sizes, one channel per group, one position, one group, a rank of 2 and of 5, and one beyond a
# chunk.
SHAPES: tuple[tuple[tuple[int, ...], int], ...] = (
    ((2, 6, 5, 7), 3), ((3, 12), 4), ((1, 64, 33, 17), 32), ((2, 16, 1, 1), 4), ((1, 5, 3, 4, 5), 1), ((2, 7, 29), 7),
    ((1, 32, 96, 96), 8),
)  # fmt: skip

_DRAWS = 8  # of small shapes: the error of one draw of a few channels may happen to be near zero, ours or the plain one

PROMISES = {
    "forward": "|y - y64| <= 4u (1 + |mean|/std) (|weight*xhat| + |bias| + |weight|), then rounding within 1 ulp",
    "gradients": "relative 2-norm error <= 2 times that of the plain float32 formula (float64: 2^-25 of that)",
    "bits": "identical from run to run, for any number of threads, and alone or in a batch",
    "constant": "a constant group gives y = bias exactly",
    "contained": "NaN and infinity stay in their group",
}


@dataclass(slots=True)
class Finding:
    """One entry of the table. worst: the largest error as a fraction of the allowed one; 0 or infinity if exact."""

    promise: str
    dtype: str
    layout: str
    tried: int = 0
    worst: float = 0.0
    broken: list[str] = field(default_factory=list)

    def add(self, fraction: float, where: str) -> None:
        """Take in one comparison; NaN counts as broken."""
        self.tried += 1
        fraction = float("inf") if np.isnan(fraction) else fraction
        self.worst = max(self.worst, fraction)
        if fraction > 1.0:
            self.broken.append(where)


def check(
    dtypes: Iterable[str], layouts: Iterable[str], activations: Iterable[str | None], *, impl: str | None = None,
    shapes: tuple[tuple[tuple[int, ...], int], ...] = SHAPES,
) -> Iterator[Finding]:  # fmt: skip
    """One Finding for each promise, dtype and layout, as soon as it is known."""
    for dtype, layout in product(dtypes, layouts):
        forward, gradients = Finding("forward", dtype, layout), Finding("gradients", dtype, layout)
        for activation, (shape, groups), far in product(activations, shapes, (0.0, 100.0)):
            if np.prod(shape) > 100_000 and activation not in (None, "silu"):
                continue  # the specification's erf takes a second there, and the size does not matter to an activation
            mean = far / 10 if dtype in ("float16", "bfloat16") else far
            seeds = range(_DRAWS if np.prod(shape) < 10_000 else 1)
            draws = [_Data(shape, groups, dtype, layout, activation, mean, impl, seed) for seed in seeds]
            _forward(draws[0], forward)
            _gradients(draws, gradients)
        yield forward
        yield gradients
        yield _bits(dtype, layout, impl)
        yield _constant(dtype, layout, impl)
        yield _contained(dtype, layout, impl)


class _Data:
    """Arrays of one comparison, and how to call the operator on them."""

    def __init__(
        self,
        shape: tuple[int, ...],
        groups: int,
        dtype: str,
        layout: str,
        activation: str | None,
        mean: float,
        impl: str | None,
        seed: int = 0,
    ) -> None:
        self.groups, self.dtype, self.layout, self.activation, self.impl = groups, dtype, layout, activation, impl
        self.axis = 1 if layout == "NCHW" else len(shape) - 1
        numbers = np.random.default_rng([len(shape), shape[1], seed])
        kind = numpy_dtype(dtype)
        self.x, self.dy = (
            np.ascontiguousarray(np.moveaxis((at + numbers.standard_normal(shape)).astype(kind), 1, self.axis))
            for at in (mean, 0)
        )
        parameters = np.float64 if dtype == "float64" else np.float32
        self.weight, self.bias = numbers.standard_normal((2, shape[1])).astype(parameters)
        self.where = f"{'x'.join(map(str, shape))} G={groups} mean {mean:g} {activation or ''}".rstrip()

    @property
    def options(self) -> dict[str, Any]:
        """Keywords that the operator and the specification share."""
        return {"layout": self.layout, "activation": self.activation}

    def cube(self, array: Array) -> Array:
        """(N, C, S) of an array of x's shape."""
        return _cube(array, self.axis)


def _forward(data: _Data, finding: Finding) -> None:
    y = gn.group_norm(data.x, data.groups, data.weight, data.bias, impl=data.impl, **data.options)
    finding.add(fraction_of_budget(y, data.x, data.groups, data.weight, data.bias, **data.options), data.where)


def fraction_of_budget(
    y: Array,
    x: Array,
    num_groups: int,
    weight: Array,
    bias: Array,
    *,
    layout: str,
    activation: str | None = None,
    eps: float = 1e-5,
) -> float:
    """The largest error of y, as a fraction of what the promise allows it; weight and bias as they were given."""
    axis, dtype = (1 if layout == "NCHW" else x.ndim - 1), x.dtype.name
    want, mean, rstd = reference.group_norm(x, num_groups, weight, bias, eps=eps, layout=layout, activation=activation)
    y, x, want = (_cube(a, axis).astype(np.float64) for a in (y, x, want))
    width = want.shape[1] // num_groups
    mean, rstd = (np.repeat(a, width, 1)[:, :, None] for a in (mean, rstd))
    weight, bias = (np.abs(a.astype(np.float64))[:, None] for a in (weight, bias))
    unit = _UNIT["float64" if dtype == "float64" else "float32"]
    allowed = 4 * unit * (1 + np.abs(mean) * rstd) * (weight * np.abs((x - mean) * rstd) + bias + weight)
    if activation is not None:  # an error of z grows by the slope, and the activation rounds by itself
        allowed = max(1.0, _SLOPE[activation]) * allowed + 4 * unit * np.abs(want)
    if dtype in ("float16", "bfloat16"):
        allowed += _ulp(want, dtype)
    error = np.abs(y - want)  # nothing is allowed where weight and bias are 0
    return float(np.divide(error, allowed, out=np.where(error == 0, 0.0, np.inf), where=allowed > 0).max(initial=0.0))


def _cube(array: Array, axis: int) -> Array:
    """(N, C, S) of an array with its channels at `axis`."""
    moved = np.moveaxis(array, axis, 1)
    return moved.reshape(*moved.shape[:2], -1)


def _ulp(value: Array, dtype: str) -> Array:
    """The step between neighbours of the dtype at value."""
    exponent = np.frexp(value)[1] - 1
    return np.maximum(2 * _UNIT[dtype] * np.exp2(exponent.astype(np.float64)), _TINY[dtype])


def _gradients(draws: list[_Data], finding: Finding) -> None:
    """Errors of all draws together, as root mean squares, beside those of the plain formula."""
    first = draws[0]
    # float64 has 29 bits more than the plain formula, which runs in float32, but no wider type to merge in, so 4 are
    # left to sums that run on for long. The promise itself speaks of float32 and what is computed in it.
    scale = 2.0**-25 if first.dtype == "float64" else 1.0
    errors, allowed = np.zeros(3), np.zeros(3)
    for data in draws:
        arguments = (data.dy, data.x, data.groups, data.weight, data.bias)
        want = reference.group_norm_backward(*arguments, **data.options)
        got = gn.group_norm_backward(*arguments, impl=data.impl, **data.options)
        for i, (g, w, p) in enumerate(zip(got, want, _plain_gradients(data), strict=True)):
            size = float(np.linalg.norm(w.ravel()))
            if i == 0 and size < 1e-9 * np.linalg.norm(data.dy.astype(np.float64).ravel()):
                continue  # one element per group: dx is zero, and what is left of it is rounding
            stored = _UNIT[g.dtype.name] * size  # a result is rounded where it is stored
            errors[i] += np.linalg.norm((g.astype(np.float64) - w).ravel()) ** 2 / (size or 1.0) ** 2
            allowed[i] += (2 * scale * np.linalg.norm((p - w).ravel()) + stored) ** 2 / (size or 1.0) ** 2
    for name, error, most in zip(("dx", "dweight", "dbias"), errors, allowed, strict=True):
        if most > 0:
            finding.add(float(np.sqrt(error / most)), f"{name} {first.where}")


def _plain_gradients(data: _Data) -> tuple[Array, Array, Array]:
    """The textbook formula on centred data, every step of it in float32."""
    f = np.float32
    x, dy = (data.cube(a).astype(f) for a in (data.x, data.dy))
    weight, bias = data.weight.astype(f)[:, None], data.bias.astype(f)[:, None]
    n, c, s = x.shape
    v = x.reshape(n, data.groups, -1)
    centred = v - v.mean(2, keepdims=True)
    rstd = 1 / np.sqrt((centred * centred).mean(2, keepdims=True) + f(1e-5))
    xhat = (centred * rstd).reshape(n, c, s)
    dz = dy * reference.ACTIVATIONS[data.activation][1](xhat * weight + bias).astype(f)
    d, h = (dz * weight).reshape(n, data.groups, -1), xhat.reshape(n, data.groups, -1)
    dx = (rstd * (d - d.mean(2, keepdims=True) - h * (d * h).mean(2, keepdims=True))).reshape(n, c, s)
    back = np.moveaxis(dx.reshape(np.moveaxis(data.x, data.axis, 1).shape), 1, data.axis)
    return back, (dz * xhat).sum((0, 2)), dz.sum((0, 2))


def _bits(dtype: str, layout: str, impl: str | None) -> Finding:
    finding, before = Finding("bits", dtype, layout), gn.get_num_threads()
    try:
        for shape, groups in (((5, 64, 31, 29), 8), ((3, 8, 90, 91), 2)):
            data = _Data(shape, groups, dtype, layout, None, 2.0, impl)
            results = []
            for threads in (before, 1, 2, 3, before):
                gn.set_num_threads(threads)
                results.append(_everything(data, slice(None)))
            for threads, other in zip((1, 2, 3, before), results[1:], strict=True):
                finding.add(_differ(results[0], other), f"{data.where}, {threads} threads")
            alone = _everything(data, slice(1, 2))
            finding.add(_differ([a[1:2] for a in results[0][:2]], alone[:2]), f"{data.where}, sample 1 alone")
    finally:
        gn.set_num_threads(before)
    return finding


def _everything(data: _Data, samples: slice) -> list[Array]:
    x, dy = data.x[samples], data.dy[samples]
    y = gn.group_norm(x, data.groups, data.weight, data.bias, layout=data.layout, impl=data.impl)
    return [y, *gn.group_norm_backward(dy, x, data.groups, data.weight, data.bias, layout=data.layout, impl=data.impl)]


def _differ(first: list[Array], second: list[Array]) -> float:
    same = all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))
    return 0.0 if same else float("inf")


def _constant(dtype: str, layout: str, impl: str | None) -> Finding:
    finding = Finding("constant", dtype, layout)
    for value in (0.0, 0.1, 1e4):
        data = _Data((2, 12, 13, 11), 4, dtype, layout, None, 0.0, impl)
        x = np.full_like(data.x, value)
        y = gn.group_norm(x, 4, data.weight, data.bias, layout=layout, impl=impl)
        exact = data.cube(y) == data.bias.astype(y.dtype)[:, None]
        finding.add(0.0 if exact.all() else float("inf"), f"every element {value:g}")
    return finding


def _contained(dtype: str, layout: str, impl: str | None) -> Finding:
    finding = Finding("contained", dtype, layout)
    data = _Data((2, 12, 13, 11), 4, dtype, layout, None, 0.0, impl)
    clean = _everything(data, slice(None))
    for value in (np.nan, np.inf, -np.inf):
        poisoned = _Data((2, 12, 13, 11), 4, dtype, layout, None, 0.0, impl)
        np.moveaxis(poisoned.x, poisoned.axis, 1)[1, 4, 2, 5] = value  # group 1 of sample 1
        with np.errstate(invalid="ignore"):
            y, dx = (data.cube(a) for a in _everything(poisoned, slice(None))[:2])
        outside = np.ones(y.shape[:2], bool)
        outside[1, 3:6] = False
        same = all(np.array_equal(a[outside], data.cube(b)[outside]) for a, b in ((y, clean[0]), (dx, clean[1])))
        spread = np.isnan(y[1, 3:6]).any()
        finding.add(0.0 if same and spread else float("inf"), f"{value} in one group")
    return finding
