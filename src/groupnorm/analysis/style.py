"""What a style is: mean, variance and covariance of features; and features that take the style of others.

A style says how strong features are, how much they vary, and which of them go together, but not where. Gatys, Ecker and
Bethge 2016 (Image Style Transfer Using Convolutional Neural Networks, CVPR) describe it by the products of channels
summed over positions (their Gram matrix, eq. 3); Huang and Belongie 2017 (Arbitrary Style Transfer in Real-time with
Adaptive Instance Normalization, ICCV) by mean and standard deviation of each channel alone. Both follow from a count, a
mean and a co-moment, and those merge exactly, as `groupnorm.Moments` do: the style of an image is that of its tiles.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from numbers import Real
from typing import Any

import numpy as np

from groupnorm._core.layout import channel_axis
from groupnorm._core.problem import check_eps, check_num_groups
from groupnorm.errors import DtypeError, GroupNormError, OptionError, ShapeError
from groupnorm.numpy import group_norm, moments

__all__ = ["Style", "merge_styles", "style", "transfer"]

Array = Any

_PIECE = 1 << 15  # positions centred at a time: 60 channels of them in float64 are 16 MB


@dataclass(frozen=True, slots=True, eq=False)
class Style:
    """Statistics of the features of N samples: count (N,), mean (N, C), comoment (N, C, C), float64; and num_groups.

    count is the number of positions; comoment[n, i, j] the sum over them of (x_i - mean_i)*(x_j - mean_j). Styles of
    different pieces of the same samples add up to the style of both: `a + b`, or `merge_styles` for many, exact up to
    float64 rounding. Source: Chan, Golub and LeVeque 1979, eq. 1.5, with the outer product in place of the square.
    """

    count: Array
    mean: Array
    comoment: Array
    num_groups: int

    def __post_init__(self) -> None:
        try:
            count, mean, comoment = (np.asarray(a, np.float64) for a in (self.count, self.mean, self.comoment))
        except (TypeError, ValueError) as error:
            raise DtypeError(f"count, mean and comoment must be arrays of numbers: {error}") from error
        if mean.ndim != 2 or count.shape != mean.shape[:1] or comoment.shape != (*mean.shape, mean.shape[1]):
            raise ShapeError(f"count, mean and comoment must have the shapes (N,), (N, C) and (N, C, C): got "
                             f"{count.shape}, {mean.shape} and {comoment.shape}; make them with style")  # fmt: skip
        groups = check_num_groups(self.num_groups, mean.shape[1], None)
        for name, value in (("count", count), ("mean", mean), ("comoment", comoment), ("num_groups", groups)):
            object.__setattr__(self, name, value)

    @property
    def var(self) -> Array:
        """Population variance of each channel, (N, C)."""
        return np.einsum("nii->ni", self.gram)

    @property
    def gram(self) -> Array:
        """Covariance of the channels, (N, C, C): the Gram matrix of the centred features, over the count."""
        return self.comoment / np.maximum(self.count, 1.0)[:, None, None]

    @property
    def correlation(self) -> Array:
        """Correlation of the channels, (N, C, C): covariance over both standard deviations; 0 with a constant one."""
        std = np.sqrt(self.var)
        return _divided(self.gram, std[:, :, None] * std[:, None, :])

    @property
    def group_mean(self) -> Array:
        """Mean of each group, (N, G): what `groupnorm.moments` gives for num_groups."""
        return self._grouped(self.mean).mean(2)

    @property
    def group_var(self) -> Array:
        """Population variance of each group, (N, G): that of its channels, and of their means about the group's."""
        return self._grouped(self.var).mean(2) + self._grouped(self.mean).var(2)

    def regrouped(self, num_groups: int) -> "Style":
        """The same statistics with another number of groups. Raises as `groupnorm.group_norm` for a wrong one."""
        return Style(self.count, self.mean, self.comoment, num_groups)

    def normalized(self, eps: float = 1e-5) -> "Style":
        """The style that the features have after `groupnorm.group_norm` with num_groups, without affine: from the
        statistics alone, because every channel goes through one scale and one shift.
        """
        channels = self.mean.shape[1] // self.num_groups
        rstd = np.repeat(1 / np.sqrt(self.group_var + check_eps(eps)), channels, 1)
        shift = np.repeat(self.group_mean, channels, 1)
        return self.mapped(rstd, -shift * rstd)

    def mapped(self, scale: Array, shift: Array) -> "Style":
        """The style of scale*x + shift; scale and shift are (N, C) or (C,)."""
        scale = np.broadcast_to(scale, self.mean.shape)
        comoment = self.comoment * scale[:, :, None] * scale[:, None, :]
        return Style(self.count, self.mean * scale + shift, comoment, self.num_groups)

    def __add__(self, other: "Style") -> "Style":
        if not isinstance(other, Style):
            return NotImplemented
        if self.mean.shape != other.mean.shape or self.num_groups != other.num_groups:
            raise ShapeError(
                f"styles of different shapes cannot be merged: got {self.mean.shape} in {self.num_groups} groups and "
                f"{other.mean.shape} in {other.num_groups}; take both from features with the same N, C and num_groups"
            )
        count = self.count + other.count
        fraction = other.count / np.maximum(count, 1.0)  # of the merged positions that come from `other`
        delta = other.mean - self.mean
        mean = self.mean + delta * fraction[:, None]
        between = (self.count * fraction)[:, None, None] * delta[:, :, None] * delta[:, None, :]
        return Style(count, mean, self.comoment + other.comoment + between, self.num_groups)

    def _grouped(self, channels: Array) -> Array:
        n, c = channels.shape
        return channels.reshape(n, self.num_groups, c // self.num_groups)  # (N, G, D)


def style(features: Array, num_groups: int | None = None, *, layout: str = "NCHW") -> Style:
    """The style of features: mean, variance and covariance of their channels, and of num_groups groups of channels.

    features: (N, C, *spatial), or (N, *spatial, C) for layout "NHWC"; float16, bfloat16, float32 or float64.
    num_groups: None takes each channel for a group. Every sample has a style of its own. Raises as `groupnorm.moments`.
    Cost: two readings of the features and N*C*C*S multiplications in float64; beyond the result, some 16 MB.
    """
    axis = channel_axis(layout, np.ndim(features))
    channels = np.shape(features)[axis]
    rough = moments(features, max(channels, 1), layout=layout)  # its errors are the ones for wrong features
    groups = check_num_groups(channels if num_groups is None else num_groups, channels, None)
    rows = np.asarray(features)
    positions = prod(size for i, size in enumerate(rows.shape) if i not in (0, axis))
    rows = rows.reshape(len(rows), channels, positions) if axis == 1 else rows.reshape(len(rows), positions, channels)
    mean, comoment = rough.mean.copy(), np.zeros((rows.shape[0], channels, channels))
    for n, sample in enumerate(rows):
        total = np.zeros(channels)
        for start in range(0, positions, _PIECE):
            at = slice(start, start + _PIECE)
            piece = sample[:, at] if axis == 1 else sample[at].T
            with np.errstate(invalid="ignore"):  # infinity has no mean: NaN, in its channel and its products
                centred = piece.astype(np.float64) - mean[n][:, None]
                comoment[n] += centred @ centred.T
            total += centred.sum(1)
        off = total / max(positions, 1)  # the first mean comes from float32 lanes: this is what it lacks
        mean[n] += off
        comoment[n] -= positions * np.outer(off, off)
    return Style(np.full(rows.shape[0], float(positions)), mean, comoment, groups)


def merge_styles(styles: Iterable[Style]) -> Style:
    """The style of several pieces together, merged pairwise. GroupNormError if there is none, ShapeError if they do not
    fit. Cost: O(pieces * N * C * C).
    """
    given: Any = styles
    pieces: list[Style] = list(given) if isinstance(given, Iterable) else [given]
    if not pieces or not all(isinstance(piece, Style) for piece in pieces):
        got = "an empty list" if not pieces else ", ".join(sorted({type(piece).__name__ for piece in pieces}))
        raise GroupNormError(f"merge_styles needs one or more styles: got {got}; pass what style gives for each piece")
    while len(pieces) > 1:
        pairs = [a + b for a, b in zip(pieces[::2], pieces[1::2], strict=False)]
        pieces = pairs + pieces[len(pieces) & ~1 :]
    return pieces[0]


def transfer(
    content: Array, style: Style, num_groups: int | None = None, *, eps: float = 1e-5, layout: str = "NCHW",
    strength: float = 1.0,
) -> Array:  # fmt: skip
    """The content's features with the group statistics of a style: std_s*(x - mean_x)/std_x + mean_s in each group.

    content: features as for `style`, (N, C, *spatial). style: of one sample, or of N, with C channels; its positions
    may be others. num_groups: None takes each channel for a group: AdaIN, eq. 8 of Huang and Belongie 2017; 1 is a
    layer norm and can only change overall level and contrast. Both standard deviations are sqrt(var + eps), so the
    content with its own style comes back unchanged. strength: 0 leaves the content, 1 is the whole transfer, between
    them the features are mixed. Gives an array like content. Raises GroupNormError. Cost: that of
    `groupnorm.group_norm` for each sample.
    """
    x = np.asarray(content)
    channels = x.shape[channel_axis(layout, x.ndim)]
    groups = channels if num_groups is None else num_groups
    if not isinstance(style, Style):
        raise GroupNormError(f"style must be a Style: got {type(style).__name__}; make it with style(features)")
    if style.mean.shape[0] not in (1, x.shape[0]) or style.mean.shape[1] != channels:
        raise ShapeError(
            f"the style must be of 1 or {x.shape[0]} samples with {channels} channels: got {style.mean.shape[0]} with "
            f"{style.mean.shape[1]}; use the same features for both"
        )
    mixed: Any = strength
    if not isinstance(mixed, Real) or not 0 <= strength <= 1:
        raise OptionError(f"strength must be between 0 (content) and 1 (style): got {strength!r}")
    target = style.regrouped(groups)
    each = channels // target.num_groups
    std = np.repeat(np.sqrt(target.group_var + check_eps(eps)), each, 1)
    mean = np.repeat(target.group_mean, each, 1)
    y = np.empty_like(x)
    for n in range(x.shape[0]):  # weight and bias, not scale: 1 + (std - 1) would round a small std away
        of = n if len(std) > 1 else 0
        y[n : n + 1] = group_norm(x[n : n + 1], groups, std[of], mean[of], eps=eps, layout=layout)
    if strength == 1:
        return y
    wide = np.result_type(x.dtype, np.float32)  # 16 bits would round three times
    return (x.astype(wide) * (1 - strength) + y.astype(wide) * strength).astype(x.dtype)


def _divided(a: Array, b: Array) -> Array:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)
