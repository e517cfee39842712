"""`advise`: how many groups a layer should have, ranked and with reasons, and whether it should have them at all.

A choice's score counts percentage points of validation error above the best that was published, as far as that is
known; what was never published as an error is turned into points by the constants below. Lower is better.
"""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, overload

from groupnorm._core.group_counts import (
    CHANNELS_PER_GROUP_WEIGHT,
    ERROR_BY_CHANNELS_PER_GROUP,
    ERROR_BY_GROUPS,
    divisors,
    noise_points,
    published_points,
)
from groupnorm._core.layout import LAYOUTS
from groupnorm._core.problem import DTYPES
from groupnorm._core.traffic import ITEM_BYTES
from groupnorm.analysis import advice_text, circumstances
from groupnorm.analysis.circumstances import NormError, TrainingCost
from groupnorm.analysis.published import CONFIGURATIONS, SOURCES
from groupnorm.analysis.roofline import Roofline, roofline
from groupnorm.errors import OptionError, ShapeError

__all__ = ["TASKS", "Advice", "Choice", "advise"]

TASKS = tuple(CONFIGURATIONS)

# What a choice costs that is not the one networks of the task were published with: what neighbours in the ablation by
# groups differ by (24.1 and 24.6).
UNUSUAL_POINTS = 0.5
# Each doubling of the time; times within the tolerance are equal, as measurements of one kernel differ by that much.
DOUBLED_TIME_POINTS = 0.2
TIME_TOLERANCE = 0.05
# Channels last, a group that does not begin and end at 16 bytes: vectors of two groups overlap. Decides between equals.
UNALIGNED_POINTS = 0.02
VECTOR_BYTES = 16

MAX_CHANNELS = 1 << 24
MAX_ELEMENTS = 1 << 62
MAX_CHOICES = 16


@dataclass(frozen=True, slots=True)
class Choice:
    """One number of groups. `points` are the parts of the score by name, in percentage points of error.

    `predicted_s`: predicted seconds of a forward on this package's CPU engine; None where the machine is no CPU.
    """

    num_groups: int
    score: float
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    predicted_s: float | None
    points: dict[str, float]


@dataclass(frozen=True)
class Advice:
    """What `advise` answers: a sequence of its choices, best first; str(advice) is the whole as text.

    `norms`: published errors of the four norms at this batch size. `instead`: when to take something else, and what.
    `cost`: what a change from BatchNorm costs. `warnings`: the traps that everybody meets. `machine`: name of the
    machine that `predicted_s` and `bound_s`, the least time of a forward, are for; `bound` is what sets that.
    """

    channels: int
    spatial: tuple[int, ...]
    batch: int
    task: str | None
    dtype: str
    layout: str
    machine: str
    bound_s: float
    bound: str
    choices: tuple[Choice, ...]
    norms: tuple[NormError, ...]
    instead: tuple[str, ...]
    cost: TrainingCost
    warnings: tuple[str, ...]

    @property
    def num_groups(self) -> int | None:
        """The number of groups to take; None where every choice has one element per group (M = 1)."""
        best = self.choices[0]
        return best.num_groups if self.elements(best.num_groups) > 1 else None

    def elements(self, num_groups: int) -> int:
        """M = D * S: how many elements a group has."""
        return self.channels // num_groups * math.prod(self.spatial)

    def __len__(self) -> int:
        return len(self.choices)

    def __iter__(self) -> Iterator[Choice]:
        return iter(self.choices)

    @overload
    def __getitem__(self, index: int) -> Choice: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Choice, ...]: ...
    def __getitem__(self, index: int | slice) -> Choice | tuple[Choice, ...]:
        return self.choices[index]

    def __str__(self) -> str:
        return advice_text.as_text(self)


def advise(
    channels: int, spatial: int | tuple[int, ...], batch: int, *, task: str | None = None, dtype: str = "float32",
    layout: str = "NCHW", machine: str | None = None,
) -> Advice:  # fmt: skip
    """How many groups for a layer of (batch, channels, *spatial), ranked, and whether to use GroupNorm here at all.

    spatial: sizes, or their product; () or 1 for vectors. batch: samples that BatchNorm would see at once, so those of
    one GPU. task: None, "classification", "detection", "segmentation", "diffusion", "video", "medical", "dp-sgd" or
    "style". machine: None for this one, or what `groupnorm.analysis.roofline.roofline` takes.

    Returns an `Advice`. The choices are the divisors of channels (the 16 nearest to 32, one group and one channel per
    group always among them). Raises OptionError and ShapeError. Cost: one roofline per choice; milliseconds once the
    machine's figures are known. Sources: `groupnorm.analysis.published`, named in each reason.
    """
    channels = _whole("channels", channels, MAX_CHANNELS)
    batch = _whole("batch", batch, MAX_ELEMENTS)
    sizes = _sizes(spatial)
    if batch * channels * math.prod(sizes) > MAX_ELEMENTS:
        raise ShapeError(f"batch * channels * spatial must be at most 2^62: got {batch}, {channels}, {sizes}; "
                         "check the sizes")  # fmt: skip
    if task is not None and task not in TASKS:
        raise OptionError(f"task must be None or one of {', '.join(TASKS)}: got {task!r}")
    if dtype not in DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(DTYPES)}: got {dtype!r}")
    if layout not in LAYOUTS:
        raise OptionError(f"layout must be one of {', '.join(LAYOUTS)}: got {layout!r}")
    last = not layout.startswith("NC")
    shape = (batch, *sizes, channels) if last else (batch, channels, *sizes)
    tried = [_Tried(groups, roofline(shape, groups, dtype=dtype, layout="NHWC" if last else "NCHW", machine=machine))
             for groups in _candidates(channels, task)]  # fmt: skip
    fastest_s = min(one.time_s for one in tried)
    layer = _Layer(channels, sizes, task, ITEM_BYTES[dtype], last)
    choices = sorted((_choice(layer, one, fastest_s) for one in tried), key=_order)
    positions = math.prod(sizes)
    return Advice(
        channels, sizes, batch, task, dtype, layout, tried[0].roof.machine.name, tried[0].roof.time_s,
        tried[0].roof.bound, tuple(choices), circumstances.norm_errors(batch),
        circumstances.instead(channels, positions, batch, task),
        circumstances.training_cost(batch, channels, positions, choices[0].num_groups, ITEM_BYTES[dtype]),
        circumstances.general_warnings(),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Tried:
    """A number of groups and how fast it is: predicted, or where that is unknown the least time."""

    num_groups: int
    roof: Roofline

    @property
    def time_s(self) -> float:
        return self.roof.time_s if self.roof.predicted_s is None else self.roof.predicted_s


@dataclass(frozen=True, slots=True)
class _Layer:
    channels: int
    spatial: tuple[int, ...]
    task: str | None
    itemsize: int
    channels_last: bool


def _choice(layer: _Layer, tried: _Tried, fastest_s: float) -> Choice:
    """Score one number of groups. Every number that enters stands in a reason or a warning."""
    C, G = layer.channels, tried.num_groups
    D = C // G
    M = D * math.prod(layer.spatial)
    by_groups, by_channels = published_points(C, G)
    points = {"by groups": by_groups, "by channels": by_channels, "noise": noise_points(M)}
    reasons, warnings = _published_reasons(C, G), list(_noise_warnings(M, D))
    if layer.task is not None:
        of_task = CONFIGURATIONS[layer.task]
        usual = of_task.groups(C)
        if usual == G:
            reasons.append(f"{of_task.rule}: as published for {layer.task} [{of_task.source}]")
            if layer.task == "style":  # an error in classification says nothing about it
                points["by groups"] = points["by channels"] = 0.0
            if G == C > 1 and layer.task == "dp-sgd":
                warnings.append(f"gcd(32, {C}) = {G} leaves one channel to a group: that is InstanceNorm")
        elif C % usual == 0:
            points["task"] = UNUSUAL_POINTS
            reasons.append(f"for {layer.task}, {of_task.rule} were published [{of_task.source}]")
        else:
            reasons.append(f"{of_task.rule}, usual for {layer.task}, do not divide {C} channels [{of_task.source}]")
    if layer.channels_last and (D * layer.itemsize) % VECTOR_BYTES and D > 1:
        points["alignment"] = UNALIGNED_POINTS
        odd = "an odd number of channels" if D % 2 else "groups"
        warnings.append(f"channels last, D = {D}: {odd} of {D * layer.itemsize} bytes, no multiple of {VECTOR_BYTES}: "
                        "vector loads straddle groups")  # fmt: skip
    slower = tried.time_s / fastest_s if fastest_s > 0 else 1.0
    if slower > 1 + TIME_TOLERANCE:
        points["time"] = DOUBLED_TIME_POINTS * math.log2(slower)
        kind = "predicted" if tried.roof.predicted_s is not None else "at least"
        reasons.append(f"{kind} {tried.time_s * 1e6:.3g} us a forward, {slower:.2f} times the fastest choice")
    score = round(sum(points.values()), 6)
    return Choice(G, score, tuple(reasons), tuple(warnings), tried.roof.predicted_s, points)


def _published_reasons(C: int, G: int) -> list[str]:
    """What the two ablations, or the norm that this number of groups is, say about G groups of C channels."""
    D = C // G
    by_groups, by_channels = published_points(C, G)
    if G == 1:
        also = ", which here is InstanceNorm too" if C == 1 else ""
        return [f"one group over all channels and positions is the LayerNorm of Wu and He{also}: published error "
                f"{ERROR_BY_GROUPS[1]}, {by_groups:.1f} above 32 groups [{SOURCES['groups']}]"]  # fmt: skip
    if G == C:
        return [f"one channel per group is InstanceNorm: published error {ERROR_BY_CHANNELS_PER_GROUP[1]}, "
                f"{by_channels:.1f} above 32 groups [{SOURCES['channels_per_group']}]"]  # fmt: skip
    return [
        f"{G} groups: {_read(ERROR_BY_GROUPS, G)}, {by_groups:.2f} above the best [{SOURCES['groups']}]",
        f"{D} channels per group: {_read(ERROR_BY_CHANNELS_PER_GROUP, D)}, counted {by_channels:.2f} "
        f"({CHANNELS_PER_GROUP_WEIGHT:g} of what it is above the best) [{SOURCES['channels_per_group']}]",
    ]


def _read(table: dict[int, float], at: int) -> str:
    if at in table:
        return f"published error {table[at]}"
    if at > max(table):
        return f"nothing published above {max(table)}, whose error {table[max(table)]} is taken"
    below, above = max(key for key in table if key < at), min(key for key in table if key > at)
    return f"between the published errors {table[below]} (for {below}) and {table[above]} (for {above})"


def _noise_warnings(M: int, D: int) -> Iterator[str]:
    if M == 1:
        yield "M = 1: one value per group is its own mean, so every output equals bias; never use this"
    elif M == 2:
        yield "M = 2: xhat can only be about +1 and -1 (or 0 twice): all but the order of two values is lost"
    elif noise_points(M) > 0:
        yield (f"M = {M} elements per group: their mean is known to 1/sqrt(M) = {1 / math.sqrt(M):.0%} of a standard "
               f"deviation, the standard deviation to about 1/sqrt(2M) = {1 / math.sqrt(2 * M):.0%}, and |xhat| cannot "
               f"exceed sqrt(M-1) = {math.sqrt(M - 1):.1f} [{SOURCES['noise']}]")  # fmt: skip
    if D == 1 and M > 1:
        yield "one channel per group: how strong channels are beside each other is lost"
    elif 1 < D < 4:
        source = SOURCES["channels_per_group"]
        yield f"{D} channels per group: the published error is 24.3 for 8, 24.8 for 4 and 25.6 for 2 [{source}]"


def _order(choice: Choice) -> tuple[float, float]:
    return choice.score, abs(math.log2(choice.num_groups / 32))


def _candidates(channels: int, task: str | None) -> list[int]:
    """1, all, what was published for the task, and the divisors nearest to 32."""
    found = divisors(channels)
    published = set() if task is None else {CONFIGURATIONS[task].groups(channels)} & set(found)
    kept = {1, channels, *published}
    nearest = sorted((d for d in found if d not in kept), key=lambda d: abs(math.log2(d / 32)))
    return sorted(kept | set(nearest[: MAX_CHOICES - len(kept)]))


def _whole(name: str, value: Any, largest: int) -> int:
    try:
        number = None if isinstance(value, bool) else int(operator.index(value))
    except TypeError:
        number = None
    if number is None:
        raise OptionError(f"{name} must be a whole number: got {value!r} ({type(value).__name__}); pass an int")
    if number < 1:
        raise ShapeError(f"{name} must be at least 1: got {number}")
    if number > largest:
        raise ShapeError(f"{name} must be at most {largest}: got {number}; check it")
    return number


def _sizes(spatial: Any) -> tuple[int, ...]:
    if isinstance(spatial, (tuple, list)):
        return tuple(_whole("spatial", size, MAX_ELEMENTS) for size in spatial)
    return (_whole("spatial", spatial, MAX_ELEMENTS),)
