"""How far two styles are from each other, and what is left of that after a normalisation.

The parts of a distance are measured in the spread of each channel, so that a channel of small values counts as much as
one of large values, and a change of units changes nothing. Two losses of the literature are given beside them, in the
units of the features.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from groupnorm.analysis.style import Style
from groupnorm.errors import GroupNormError, ShapeError

__all__ = ["Distance", "Kept", "distance", "kept", "kept_by_batch_norm"]

Array = Any


@dataclass(frozen=True, slots=True)
class Distance:
    """Between two styles; 0 where they are the same. See `distance` for what each number is."""

    mean: float
    variance: float
    gram: float
    correlation: float
    gram_loss: float
    mean_std_loss: float


@dataclass(frozen=True, slots=True)
class Kept:
    """Fractions of the distance between two styles that a normalisation leaves: 0 removes it, 1 keeps it; NaN where
    there was none.
    """

    mean: float
    variance: float
    gram: float
    correlation: float


def distance(a: Style, b: Style) -> Distance:
    """How far two styles are from each other, averaged over samples; it is the same from b to a.

    With p = (var_a + var_b)/2 of each channel, the parts are root mean squares, over channels or pairs of channels, of

        mean          (mean_a - mean_b) / sqrt(p)                     in standard deviations
        variance      (var_a - var_b) / p                             from 0 to 2
        gram          (gram_a - gram_b)_ij / sqrt(p_i * p_j)          variances and covariances
        correlation   correlation_a - correlation_b                   what `gram` has beyond the variances, 0 to 2

    A channel that is constant in both styles adds 0 to these, or infinity to `mean` if its two constants differ. The
    losses, with the Gram matrix of the raw features, F F^T = count*(gram + mean mean^T), and C channels:

        gram_loss      sum_ij ((F F^T/count)_a - (F F^T/count)_b)_ij^2 / (4*C^2)
        mean_std_loss  ||mean_a - mean_b|| + ||std_a - std_b||

    The first is eq. 4 of Gatys, Ecker and Bethge 2016, where both have the same number of positions; the second is the
    style loss of Huang and Belongie 2017 for one layer. Raises ShapeError if N or C differ.
    """
    for given in (a, b):
        if not isinstance(given, Style):
            raise GroupNormError(f"distance takes two styles: got {type(given).__name__}; make them with style")
    if a.mean.shape != b.mean.shape:
        raise ShapeError(f"two styles must have the same N and C: got {a.mean.shape} and {b.mean.shape}; "
                         "take both from the same kind of features")  # fmt: skip
    pooled = (a.var + b.var) / 2
    spread = np.sqrt(pooled)
    both = spread[:, :, None] * spread[:, None, :]
    std_a, std_b = np.sqrt(a.var), np.sqrt(b.var)
    raw = (a.gram + _outer(a.mean)) - (b.gram + _outer(b.mean))
    channels = max(a.mean.shape[1], 1)
    return Distance(
        mean=_rms(_relative(a.mean - b.mean, spread)),
        variance=_rms(_relative(a.var - b.var, pooled)),
        gram=_rms(_relative(a.gram - b.gram, both)),
        correlation=_rms(a.correlation - b.correlation),
        gram_loss=_average((raw**2).sum((1, 2)) / (4 * channels**2)),
        mean_std_loss=_average(np.linalg.norm(a.mean - b.mean, axis=1) + np.linalg.norm(std_a - std_b, axis=1)),
    )


def kept(a: Style, b: Style, num_groups: int, *, eps: float = 1e-5) -> Kept:
    """What is left of the distance between two styles when the features of both go through a group norm.

    num_groups = C is instance norm, 1 is layer norm. Means and variances of channels go with instance norm; of a group
    with more channels only its own mean and variance go, and what its channels are to each other stays. A fraction can
    be above 1: one mean is taken from all channels of a group, so those that agreed in both styles agree no longer.
    Correlations stay in any case, because each channel goes through one scale and one shift. Raises as `distance`, and
    for num_groups as `groupnorm.group_norm`. Cost: O(N*C*C), from the statistics alone.
    """
    before = distance(a, b)
    after = distance(a.regrouped(num_groups).normalized(eps), b.regrouped(num_groups).normalized(eps))
    return _fractions(before, after)


def kept_by_batch_norm(a: Style, b: Style, *, eps: float = 1e-5) -> Kept:
    """The same for batch norm in training, with both in one batch: one mean and variance for each channel of all.

    Both styles go through the same scale and shift, so all of their distance stays; eps, too, changes nothing. This is
    why Ulyanov et al. 2016 took instance norm instead. Arguments and errors as for `kept`.
    """
    before = distance(a, b)
    if not len(a.count):
        return _fractions(before, before)
    together = [Style(s.count[n : n + 1], s.mean[n : n + 1], s.comoment[n : n + 1], s.num_groups)
                for s in (a, b) for n in range(len(s.count))]  # fmt: skip
    batch = together[0].regrouped(together[0].mean.shape[1])
    for each in together[1:]:
        batch = batch + each.regrouped(batch.num_groups)
    rstd = 1 / np.sqrt(batch.var[0] + eps)
    shift = -batch.mean[0] * rstd
    return _fractions(before, distance(a.mapped(rstd, shift), b.mapped(rstd, shift)))


def _fractions(before: Distance, after: Distance) -> Kept:
    parts = ("mean", "variance", "gram", "correlation")
    pairs = {name: (getattr(before, name), getattr(after, name)) for name in parts}
    return Kept(**{name: left / there if there > 0 else float("nan") for name, (there, left) in pairs.items()})


def _outer(mean: Array) -> Array:
    return mean[:, :, None] * mean[:, None, :]


def _relative(difference: Array, spread: Array) -> Array:
    """difference / spread; 0 where both are 0, infinity where only the spread is."""
    found = np.where(difference == 0, 0.0, np.inf)
    return np.divide(difference, spread, out=found, where=spread > 0)


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2))) if values.size else 0.0


def _average(values: Array) -> float:
    return float(np.mean(values)) if values.size else 0.0
