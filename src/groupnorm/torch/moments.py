"""Moments of tensors: statistics that merge exactly, and through which gradients flow."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch._prims_common import suggest_memory_format
from torch.overrides import handle_torch_function, has_torch_function

from groupnorm.errors import DtypeError, GroupNormError, ShapeError
from groupnorm.torch import call, composite
from groupnorm.torch.autocast import cast
from groupnorm.torch.checks import check
from groupnorm.torch.road import as_plain, asks_for_gradient, is_followed, is_plain, is_transformed

__all__ = ["Moments", "merge_moments", "moments", "normalize"]

Tensor = Any


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Count, mean and M2 (the sum of squared deviations from the mean) of each group: float64 tensors of shape (N, G).

    Moments of different pieces of the same groups add up to those of the pieces together: `a + b`, or `merge_moments`
    for many. Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample
    variances, 1979, eq. 1.5.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def _shape(self) -> tuple[int, ...]:
        """That of all three. Raises ShapeError where they differ."""
        count, mean, m2 = (tuple(tensor.shape) for tensor in (self.count, self.mean, self.m2))
        if not count == mean == m2:
            raise ShapeError(f"count, mean and m2 of Moments must have one shape: got {count}, {mean} and {m2}")
        return count

    @property
    def var(self) -> Tensor:
        """Population variance, M2 / count; 0 where the count is 0."""
        return self.m2 / self.count.clamp(min=1)

    def rstd(self, eps: float = 1e-5) -> Tensor:
        """1 / sqrt(var + eps)."""
        return torch.rsqrt(self.var + eps)

    def __add__(self, other: "Moments") -> "Moments":
        if not isinstance(other, Moments):
            return NotImplemented
        if self._shape() != other._shape():
            raise ShapeError(
                f"Moments of different shapes cannot be merged: got {self._shape()} and {other._shape()}; take both "
                "from tensors with the same batch and the same num_groups"
            )
        count = self.count + other.count
        fraction = other.count / count.clamp(min=1)  # of the merged elements that come from `other`
        delta = other.mean - self.mean
        return Moments(count, self.mean + delta * fraction, self.m2 + other.m2 + delta * delta * self.count * fraction)


def merge_moments(moments: Iterable[Moments]) -> Moments:
    """The Moments of several pieces together, merged pairwise. Raises GroupNormError if there is none."""
    pieces = list(moments)
    if not pieces:
        raise GroupNormError("merge_moments needs at least one Moments: got an empty list; pass those of each piece")
    for piece in pieces:
        if not isinstance(piece, Moments):
            raise GroupNormError(f"merge_moments takes Moments: got {type(piece).__name__}; make them with "
                                 "groupnorm.torch.moments")  # fmt: skip
    while len(pieces) > 1:
        pairs = [a + b for a, b in zip(pieces[::2], pieces[1::2], strict=False)]
        pieces = pairs + pieces[len(pieces) & ~1 :]
    return pieces[0]


def moments(x: Tensor, num_groups: int, *, mask: Tensor = None) -> Moments:
    """Count, mean and M2 of every group of x. Arguments, types and errors as for `group_norm`; differentiable in x.
    Cost: x is read once; where a gradient is asked for, PyTorch's own operations do it, which keep float64 tensors of
    x's size.
    """
    if has_torch_function((x, mask)):
        return handle_torch_function(moments, (x, mask), x, num_groups, mask=mask)
    x, mask = as_plain(cast(x)), as_plain(mask)
    check(x, num_groups, None, None, 0.0, None, None, None, None, mask, None)
    if is_plain(x, mask) and not is_followed() and not asks_for_gradient(x):
        return Moments(*call.moments(x, num_groups, mask).movedim(2, 0).contiguous().unbind(0))
    return Moments(*composite.moments(x, num_groups, mask))


def normalize(
    x: Tensor, m: Moments, weight: Tensor = None, bias: Tensor = None, eps: float = 1e-5, *,
    activation: str | None = None, scale: Tensor = None, shift: Tensor = None, residual: Tensor = None,
) -> Tensor:  # fmt: skip
    """`group_norm` with statistics supplied by the caller: m, `Moments` of shape (N, G), e.g. merged over tiles.

    Differentiable in everything, m too. Arguments, result and errors as for `group_norm`. Cost: x is read once and y
    written once; where a gradient is asked for, PyTorch's own operations do it, which keep tensors of x's size.
    """
    inputs = (x, weight, bias, scale, shift, residual)
    if has_torch_function(inputs):
        return handle_torch_function(normalize, inputs, x, m, weight, bias, eps, activation=activation, scale=scale,
                                     shift=shift, residual=residual)  # fmt: skip
    x, weight, bias, scale, shift, residual = map(as_plain, inputs)
    x = cast(x)
    given: Any = m
    if not isinstance(given, Moments) or len(given._shape()) != 2:
        raise GroupNormError(f"m must be Moments of shape (N, G): got {type(m).__name__}; make them with "
                             "groupnorm.torch.moments")  # fmt: skip
    groups = m.mean.shape[1]
    check(x, groups, weight, bias, eps, activation, scale, shift, residual, None, None)
    if m.mean.shape[0] != x.shape[0]:
        raise ShapeError(f"m must have one row for each sample: got {m.mean.shape[0]} rows, {x.shape[0]} samples")
    tensors = (x, weight, bias, scale, shift, residual, m.count, m.mean, m.m2)
    for name, tensor in zip(("count", "mean", "m2"), (m.count, m.mean, m.m2), strict=True):
        if tensor.device != x.device:
            raise DtypeError(f"m.{name} must be on x's device: got {tensor.device}, x is on {x.device}")
    if is_plain(*tensors) and not is_followed() and not asks_for_gradient(*tensors):
        statistics = torch.stack((m.count.double(), m.mean.double(), m.m2.double()), 2)
        return call.normalize(x, statistics, weight, bias, eps, activation, scale, shift, residual)
    y = composite.normalize(x, m.mean, m.rstd(eps), weight, bias, activation, scale, shift, residual)
    return y if is_transformed() else y.contiguous(memory_format=suggest_memory_format(x))
