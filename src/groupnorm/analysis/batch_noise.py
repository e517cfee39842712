"""How much the statistics of batch norm depend on which samples are in the batch; those of group norm do not.

A batch of n samples is drawn from all of them; its mean and variance of each channel are then off those of all samples.
If samples were independent, that error would fall as 1/sqrt(n). It is what makes batch norm worse for small batches
(Ioffe 2017, Batch Renormalization; Wu and He 2018, Group Normalization, from where the published errors come).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from groupnorm.analysis.published import ERROR_BY_BATCH, ERROR_BY_NORM, SOURCES
from groupnorm.errors import OptionError, ShapeError
from groupnorm.numpy import moments

__all__ = ["PUBLISHED", "PUBLISHED_NORMS", "SIZES", "SOURCE", "Noise", "batch_noise", "group_dependence"]

Array = Any

_EPS = 1e-5  # of the variance of all samples
_AT_ONCE = 1 << 22  # numbers that are gathered at a time: 32 MB
SIZES = (1, 2, 4, 8, 16, 32)

_TITLES = {"BN": "batch norm", "GN": "group norm, G = 32", "LN": "layer norm", "IN": "instance norm"}
PUBLISHED = {_TITLES[norm]: errors for norm, errors in ERROR_BY_BATCH.items()}  # by images on each of 8 GPUs
PUBLISHED_NORMS = {title: ERROR_BY_NORM[norm] for norm, title in _TITLES.items()}  # for 32 images
SOURCE = f"{SOURCES['batch']}: {SOURCES['batch'].measured}, validation error in %"


@dataclass(frozen=True, slots=True)
class Noise:
    """Errors of the statistics of a batch of `size` samples, root mean squares over draws and channels.

    mean: in standard deviations of the channel; var: relative to the variance of the channel; both against all samples.
    output: how much that moves a normalised value, root mean square. mean_by_law: the error of the mean for the first
    size of the list, falling with 1/sqrt(size) from there.
    """

    size: int
    mean: float
    var: float
    output: float
    mean_by_law: float


def batch_noise(x: Array, sizes: Sequence[int] = SIZES, *, draws: int = 2000, seed: int = 0) -> list[Noise]:
    """The noise of batch norm's statistics for each batch size, over random batches of the samples of x.

    x: (N, C, *positions), N at least 2; each batch is drawn from the N samples, with replacement. Statistics of the
    samples are taken once and merged for each batch, so the cost is one reading of x and O(draws * size * C). `output`
    is exact, from statistics: a sample of the batch with mean m and variance v, normalised by the batch, differs from
    the same normalised by all samples by a*(x - m) + b, whose mean square is a^2*v + b^2 (eps is 1e-5 of the channel's
    variance here). Raises ShapeError and OptionError.
    """
    x = np.asarray(x)
    if x.ndim < 2 or x.shape[0] < 2:
        raise ShapeError(f"x must have two samples or more: got the shape {x.shape}; a batch is drawn from them")
    if draws < 1 or any(size < 1 for size in sizes):
        raise OptionError(f"draws and sizes must be at least 1: got {draws} and {tuple(sizes)}")
    each = moments(x, x.shape[1])
    mean, var = each.mean, each.var  # (N, C)
    all_mean, all_var = mean.mean(0), var.mean(0) + mean.var(0)
    lively = all_var > 0  # a channel that is constant everywhere has no noise to measure
    mean, var, all_mean, all_var = mean[:, lively], var[:, lively], all_mean[lively], all_var[lively]
    if not lively.any():
        raise ShapeError("x must vary: every channel is constant, so there is no noise of its statistics")
    random = np.random.default_rng(seed)
    found: list[Noise] = []
    for size in sizes:
        batch = random.integers(0, len(mean), (draws, size))
        parts = np.array_split(batch, -(-batch.size * mean.shape[1] // _AT_ONCE))
        batch_mean = np.concatenate([mean[part].mean(1) for part in parts])  # (draws, C): equal counts: a mean ...
        # ... and the variance between the samples on top
        batch_var = np.concatenate([var[part].mean(1) + mean[part].var(1) for part in parts])
        off_mean = _rms((batch_mean - all_mean) / np.sqrt(all_var))
        first_mean, first_var = mean[batch[:, 0]], var[batch[:, 0]]  # the result of one sample of each batch
        ours, fixed = (1 / np.sqrt(v + _EPS * all_var) for v in (batch_var, all_var))
        slope, level = ours - fixed, (first_mean - batch_mean) * ours - (first_mean - all_mean) * fixed
        output = float(np.sqrt(np.mean(slope**2 * first_var + level**2)))
        one = off_mean * np.sqrt(size) if not found else found[0].mean * np.sqrt(found[0].size)
        found.append(Noise(size, off_mean, _rms(batch_var / all_var - 1), output, float(one / np.sqrt(size))))
    return found


def group_dependence(x: Array, num_groups: int) -> float:
    """The largest change of any group's mean or variance when a sample is normalised alone instead of in its batch.

    It is 0: a sample's groups are its own, and the operator gives them the same bits in any batch.
    """
    x = np.asarray(x)
    together = moments(x, num_groups)
    largest = 0.0
    for n in range(x.shape[0]):
        alone = moments(x[n : n + 1], num_groups)
        for name in ("mean", "var"):
            largest = max(largest, float(np.abs(getattr(alone, name)[0] - getattr(together, name)[n]).max()))
    return largest


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2)))
