"""Group Normalization for PyTorch tensors: a function, a module that is a `torch.nn.GroupNorm`, and Moments.

    import groupnorm.torch as gnt
    y = gnt.group_norm(x, 32, weight, bias, activation="silu")

Channels are on axis 1; contiguous and channels_last tensors come back as they went in. `functional.py` is the door;
behind it `call.py` (`gpu.py` for CUDA) hands tensors to an engine, `autograd.py` differentiates, `ops.py` is what
compilers and modes see, and `composite.py` is the same in PyTorch's own operations, for whatever an engine does not
take: transforms, forward-mode, devices without an engine. `module.py` and `convert.py` are for models; `fusion.py`,
`rewrite.py` and `graph.py` find the activations that a norm may take over, `batch_norm.py` turns BatchNorms. `road.py`
says which road a call takes, `checks.py` checks it; `autocast.py`, `per_sample.py` (Opacus) and `moments.py` are what
they say.
"""

from groupnorm.torch.autocast import get_autocast, set_autocast
from groupnorm.torch.convert import Report, convert, revert
from groupnorm.torch.functional import group_norm
from groupnorm.torch.module import GroupNorm
from groupnorm.torch.moments import Moments, merge_moments, moments, normalize

__all__ = [
    "GroupNorm",
    "Moments",
    "Report",
    "convert",
    "get_autocast",
    "group_norm",
    "merge_moments",
    "moments",
    "normalize",
    "revert",
    "set_autocast",
]
