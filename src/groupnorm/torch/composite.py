"""Group Normalization in PyTorch's own operations: differentiable in every mode and to every order, on every device.

For what no engine takes: forward-mode, vmap and the other transforms of torch.func, double backward, tensors that are
no plain ones or on other devices. The equations are those of `groupnorm.reference`; sums are PyTorch's.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["ACTIVATIONS", "by_native", "gradients", "group_norm", "moments", "normalize", "widest"]

Tensor = Any
F = torch.nn.functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
}


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str | None, scale: Tensor,
    shift: Tensor, residual: Tensor, mask: Tensor,
) -> Tensor:  # fmt: skip
    """y, in x's type; computed in float32, or float64 for float64. Equations (1) to (8)."""
    d, _, _, var = _deviations(_wide(x), num_groups, mask)
    xhat = (d * torch.rsqrt(var + eps)).flatten(1, 2)
    return _epilogue(x, xhat, weight, bias, activation, scale, shift, residual, mask)


def gradients(
    dy: Tensor, needs: tuple[bool, ...], x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float,
    activation: str | None, scale: Tensor, shift: Tensor, residual: Tensor, mask: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of x, weight, bias, scale, shift and residual, those that `needs` marks, None for the others; to be
    differentiated where gradients are followed.

    Of views, which nothing else was made from: x may have been made from the residual, or be the same tensor, and what
    goes from one to the other is for the graph that they come from.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        given = (x, weight, bias, scale, shift, residual)
        views = tuple(None if tensor is None else tensor.view_as(tensor) for tensor in given)
        v, w, b, of_scale, of_shift, r = views
        y = group_norm(v, num_groups, w, b, eps, activation, of_scale, of_shift, r, mask)
        wanted: list[Tensor] = [view for view, needed in zip(views, needs, strict=True) if needed]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=again))
    return tuple(next(found) if needed else None for needed in needs)


def by_native(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str | None, scale: Tensor,
    shift: Tensor, residual: Tensor, native: Callable[..., Tensor] = torch.group_norm,
) -> Tensor:  # fmt: skip
    """The same without a mask, and with PyTorch's own group_norm in it: for exporters that know that one, for devices
    that have a kernel for it, and for expanded weights, which know `F.group_norm`.
    """
    others = [tensor for tensor in (weight, bias, scale, shift, residual) if tensor is not None]
    if any(tensor.dtype != x.dtype for tensor in others):
        v = _wide(x)
        weight, bias = (None if tensor is None else tensor.to(v.dtype) for tensor in (weight, bias))
        xhat = native(v, num_groups, weight, bias, eps)
    else:
        xhat = native(x, num_groups, weight, bias, eps)
    return _epilogue(x, xhat, None, None, activation, scale, shift, residual, None)


def moments(x: Tensor, num_groups: int, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and M2 of each group, (N, G) float64. Equations (1) to (3)."""
    _, count, mean, var = _deviations(widest(x), num_groups, mask)
    shape = (x.shape[0], num_groups)
    count, mean, var = (t.flatten(1).expand(shape).contiguous() for t in (count, mean, var))
    return count, mean, var * count


def _deviations(v: Tensor, num_groups: int, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Deviations from the mean, (N, G, D, *spatial), in x's order in memory, and count, mean and variance, of shapes
    that fit them.
    """
    v = _in_groups(v, num_groups)
    axes = tuple(range(2, v.dim()))
    if mask is None:
        count = v.new_full((1, 1, *(1 for _ in axes)), math.prod(v.shape[2:]))
    else:
        m = mask[:, None, None]
        count = (m.sum(axes, keepdim=True) * v.shape[2]).to(v.dtype)
        v = torch.where(m, v, 0.0)
    mean = v.sum(axes, keepdim=True) / count.clamp(min=1)
    d = v - mean if mask is None else torch.where(m, v - mean, 0.0)
    return d, count, mean, (d * d).sum(axes, keepdim=True) / count.clamp(min=1)


def normalize(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, activation: str | None, scale: Tensor,
    shift: Tensor, residual: Tensor,
) -> Tensor:  # fmt: skip
    """The same with given statistics of shape (N, G)."""
    v = _in_groups(_wide(x), mean.shape[1])
    of_group = (*mean.shape, *[1] * (v.dim() - 2))
    m, r = mean.reshape(of_group), rstd.reshape(of_group)
    near = m.to(v.dtype)
    xhat = ((v - near) - (m - near).to(v.dtype)) * r.to(v.dtype)
    xhat = xhat.flatten(1, 2)
    return _epilogue(x, xhat, weight, bias, activation, scale, shift, residual, None)


def _epilogue(
    x: Tensor, xhat: Tensor, weight: Tensor, bias: Tensor, activation: str | None, scale: Tensor, shift: Tensor,
    residual: Tensor, mask: Tensor,
) -> Tensor:  # fmt: skip
    """Equations (6) to (8)."""
    z = xhat
    for_channel = (1, -1) + (1,) * (x.dim() - 2)
    for_sample = (*x.shape[:2], *for_channel[2:])
    if weight is not None:
        z = z * _wide(weight).reshape(for_channel)
    if bias is not None:
        z = z + _wide(bias).reshape(for_channel)
    if scale is not None:
        z = z * (1 + _wide(scale).reshape(for_sample))
    if shift is not None:
        z = z + _wide(shift).reshape(for_sample)
    if residual is not None:
        z = z + _wide(residual.to(x.dtype))
    if activation is not None:
        z = z if mask is None else torch.where(mask.unsqueeze(1), z, 0.0)  # NaN times a gradient of 0 is NaN
        z = ACTIVATIONS[activation](z)
    if mask is not None:
        z = torch.where(mask.unsqueeze(1), z, 0.0)
    return z.to(x.dtype)


def widest(tensor: Tensor) -> Tensor:
    """As float64, or float32 on a device that has no float64."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _in_groups(tensor: Tensor, num_groups: int) -> Tensor:
    """(N, C, *spatial) as (N, G, D, *spatial), a view whatever the strides."""
    return tensor.unflatten(1, (num_groups, tensor.shape[1] // num_groups))
