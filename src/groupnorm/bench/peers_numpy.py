"""The rival everybody can write: Group Normalization in a few lines of NumPy, in the dtype of x."""

from collections.abc import Callable
from typing import Any

import numpy as np

from groupnorm.bench.ready import Ready, Unsupported
from groupnorm.bench.work import Work

__all__ = ["plain_backward", "plain_forward", "prepare"]

Array = Any


def _sigmoid(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


_ACT: dict[str | None, Callable[[Array], Array]] = {
    None: lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "silu": lambda z: z * _sigmoid(z),
}
_SLOPE: dict[str | None, Callable[[Array], Array]] = {
    None: np.ones_like,
    "relu": lambda z: (z > 0).astype(z.dtype),
    "silu": lambda z: _sigmoid(z) * (1 + z * (1 - _sigmoid(z))),
}


def plain_forward(x: Array, num_groups: int, weight: Array, bias: Array, eps: float, activation: str | None) -> Array:
    """y, xhat, rstd and z of x, (N, C, S), everything computed in x's dtype on centred data."""
    n, c, s = x.shape
    v = x.reshape(n, num_groups, -1)
    centred = v - v.mean(2, keepdims=True)
    rstd = 1 / np.sqrt((centred * centred).mean(2, keepdims=True) + v.dtype.type(eps))
    xhat = (centred * rstd).reshape(n, c, s)
    z = xhat * weight[:, None] + bias[:, None]
    return _ACT[activation](z), xhat, rstd, z


def plain_backward(
    dy: Array, num_groups: int, weight: Array, xhat: Array, rstd: Array, z: Array, activation: str | None
) -> Array:
    """dx, dweight and dbias in the dtype of its arguments; the textbook formula, equation (14) of the specification."""
    n, c, s = dy.shape
    dz = dy * _SLOPE[activation](z)
    d = (dz * weight[:, None]).reshape(n, num_groups, -1)
    h = xhat.reshape(n, num_groups, -1)
    dx = rstd * (d - d.mean(2, keepdims=True) - h * (d * h).mean(2, keepdims=True))
    return dx.reshape(n, c, s), (dz * xhat).sum((0, 2)), dz.sum((0, 2))


def prepare(work: Work) -> Ready:
    """float32 and float64; a channels-last x is turned by NumPy as the user would, with moveaxis."""
    if work.dtype not in ("float32", "float64"):
        raise Unsupported(f"NumPy's reductions in {work.dtype} lose the statistics")
    if work.activation not in _ACT:
        raise Unsupported(f"no {work.activation} in this rival")
    n, c, *spatial = work.case.shape
    groups, eps, activation, weight, bias = work.case.num_groups, work.case.eps, work.activation, work.weight, work.bias

    def cube(array: Array) -> Array:
        return np.moveaxis(array, work.axis, 1).reshape(n, c, -1)

    def back(array: Array) -> Array:
        return np.moveaxis(array.reshape(n, c, *spatial), 1, work.axis)

    x, dy = work.x, work.dy if work.direction == "backward" else None
    if work.direction == "forward":
        return Ready(lambda: back(plain_forward(cube(x), groups, weight, bias, eps, activation)[0]), lambda y: (y,))
    _, xhat, rstd, z = plain_forward(cube(x), groups, weight, bias, eps, activation)

    def run() -> tuple[Array, ...]:
        dx, dweight, dbias = plain_backward(cube(dy), groups, weight, xhat, rstd, z, activation)
        return back(dx), dweight, dbias

    return Ready(run, tuple)
