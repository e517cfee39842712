"""Group Normalization for NumPy arrays, forward and backward, channels first and last.

    import groupnorm as gn
    y = gn.group_norm(x, 32, weight, bias, activation="silu")

Importing this module imports NumPy and nothing else; an engine is loaded when it is first used.
"""

from typing import TYPE_CHECKING, Any

from groupnorm import reference
from groupnorm._core.buffers import empty_cache
from groupnorm._core.moments import Moments, merge_moments
from groupnorm._core.threads import get_num_threads, set_num_threads
from groupnorm._version import __version__
from groupnorm.errors import DtypeError, EngineError, FileError, GroupNormError, OptionError, ShapeError
from groupnorm.numpy import group_norm, group_norm_backward, group_norm_vjp, moments, normalize
from groupnorm.reference import Gradients

if TYPE_CHECKING:
    from groupnorm.analysis.advisor import advise
    from groupnorm.analysis.roofline import roofline

__all__ = [
    "DtypeError",
    "EngineError",
    "FileError",
    "Gradients",
    "GroupNormError",
    "Moments",
    "OptionError",
    "ShapeError",
    "__version__",
    "advise",
    "empty_cache",
    "get_num_threads",
    "group_norm",
    "group_norm_backward",
    "group_norm_vjp",
    "merge_moments",
    "moments",
    "normalize",
    "reference",
    "roofline",
    "set_num_threads",
]

_ON_FIRST_USE = {"advise": "groupnorm.analysis.advisor", "roofline": "groupnorm.analysis.roofline"}


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    globals()[name] = found = getattr(import_module(_ON_FIRST_USE[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_FIRST_USE})
