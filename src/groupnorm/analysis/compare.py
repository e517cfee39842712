"""Group norm beside instance, layer and batch norm: where they are the same function, and how far apart otherwise.

All four are (x - mean)/sqrt(var + eps)*weight + bias and differ in what mean and variance are taken over: group norm
over the channels of a group and all positions of a sample; instance norm over one channel (G = C); layer norm over all
channels (G = 1); batch norm over one channel of all samples, in training. So each becomes another where these sets
agree, and that is checked here on data: one side by this package's operator, the other by its own definition in
float64.

Sources: Wu and He 2018, Group Normalization; Ulyanov, Vedaldi and Lempitsky 2016, Instance Normalization; Ba, Kiros and
Hinton 2016, Layer Normalization; Ioffe and Szegedy 2015, Batch Normalization.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from groupnorm._core.group_counts import divisors
from groupnorm._core.problem import check_eps, check_num_groups
from groupnorm.errors import DtypeError, GroupNormError, ShapeError
from groupnorm.numpy import group_norm

__all__ = ["Identity", "Kind", "batch_norm", "beside_torch", "check_features", "identities", "kinds", "nearest_groups"]

Array = Any

_MOST = {"float32": 1e35, "float64": 1e150}  # multiples and squares of it, in float64, are finite


@dataclass(frozen=True, slots=True)
class Identity:
    """Two ways to one result: the largest absolute difference, and that as a fraction of what rounding allows.

    `fraction` is None where nothing is promised: PyTorch's rounding is its own.
    """

    ours: str
    other: str
    largest: float
    fraction: float | None

    @property
    def holds(self) -> bool:
        """Whether the difference is no more than rounding."""
        return self.fraction is None or self.fraction <= 1


@dataclass(frozen=True, slots=True)
class Kind:
    """A normalisation of x: what mean and variance are taken over, how many pairs of them there are, whether a sample's
    result depends on the others in its batch, and the root mean square of its difference from the group norm.
    """

    name: str
    over: str
    statistics: int
    uses_batch: bool
    difference: float


def nearest_groups(channels: int, wanted: int = 32) -> int:
    """The number of groups nearest to `wanted` that divides the channels; the smaller of two."""
    return min(divisors(channels), key=lambda d: (abs(d - wanted), d))


def check_features(x: Array) -> Array:
    """x, contiguous float32 or float64 (16-bit floats are widened). Raises DtypeError, ShapeError or GroupNormError for
    what cannot be compared: the norms need samples, channels, two positions or more, and finite values.
    """
    x = np.asarray(x)
    if x.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
        raise DtypeError(f"x must be of floats: got {x.dtype}; convert it with astype('float32')")
    if x.ndim < 3 or 0 in x.shape or np.prod(x.shape[2:]) < 2:
        raise ShapeError(f"x must have the shape (N, C, *positions) with two positions or more: got {x.shape}; "
                         "variances of one value are 0")  # fmt: skip
    if not np.isfinite(x).all():
        raise GroupNormError("x must be finite: got NaN or infinity, for which no two norms can be compared")
    wide = np.ascontiguousarray(x, np.float64 if x.dtype == np.float64 else np.float32)
    if (most := float(np.abs(wide).max())) > _MOST[wide.dtype.name]:
        raise GroupNormError(f"x must be of ordinary size, up to {_MOST[wide.dtype.name]:g} in {wide.dtype}: got "
                             f"{most:g}, where other norms overflow; divide it")  # fmt: skip
    return wide


def batch_norm(x: Array, weight: Array = None, bias: Array = None, *, eps: float = 1e-5) -> Array:
    """Batch norm in training, by group norm: samples and positions of a channel together are one sample's channel.

    x: (N, C, *positions); weight, bias: (C,). Source: Ioffe and Szegedy 2015, without running statistics. Raises as
    `groupnorm.group_norm`. Cost: that of group norm, and two copies.
    """
    moved = np.ascontiguousarray(np.moveaxis(x, 1, 0))
    y = group_norm(moved.reshape(1, len(moved), -1), len(moved), weight, bias, eps=eps)
    return np.ascontiguousarray(np.moveaxis(y.reshape(moved.shape), 0, 1))


def identities(x: Array, num_groups: int, weight: Array, bias: Array, *, eps: float = 1e-5) -> list[Identity]:
    """Where group norm is another norm, checked on x, (N, C, *positions), with weight and bias, (C,).

    What rounding allows is the promise of the operator, elementwise, 4 units of x's precision times (1 + |mean|/std) *
    (|weight*xhat| + |bias| + |weight|), and twice that where the input was rounded as well. Raises as
    `groupnorm.group_norm`; see `check_features` for x. Needs about ten times the memory of x.
    """
    x = check_features(x)
    N, C = x.shape[:2]
    G = check_num_groups(num_groups, C, None)
    eps = check_eps(eps)
    rows = x.reshape(N, C, -1)
    affine = weight, bias
    flat = np.moveaxis(rows, 1, 0).reshape(1, C, -1)
    by_channel = [a.astype(np.float64)[:, None] for a in affine]
    found = [
        _identity("GN, G = C", "instance norm", group_norm(rows, C, *affine, eps=eps),
                  _defined(rows, (2,), *by_channel, eps=eps)),
        _identity("GN, G = 1", "layer norm over channels and positions, with a weight equal at all positions",
                  group_norm(rows, 1, *affine, eps=eps), _defined(rows, (1, 2), *by_channel, eps=eps)),
        _identity("GN, G = C, of one sample", "batch norm in training, batch of 1",
                  group_norm(rows[:1], C, *affine, eps=eps), _defined(rows[:1], (0, 2), *by_channel, eps=eps)),
        _identity("GN, G = C, of x as (1, C, N*S)", "batch norm in training",
                  np.moveaxis(group_norm(flat, C, *affine, eps=eps).reshape(C, N, -1), 0, 1),
                  _defined(rows, (0, 2), *by_channel, eps=eps)),
    ]  # fmt: skip
    plain = group_norm(rows, G, eps=eps)
    for name, shape, axes in (("instance norm of x as (N, G, D*S)", (N, G, -1), (2,)),
                              ("batch norm in training of x as (1, N*G, D*S)", (1, N * G, -1), (0, 2))):  # fmt: skip
        want, allowed = _defined(x.reshape(shape), axes, eps=eps)
        found.append(_identity(f"GN, G = {G}, no affine", name, plain,
                               (want.reshape(plain.shape), allowed.reshape(plain.shape))))  # fmt: skip
    groups = rows.reshape(N, G, -1).astype(np.float64)
    moved = 4 * groups + groups.std(2, keepdims=True) * np.linspace(-4, 4, G)[:, None]
    moved = moved.astype(x.dtype).reshape(rows.shape)
    want, _ = _defined(groups, (2,), eps=eps)
    _, allowed = _defined(moved.reshape(groups.shape), (2,), eps=16 * eps)
    found.append(_identity(f"GN, G = {G}, of 4*x + one number for each group, with 16*eps", f"GN, G = {G}, of x",
                           group_norm(moved, G, eps=16 * eps),
                           (want.reshape(rows.shape), 2 * allowed.reshape(rows.shape))))  # fmt: skip
    return found


def beside_torch(x: Array, num_groups: int, weight: Array, bias: Array, *, eps: float = 1e-5) -> list[Identity]:
    """The differences from PyTorch's own group_norm, instance_norm, layer_norm and batch_norm, which get the same x; an
    empty list if PyTorch is not installed. Arguments as for `identities`.
    """
    try:
        import torch
    except ImportError:
        return []
    F = torch.nn.functional
    x = check_features(x)
    C = x.shape[1]
    weight, bias = weight.astype(x.dtype), bias.astype(x.dtype)
    tensor, w, b = (torch.from_numpy(a) for a in (x, weight, bias))
    each = (C, *(1,) * (x.ndim - 2))
    wide_w, wide_b = (a.reshape(each).expand(x.shape[1:]) for a in (w, b))
    pairs = [
        (f"GN, G = {num_groups}", "group_norm", group_norm(x, num_groups, weight, bias, eps=eps),
         F.group_norm(tensor, num_groups, w, b, eps)),
        ("GN, G = C", "instance_norm", group_norm(x, C, weight, bias, eps=eps),
         F.instance_norm(tensor, weight=w, bias=b, eps=eps)),
        ("GN, G = 1", "layer_norm", group_norm(x, 1, weight, bias, eps=eps),
         F.layer_norm(tensor, x.shape[1:], wide_w, wide_b, eps)),
        ("GN, G = C, of x as (1, C, N*S)", "batch_norm, training", batch_norm(x, weight, bias, eps=eps),
         F.batch_norm(tensor, None, None, w, b, True, 0.0, eps)),
    ]  # fmt: skip
    return [Identity(ours, f"torch: {name}", _largest(y, other.numpy()), None) for ours, name, y, other in pairs]


def kinds(x: Array, num_groups: int, *, eps: float = 1e-5) -> list[Kind]:
    """The four norms of x without affine: what each averages over, and how far its result is from the group norm.

    Arguments and errors as for `identities`.
    """
    x = check_features(x)
    N, C = x.shape[:2]
    ours = group_norm(x, num_groups, eps=eps)
    instance, layer, batch = group_norm(x, C, eps=eps), group_norm(x, 1, eps=eps), batch_norm(x, eps=eps)
    over = f"{C // num_groups} channels and all positions of a sample"
    return [
        Kind(f"group norm, G = {num_groups}", over, N * num_groups, False, 0.0),
        Kind(f"instance norm, G = {C}", "a channel of a sample", N * C, False, _apart(instance, ours)),
        Kind("layer norm, G = 1", "all channels and positions of a sample", N, False, _apart(layer, ours)),
        Kind("batch norm, training", "a channel of all samples", C, True, _apart(batch, ours)),
    ]


def _defined(x: Array, axes: tuple[int, ...], weight: Any = 1.0, bias: Any = 0.0, *, eps: float) -> tuple[Array, Array]:
    """The norm over these axes by its definition, in float64; and what rounding allows the operator, for x's dtype."""
    wide = x.astype(np.float64)
    mean = wide.mean(axes, keepdims=True)
    centred = wide - mean
    rstd = 1 / np.sqrt(np.mean(centred**2, axes, keepdims=True) + eps)
    scaled = centred * rstd * weight
    unit = np.finfo(x.dtype).eps / 2
    allowed = 4 * unit * (1 + np.abs(mean) * rstd) * (np.abs(scaled) + np.abs(bias) + np.abs(weight))
    return scaled + bias, allowed


def _identity(ours: str, other: str, y: Array, defined: tuple[Array, Array]) -> Identity:
    want, allowed = defined
    difference = np.abs(y - want)
    fraction = np.divide(difference, allowed, out=np.where(difference == 0, 0.0, np.inf), where=allowed > 0)
    return Identity(ours, other, float(difference.max()), float(fraction.max()))


def _apart(a: Array, b: Array) -> float:
    """Root mean square of the difference."""
    return float(np.sqrt(np.mean(np.subtract(a, b, dtype=np.float64) ** 2)))


def _largest(a: Array, b: Array) -> float:
    return float(np.abs(np.subtract(a, b, dtype=np.float64)).max())
