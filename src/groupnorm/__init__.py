"""Group Normalization for NumPy arrays, forward and backward, channels first and last, at the speed of memory.

    import groupnorm as gn
    y = gn.group_norm(x, 32, weight, bias, activation="silu")

Importing this module imports NumPy and nothing else; an engine is loaded when it is first used.
"""

from groupnorm import reference
from groupnorm._core.buffers import empty_cache
from groupnorm._core.moments import Moments, merge_moments
from groupnorm._core.threads import get_num_threads, set_num_threads
from groupnorm._version import __version__
from groupnorm.errors import DtypeError, EngineError, FileError, GroupNormError, OptionError, ShapeError
from groupnorm.numpy import group_norm, group_norm_backward, group_norm_vjp, moments, normalize
from groupnorm.reference import Gradients

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
    "empty_cache",
    "get_num_threads",
    "group_norm",
    "group_norm_backward",
    "group_norm_vjp",
    "merge_moments",
    "moments",
    "normalize",
    "reference",
    "set_num_threads",
]
