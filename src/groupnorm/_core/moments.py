"""Moments: the statistics of a piece of data as (count, mean, M2), which merge exactly."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from groupnorm.errors import GroupNormError, ShapeError

__all__ = ["Moments", "merge_moments"]

Array = Any


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Count, mean and M2 (the sum of squared deviations from the mean) of each group, float64 arrays of one shape, (N,
    G).

    Two Moments of different pieces of the same groups add up to the Moments of both pieces: `a + b`, or `merge_moments`
    for many. The merge is exact up to float64 rounding of values of the mean's size; no sum of squares of raw values is
    formed. Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances,
    1979, eq. 1.5.
    """

    count: Array
    mean: Array
    m2: Array

    def __post_init__(self) -> None:
        arrays = [np.asarray(a, np.float64) for a in (self.count, self.mean, self.m2)]
        if len({a.shape for a in arrays}) != 1:
            shapes = ", ".join(str(a.shape) for a in arrays)
            raise ShapeError(f"count, mean and m2 must have one shape, got {shapes}; give three arrays of shape (N, G)")
        for name, array in zip(("count", "mean", "m2"), arrays, strict=True):
            object.__setattr__(self, name, array)

    @property
    def var(self) -> Array:
        """Population variance, M2 / count; 0 where the count is 0."""
        return self.m2 / np.maximum(self.count, 1.0)

    def rstd(self, eps: float = 1e-5) -> Array:
        """1 / sqrt(var + eps)."""
        with np.errstate(divide="ignore"):
            return 1.0 / np.sqrt(self.var + eps)

    def __add__(self, other: "Moments") -> "Moments":
        if not isinstance(other, Moments):
            return NotImplemented
        if self.count.shape != other.count.shape:
            raise ShapeError(
                f"Moments of different shapes cannot be merged: got {self.count.shape} and {other.count.shape}; "
                "take both from arrays with the same batch and the same num_groups"
            )
        count = self.count + other.count
        fraction = other.count / np.maximum(count, 1.0)  # of the merged elements that come from `other`
        with np.errstate(invalid="ignore"):  # a group that holds infinity has no mean; its NaN stays in that group
            delta = other.mean - self.mean
            mean = self.mean + delta * fraction
            m2 = self.m2 + other.m2 + delta * delta * self.count * fraction
        empty_self, empty_other = self.count == 0, other.count == 0
        mean = np.where(empty_self, other.mean, np.where(empty_other, self.mean, mean))
        m2 = np.where(empty_self, other.m2, np.where(empty_other, self.m2, m2))
        return Moments(count, mean, m2)


def merge_moments(moments: Iterable[Moments]) -> Moments:
    """The Moments of several pieces together; pieces are merged pairwise, so many of them lose no accuracy.

    Raises ShapeError if the pieces have different shapes, GroupNormError if there is none. Costs O(pieces * N * G).
    """
    pieces = list(moments)
    if not pieces:
        raise GroupNormError(
            "merge_moments needs at least one Moments, got an empty list; pass the Moments of each piece"
        )
    for piece in pieces:
        if not isinstance(piece, Moments):
            raise GroupNormError(
                f"merge_moments takes Moments, got {type(piece).__name__}; make them with groupnorm.moments"
            )
    while len(pieces) > 1:
        pairs = [a + b for a, b in zip(pieces[::2], pieces[1::2], strict=False)]
        pieces = pairs + pieces[len(pieces) & ~1 :]
    return pieces[0]
