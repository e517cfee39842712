"""How many groups: what was published about it, as points of error that a count costs.

All there is are two ablations of Wu and He, Group Normalization (arXiv 1803.08494), table 3: validation error in
percent of a ResNet-50 on ImageNet, 32 images per GPU, with the same number of groups, or the same number of channels
per group, in every layer. `groupnorm.analysis.advisor` adds what it knows besides; a conversion of BatchNorm layers,
which sees no more than their channels, takes `usual_groups`.
"""

import math
from collections.abc import Mapping

__all__ = ["ERROR_BY_CHANNELS_PER_GROUP", "ERROR_BY_GROUPS", "divisors", "interpolate", "noise_points",
           "published_points", "usual_groups"]  # fmt: skip

ERROR_BY_GROUPS = {64: 24.6, 32: 24.1, 16: 24.6, 8: 24.4, 4: 24.6, 2: 24.7, 1: 25.3}  # 1 is LayerNorm
ERROR_BY_CHANNELS_PER_GROUP = {64: 24.4, 32: 24.5, 16: 24.2, 8: 24.3, 4: 24.8, 2: 25.6, 1: 28.4}  # 1 is InstanceNorm

# How much of the second ablation is added to the first. The best network published has 32 groups in every layer, so 2
# channels per group where it has 64 channels. Advice that is to give back that network for its own layers must prefer
# 32 groups of 2 to 8 groups of 8: 0 + 1.4 w < 0.3 + 0.1 w, or w < 0.23.
CHANNELS_PER_GROUP_WEIGHT = 0.2

# Below 64 elements in a group its mean is known to 1/sqrt(64) = 1/8 of a standard deviation or worse. Nobody published
# an error over this; 10 points for each standard deviation beyond 1/8 let groups of 16 elements cost 1.25 points, about
# what LayerNorm costs (1.2), and groups of 4 elements 3.75, nearly what InstanceNorm does (4.3). A judgement.
ENOUGH_ELEMENTS = 64
NOISE_POINTS = 10.0

# A group of one element is normalized to 0: whatever the input was, y = bias.
NOTHING_LEFT_POINTS = 100.0

_BEST_BY_GROUPS = min(ERROR_BY_GROUPS.values())
_BEST_BY_CHANNELS = min(ERROR_BY_CHANNELS_PER_GROUP.values())


def interpolate(table: Mapping[int, float], at: float) -> float | None:
    """A table's value at `at`, along straight lines over log2; None outside of its range, and exact at its entries."""
    if at in table:
        return table[int(at)]
    below = max((key for key in table if key < at), default=None)
    above = min((key for key in table if key > at), default=None)
    if below is None or above is None:
        return None
    part = math.log2(at / below) / math.log2(above / below)
    return table[below] + part * (table[above] - table[below])


def published_points(channels: int, num_groups: int) -> tuple[float, float]:
    """Points of error above the best, from the ablation by groups and (weighted) from that by channels per group.

    The two ends are norms with numbers of their own: one group is LayerNorm (1.2 points), one channel per group
    InstanceNorm (4.3). Above 64, where nothing was published, the number for 64 is kept.
    """
    if num_groups == 1:
        return ERROR_BY_GROUPS[1] - _BEST_BY_GROUPS, 0.0
    if num_groups == channels:
        return 0.0, ERROR_BY_CHANNELS_PER_GROUP[1] - _BEST_BY_GROUPS
    by_groups = interpolate(ERROR_BY_GROUPS, min(num_groups, 64))
    by_channels = interpolate(ERROR_BY_CHANNELS_PER_GROUP, min(channels // num_groups, 64))
    assert by_groups is not None
    assert by_channels is not None
    return by_groups - _BEST_BY_GROUPS, CHANNELS_PER_GROUP_WEIGHT * (by_channels - _BEST_BY_CHANNELS)


def noise_points(elements: int) -> float:
    """Points of error for the noise in the statistics of a group of so many elements: M independent values know their
    mean to 1/sqrt(M) of a standard deviation.
    """
    if elements <= 1:
        return NOTHING_LEFT_POINTS
    return NOISE_POINTS * max(0.0, 1 / math.sqrt(elements) - 1 / math.sqrt(ENOUGH_ELEMENTS))


def divisors(channels: int) -> list[int]:
    """Every number of groups of one size, in ascending order. Cost: sqrt(channels) divisions."""
    small = [d for d in range(1, math.isqrt(channels) + 1) if channels % d == 0]
    return small + [channels // d for d in reversed(small) if d * d != channels]


def usual_groups(channels: int, positions: int | None = None) -> int:
    """The divisor of `channels` that costs the least; between equals the one nearest to 32.

    positions: spatial size, if it is known and small: groups of few elements then cost more. 32 for 64, 96, 128, 160
    and most multiples of 32 above, fewer for fewer channels: 8 for 32. 1 where the channels are prime.
    """

    def cost(groups: int) -> tuple[float, float]:
        noise = 0.0 if positions is None else noise_points(channels // groups * positions)
        return round(sum(published_points(channels, groups)) + noise, 9), abs(math.log2(groups / 32))

    return min(divisors(channels), key=cost)
