"""Problem: what is asked of an engine, in one frozen value; and the checks of a call's arguments."""

import math
import operator
from dataclasses import dataclass, field
from typing import Any

from groupnorm._core.group_counts import divisors
from groupnorm._core.layout import Walk
from groupnorm.errors import OptionError, ShapeError

__all__ = ["ACTIVATIONS", "DTYPES", "Problem", "check_activation", "check_eps", "check_num_groups"]

DTYPES = ("float16", "bfloat16", "float32", "float64")
ACTIVATIONS = (None, "relu", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "hardswish")


@dataclass(frozen=True, slots=True)
class Problem:
    """One call, without its data: everything that decides how an engine will do it.

    `task` is what is asked: "forward" (statistics and y), "moments" (statistics alone), "normalize" (y from given
    statistics) or "backward". Sizes are N samples, C channels, S positions, G groups. `walks` holds the Walk of each
    array of x's shape that takes part (x, y, residual, dy, dx, dresidual). `weight`, `bias`, `scale` and `shift` are
    dtype names, or None where the call has no such array. `stats` says whether backward is given mean and rstd, `dx`
    whether it is asked for dx and dresidual.
    """

    task: str
    dtype: str
    N: int
    C: int
    S: int
    G: int
    eps: float = 1e-5
    activation: str | None = None
    weight: str | None = None
    bias: str | None = None
    scale: str | None = None
    shift: str | None = None
    mask: bool = False
    stats: bool = False
    dx: bool = True
    uneven: bool = False
    walks: dict[str, Walk] = field(default_factory=dict, hash=False)

    @property
    def D(self) -> int:
        """Channels per group; the last group may hold more when `uneven`."""
        return self.C // self.G

    @property
    def channels_last(self) -> bool:
        """Whether channels are neighbours in memory; a tensor without extent counts as channels first."""
        return self.walks["x"].s != 1

    @property
    def itemsize(self) -> int:
        """Bytes of one element of x."""
        return {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[self.dtype]


def check_num_groups(num_groups: Any, channels: int, uneven: bool | None) -> int:
    """num_groups as an int; OptionError if it is not a positive whole number, ShapeError if it does not fit the
    channels. uneven: None where the caller has no such option.
    """
    try:
        groups = None if isinstance(num_groups, bool) else int(operator.index(num_groups))
    except TypeError:
        groups = None
    if groups is None:
        got = f"{num_groups!r} ({type(num_groups).__name__})"
        raise OptionError(f"num_groups must be a whole number: got {got}; pass an int")
    if groups < 1:
        raise OptionError(f"num_groups must be at least 1: got {groups}; use 1 for all channels in one group")
    if channels < 1:
        raise ShapeError(f"x must have at least one channel: got {channels}; check the layout")
    if groups > channels:
        raise ShapeError(f"num_groups must not exceed the channels: got {groups} groups, {channels} channels; "
                         f"use at most {channels}")  # fmt: skip
    if channels % groups and not uneven:
        fitting = divisors(channels)
        below, above = max(d for d in fitting if d < groups), min(d for d in fitting if d > groups)
        raise ShapeError(f"num_groups must divide channels: got {groups} groups, {channels} channels; "
                         f"try {below} or {above}{'' if uneven is None else ', or uneven=True'}")  # fmt: skip
    return groups


def check_eps(eps: Any) -> float:
    """eps as a float; OptionError unless it is finite and not negative."""
    try:
        value = float(eps)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise OptionError(f"eps must be a finite number, at least 0: got {eps!r}; 1e-5 is the usual value")
    return value


def check_activation(activation: Any) -> str | None:
    """The activation's name; OptionError if it is not one of ACTIVATIONS."""
    if activation is not None and (not isinstance(activation, str) or activation not in ACTIVATIONS):
        names = ", ".join(str(a) for a in ACTIVATIONS)
        raise OptionError(f"activation must be one of {names}: got {activation!r}; apply others to the result")
    return activation
