"""A BatchNorm turned into a GroupNorm that starts near it."""

from typing import Any

import torch

from groupnorm._core.group_counts import usual_groups
from groupnorm.torch.module import GroupNorm

__all__ = ["BATCH_NORMS", "replace_batch_norm"]

Module = Any

BATCH_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)


def _double(tensor: Any) -> Any:
    """The tensor in float64, which Apple's GPUs do not have."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def replace_batch_norm(module: Module) -> None:
    """Turn a BatchNorm into a GroupNorm. Its running statistics say what the groups' will be: mean u = mean(u_c) and
    variance s^2 = mean(s_c^2 + (u_c - u)^2) over the channels c of a group. With r_c = 1 / sqrt(s_c^2 + eps), weight' =
    weight * sqrt(s^2 + eps) * r_c and bias' = bias + weight * (u - u_c) * r_c it gives what the BatchNorm gave.
    """
    channels = module.num_features
    # A BatchNorm1d may stand behind a linear layer, where a group has D elements and no more: 32 groups of 64 channels
    # would leave nothing but the sign of a difference. So its groups are chosen for one position.
    groups = usual_groups(channels, 1 if type(module) is torch.nn.BatchNorm1d else None)
    like = module.weight if module.weight is not None else module.running_mean
    kind: dict[str, Any] = {} if like is None else {"device": like.device, "dtype": like.dtype}
    norm: Any = GroupNorm(groups, channels, module.eps, **kind)
    for name in ("weight", "bias"):  # the same parameters, for who holds them
        if module._parameters[name] is not None:
            setattr(norm, name, module._parameters[name])
    with torch.no_grad():
        if module.running_mean is not None:
            mean, var = (_double(t).view(groups, -1) for t in (module.running_mean, module.running_var))
            of_group = mean.mean(1, keepdim=True)
            std = ((var + (mean - of_group) ** 2).mean(1, keepdim=True) + module.eps).sqrt()
            factor = _double(norm.weight) * torch.rsqrt(var + module.eps).view(-1)
            norm.bias += (factor * (of_group - mean).view(-1)).to(norm.bias)
            norm.weight.copy_((factor * std.expand_as(var).reshape(-1)).to(norm.weight))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        del module._buffers[name]
        module._non_persistent_buffers_set.discard(name)
    del module.num_features
    module.__class__ = GroupNorm
    module._parameters.update(norm._parameters)
    options = {name: value for name, value in norm.__dict__.items() if name[0] != "_" and name != "training"}
    module.__dict__.update(options)  # hooks and whatever else somebody gave the module stay
