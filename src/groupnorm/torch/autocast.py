"""What group_norm does under torch.autocast."""

from typing import Any

import torch
from torch.amp.autocast_mode import is_autocast_available

from groupnorm.errors import OptionError

__all__ = ["cast", "get_autocast", "set_autocast"]

Tensor = Any

_POLICIES = ("keep", "float32")
_policy = "keep"


def set_autocast(policy: str) -> None:
    """Choose what `group_norm` does with 16-bit x under torch.autocast, in the whole process.

    "keep", as it is at first: y has x's type, and the statistics are taken in float32 inside. "float32": x is converted
    to float32 first and y is float32, which is PyTorch's own policy on GPUs: twice the memory, and a second pass.
    Raises OptionError for another policy.
    """
    global _policy
    if policy not in _POLICIES:
        raise OptionError(f"the policy must be one of {', '.join(_POLICIES)}: got {policy!r}")
    _policy = policy


def get_autocast() -> str:
    """The policy in force."""
    return _policy


def cast(x: Tensor) -> Tensor:
    """x as the policy wants it."""
    sixteen = _policy == "float32" and getattr(x, "dtype", None) in (torch.float16, torch.bfloat16)
    kind = x.device.type if sixteen else ""
    return x.float() if sixteen and is_autocast_available(kind) and torch.is_autocast_enabled(kind) else x
