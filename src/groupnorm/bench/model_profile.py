"""Where the time of a model goes: the part of it that normalization and activations take."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

__all__ = ["norm_share"]

_OURS = "groupnorm: norm and activation"
_NAMES = {
    _OURS,
    "aten::group_norm", "aten::native_group_norm", "aten::native_group_norm_backward",
    "aten::silu", "aten::silu_", "aten::silu_backward",
    "aten::relu", "aten::relu_", "aten::threshold_backward",
    "aten::prelu", "aten::_prelu_kernel", "aten::_prelu_kernel_backward",
}  # fmt: skip


def norm_share(run: Callable[[], Any]) -> float:
    """The part of one call's time, from 0 to 1, that is spent inside norms and activations, forward and backward, with
    whatever they call, such as copies into another layout. Activations that follow no norm count as well.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    from groupnorm.torch import call

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            with record_function(_OURS):
                return function(*args)

        return wrapper

    # Eager calls of ours go past PyTorch's dispatcher, so that its profiler cannot see them by itself.
    ours = patch.multiple(call, forward=noted(call.forward), backward=noted(call.backward))
    with ours, _quiet(), profile(activities=[ProfilerActivity.CPU]) as found, record_function("all"):
        run()
    events = found.events() or []
    total_us = next(event.cpu_time_total for event in events if event.name == "all")
    return float(sum(event.cpu_time_total for event in events if _is_outermost(event)) / total_us)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what is written to the standard error: the profiler tells there, past Python, that it starts and ends."""
    with open(os.devnull, "w", encoding="ascii") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _is_outermost(event: Any) -> bool:
    if event.name not in _NAMES:
        return False
    parent = event.cpu_parent
    while parent is not None and parent.name not in _NAMES:
        parent = parent.cpu_parent
    return parent is None
