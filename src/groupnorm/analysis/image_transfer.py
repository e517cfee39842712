"""A picture in the style of another, by instance, group and layer normalisation of its subbands.

Networks that transfer styles normalise the features of a trained encoder and need a trained decoder to see the result.
Here the features are the 60 subbands of `groupnorm.analysis.subbands`, whose decoder is a sum: nothing is trained, so
what the picture shows is what the normalisation did. It moves colours, contrasts and the strength of textures; it draws
no brush strokes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from groupnorm.analysis.style import style as style_of
from groupnorm.analysis.style import transfer
from groupnorm.analysis.style_distance import Distance, Kept, distance, kept, kept_by_batch_norm
from groupnorm.analysis.subbands import CHANNELS, SCALE_GROUPS, join, split

__all__ = ["EPS", "Study", "Transferred", "study", "transfer_image"]

Array = Any

EPS = 1e-10  # beside variances of bands of a picture from 0 to 1: a deviation of 1e-5 is 1/400 of a step of 8 bits


@dataclass(frozen=True, slots=True, eq=False)
class Transferred:
    """A result: its number of groups, the picture, how far it is from style and content, and the fraction of its values
    that had to be cut off at 0 or 1.
    """

    num_groups: int
    picture: Array
    to_style: Distance
    to_content: Distance
    clipped: float


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """Two pictures, the distance of their styles, a result for each number of groups, and what is left of that distance
    after a normalisation with that many groups, and after batch norm.
    """

    content: Array
    style: Array
    apart: Distance
    results: tuple[Transferred, ...]
    kept: dict[int, Kept]
    kept_by_batch_norm: Kept


def transfer_image(
    content: Array, style: Array, *, num_groups: int = SCALE_GROUPS, strength: float = 1.0, eps: float = EPS
) -> Array:
    """The content picture with the group statistics of the subbands of the style picture.

    content, style: (H, W, 3) floats between 0 and 1, each of its own size. num_groups: 60 takes each subband for itself
    (instance normalisation, AdaIN), 15 the filters of a scale, 3 a colour axis, 1 everything (layer normalisation).
    strength: from 0, the content, to 1. Gives (H, W, 3) float32, cut off at 0 and 1. Raises GroupNormError. Takes about
    a second for a picture of 600 by 512.
    """
    target = style_of(split(style), num_groups)
    return np.clip(join(transfer(split(content), target, num_groups, eps=eps, strength=strength)), 0, 1)


def study(
    content: Array, style: Array, groups: Sequence[int] = (CHANNELS, SCALE_GROUPS, 1), *, strength: float = 1.0
) -> Study:
    """Transfers with each number of groups, measured: every result is split again, and its style compared.

    A result is not exactly at the style: neighbouring subbands overlap, and values beyond 0 and 1 are cut off.
    """
    maps = split(content)
    ours, target = style_of(maps), style_of(split(style))
    results = []
    for num_groups in groups:
        raw = join(transfer(maps, target, num_groups, eps=EPS, strength=strength))
        picture = np.clip(raw, 0, 1)
        got = style_of(split(picture))
        clipped = float(np.mean(picture != raw))
        results.append(Transferred(num_groups, picture, distance(got, target), distance(got, ours), clipped))
    left = {num_groups: kept(ours, target, num_groups, eps=EPS) for num_groups in groups}
    return Study(content, style, distance(ours, target), tuple(results), left, kept_by_batch_norm(ours, target))
