"""The specification: Group Normalization in float64 NumPy, forward and backward, as numbered equations.

Every engine is tested against this file; `docs/math.md` derives it with the same symbols. It is written to be read, not
to be fast: it makes many temporaries of x's size in float64.

Arrays are seen as v[n, c, s]: sample n of N, channel c of C, position s of S (all spatial axes as one). Group g holds
the D channels c = g*D .. (g+1)*D - 1, the last group also what remains when `uneven`. m[n, s] is 1 where a position is
real.

    (1)  M[n,g]    = sum_{c in g, s} m                     number of elements in the group
    (2)  mean[n,g] = sum_{c in g, s} m*v / M
    (3)  var[n,g]  = sum_{c in g, s} m*(v - mean)^2 / M    population variance
    (4)  rstd[n,g] = 1 / sqrt(var + eps)
    (5)  xhat      = m*(v - mean)*rstd
    (6)  a         = xhat*weight + bias                    per channel
    (7)  z         = a*(1 + scale) + shift + residual      per sample and channel, and per element
    (8)  y         = m*act(z)

Backward, from dy = dL/dy to the gradient of everything above (mean and rstd carry none themselves):

    (9)  dz        = m*dy*act'(z)                          = dresidual
    (10) dshift    = sum_s dz        dscale  = sum_s dz*a
    (11) da        = dz*(1 + scale)
    (12) dbias     = sum_{n,s} da    dweight = sum_{n,s} da*xhat
    (13) dxhat     = da*weight
    (14) dx        = m*rstd*(dxhat - sum(dxhat)/M - xhat*sum(dxhat*xhat)/M),  both sums over the group

Sources: Wu and He, Group Normalization, ECCV 2018, eq. 1-7, for (1)-(6); (14) is the chain rule through (2)-(5).
"""

from math import erfc, pi, sqrt
from typing import Any, NamedTuple

import numpy as np

__all__ = ["ACTIVATIONS", "Gradients", "group_norm", "group_norm_backward", "group_norm_vjp", "moments"]

Array = Any


class Gradients(NamedTuple):
    """The gradients of one call; None where the forward had no such argument."""

    dx: Array
    dweight: Array | None
    dbias: Array | None
    dscale: Array | None
    dshift: Array | None
    dresidual: Array | None


# ---- activations: name -> (act, act') --------------------------------------------------------------------------------

_erfc = np.vectorize(erfc, otypes=[np.float64])
_K = sqrt(2 / pi)


def _sigmoid(z: Array) -> Array:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-z))


def _silu_slope(z: Array) -> Array:
    return _sigmoid(z) * (1 + z * _sigmoid(-z))


def _gelu_slope(z: Array) -> Array:
    return 0.5 * _erfc(-z / sqrt(2)) + z * np.exp(-z * z / 2) / sqrt(2 * pi)


def _gelu_tanh(z: Array) -> Array:
    return z * _sigmoid(2 * _K * (z + 0.044715 * z**3))  # sigmoid(2u) = (1 + tanh(u))/2


def _gelu_tanh_slope(z: Array) -> Array:
    u = 2 * _K * (z + 0.044715 * z**3)
    return _sigmoid(u) + z * _sigmoid(u) * _sigmoid(-u) * 2 * _K * (1 + 3 * 0.044715 * z * z)


ACTIVATIONS: dict[str | None, tuple[Any, Any]] = {
    None: (lambda z: z, np.ones_like),
    "relu": (lambda z: np.maximum(z, 0), lambda z: np.where(z > 0, 1.0, np.where(z <= 0, 0.0, z))),
    "silu": (lambda z: z * _sigmoid(z), _silu_slope),
    "gelu": (lambda z: 0.5 * z * _erfc(-z / sqrt(2)), _gelu_slope),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_slope),
    "sigmoid": (_sigmoid, lambda z: _sigmoid(z) * _sigmoid(-z)),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "hardswish": (
        lambda z: z * np.clip(z + 3, 0, 6) / 6,
        lambda z: np.where(z <= -3, 0.0, np.where(z >= 3, 1.0, (2 * z + 3) / 6)),
    ),
}


# ---- forward ---------------------------------------------------------------------------------------------------------


def group_norm(
    x: Array, num_groups: int, weight: Array = None, bias: Array = None, *, eps: float = 1e-5, layout: str = "NCHW",
    activation: str | None = None, scale: Array = None, shift: Array = None, residual: Array = None, mask: Array = None,
    uneven: bool = False, mean: Array = None, rstd: Array = None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """y, mean and rstd in float64: y like x, mean and rstd of shape (N, G); given ones take the place of (1)-(4)."""
    v = _Values(x, num_groups, weight, bias, eps, layout, scale, shift, residual, mask, uneven, mean, rstd)
    y = v.m * ACTIVATIONS[activation][0](v.z)  # (8)
    return v.back(np.where(v.m, y, 0.0)), v.mean, v.rstd


def group_norm_vjp(
    dy: Array, x: Array, num_groups: int, weight: Array = None, bias: Array = None, *, eps: float = 1e-5,
    layout: str = "NCHW", activation: str | None = None, scale: Array = None, shift: Array = None,
    residual: Array = None, mask: Array = None, uneven: bool = False, mean: Array = None, rstd: Array = None,
) -> Gradients:  # fmt: skip
    """All gradients in float64, each in the shape of what it belongs to; mean and rstd are used if given."""
    v = _Values(x, num_groups, weight, bias, eps, layout, scale, shift, residual, mask, uneven, mean, rstd)
    dz = np.where(v.m, v.cube(dy) * ACTIVATIONS[activation][1](v.z), 0.0)  # (9)
    da = dz * (1 + v.scale)  # (11)
    dxhat = da * v.weight  # (13)
    dx = np.zeros_like(dxhat)
    for g, channels in enumerate(v.groups):
        d, h = dxhat[:, channels], v.xhat[:, channels]
        s1, s2 = (np.sum(t, (1, 2), keepdims=True) / v.count[:, g, None, None] for t in (d, d * h))
        dx[:, channels] = v.rstd[:, g, None, None] * (d - s1 - h * s2)  # (14)
    return Gradients(
        dx=v.back(np.where(v.m, dx, 0.0)),
        dweight=None if weight is None else np.sum(da * v.xhat, (0, 2)),  # (12)
        dbias=None if bias is None else np.sum(da, (0, 2)),
        dscale=None if scale is None else np.sum(dz * v.a, 2),  # (10)
        dshift=None if shift is None else np.sum(dz, 2),
        dresidual=None if residual is None else v.back(dz),
    )


def group_norm_backward(
    dy: Array, x: Array, num_groups: int, weight: Array = None, bias: Array = None, **options: Any
) -> Any:
    """dx, dweight and dbias of `group_norm_vjp`."""
    return group_norm_vjp(dy, x, num_groups, weight, bias, **options)[:3]


def moments(
    x: Array, num_groups: int, *, layout: str = "NCHW", mask: Array = None, uneven: bool = False
) -> tuple[Array, Array, Array]:
    """Count, mean and M2 (= M*var) of every group, each (N, G), by (1)-(3); the count of an empty group is 0."""
    v = _Values(x, num_groups, None, None, 1.0, layout, None, None, None, mask, uneven, None, None)
    found = [_statistics(v.cube(x)[:, channels], v.m) for channels in v.groups]
    count, mean, var = (np.stack(column, 1) for column in zip(*found, strict=True))
    return count * v.m.any((1, 2))[:, None], mean, var * count


def _statistics(e: Array, m: Array) -> tuple[Array, Array, Array]:
    """M, mean and var of one group of every sample; a group without elements counts as one element, zero."""
    e = np.where(m, e, 0.0)
    count = np.maximum(m.sum((1, 2)) * e.shape[1], 1)  # (1)
    mean = e.sum((1, 2)) / count  # (2)
    mean = mean + np.where(m, e - mean[:, None, None], 0.0).sum((1, 2)) / count  # what rounding left over
    d = np.where(m, e - mean[:, None, None], 0.0)
    return count, mean, (d * d).sum((1, 2)) / count  # (3)


class _Values:
    """Equations (1) to (7): every quantity that forward and backward share, as (N, C, S) float64 arrays."""

    def __init__(
        self, x: Array, num_groups: int, weight: Array, bias: Array, eps: float, layout: str, scale: Array, shift:
        Array, residual: Array, mask: Array, uneven: bool, mean: Array, rstd: Array,
    ) -> None:  # fmt: skip
        if layout not in ("NCHW", "NC", "NCL", "NCDHW", "NHWC", "NLC", "NDHWC"):
            raise ValueError(f"layout must be one of NCHW, NC, NCL, NCDHW, NHWC, NLC, NDHWC: got {layout!r}")
        self.axis = x.ndim - 1 if layout in ("NHWC", "NLC", "NDHWC") else 1
        self.shape = np.moveaxis(x, self.axis, 1).shape
        v = self.cube(x)
        n, c, s = v.shape
        if not 1 <= num_groups <= c or (c % num_groups and not uneven):
            raise ValueError(f"num_groups must divide the {c} channels, or be uneven: got {num_groups}")
        d = c // num_groups
        last = c if uneven else num_groups * d
        self.groups = [slice(g * d, last if g == num_groups - 1 else (g + 1) * d) for g in range(num_groups)]
        self.m: Array = np.ones((n, 1, s), bool) if mask is None else np.asarray(mask).reshape(n, 1, s)
        self.count = np.empty((n, num_groups))
        self.mean, self.rstd = np.empty((2, n, num_groups))
        self.xhat = np.empty_like(v)
        for g, channels in enumerate(self.groups):
            self.count[:, g], self.mean[:, g], var = _statistics(v[:, channels], self.m)
            self.rstd[:, g] = 1 / np.sqrt(var + eps)  # (4)
            if mean is not None and rstd is not None:
                self.mean[:, g], self.rstd[:, g] = mean[:, g], rstd[:, g]
            d = v[:, channels] - self.mean[:, g, None, None]
            self.xhat[:, channels] = np.where(self.m, d * self.rstd[:, g, None, None], 0.0)  # (5)
        self.weight = np.ones((c, 1)) if weight is None else np.asarray(weight, np.float64)[:, None]
        self.a = self.xhat * self.weight + (0.0 if bias is None else np.asarray(bias, np.float64)[:, None])  # (6)
        self.scale = np.zeros((n, c, 1)) if scale is None else np.asarray(scale, np.float64)[:, :, None]
        self.z = self.a * (1 + self.scale) + (0.0 if shift is None else np.asarray(shift, np.float64)[:, :, None])
        if residual is not None:
            self.z = self.z + self.cube(residual)  # (7)

    def cube(self, array: Array) -> Array:
        """An array of x's shape as (N, C, S) in float64."""
        moved = np.moveaxis(np.asarray(array, np.float64), self.axis, 1)
        return moved.reshape(*moved.shape[:2], int(np.prod(moved.shape[2:])))

    def back(self, cube: Array) -> Array:
        """(N, C, S) in x's shape again."""
        return np.moveaxis(cube.reshape(self.shape), 1, self.axis)
