"""Per-sample gradients of weight and bias, for Opacus."""

import sys
from typing import Any

import torch

from groupnorm.torch import call, composite
from groupnorm.torch.autocast import cast
from groupnorm.torch.moments import moments
from groupnorm.torch.road import is_followed, is_plain

__all__ = ["per_sample_gradients", "register_with_opacus"]

Tensor = Any

_NEEDS = (False, False, False, True, True, False)  # gradients of scale and shift, not of x, weight, bias or residual
_registered: set[type] = set()


def per_sample_gradients(layer: Any, activations: list[Tensor], dy: Tensor) -> dict[Any, Tensor]:
    """The gradients of a `GroupNorm`'s weight and bias for each sample, (N, C), by parameter: what Opacus asks for.

    activations: the module's inputs, of which the first is x. A weight that is the same for all samples is a scale of
    weight - 1 and a shift of bias, whose gradients are the sums of equation (12) of `groupnorm.reference`, taken over s
    alone. Cost: x is read twice, dy once; nothing of their size is written.
    """
    if layer.weight is None:
        return {}
    x, (n, c) = cast(activations[0].detach()), activations[0].shape[:2]
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)  # in 16 bits 1 + (weight - 1) is not weight
    scale = (layer.weight.detach().to(dtype) - 1).expand(n, c).contiguous()
    shift = torch.zeros_like(scale) if layer.bias is None else layer.bias.detach().to(dtype).expand(n, c).contiguous()
    groups, eps, activation = layer.num_groups, layer.eps, layer.activation
    if is_plain(x, dy, scale, shift) and not is_followed():
        kind = call.kind_of(x, groups, None, None, eps, activation, scale, shift, None, None, None)
        found = moments(x, groups)
        stats = torch.stack((found.mean, found.rstd(eps))).to(torch.promote_types(x.dtype, torch.float32))
        gradients: Any = call.backward(kind, dy, x, None, None, scale, shift, None, None, stats, _NEEDS)
    else:
        scale, shift = scale.requires_grad_(), shift.requires_grad_()
        gradients = composite.gradients(dy, _NEEDS, x, groups, None, None, eps, activation, scale, shift, None, None)
    pairs = zip((layer.weight, layer.bias), gradients[3:5], strict=True)
    return {
        parameter: gradient.to(parameter.dtype)
        for parameter, gradient in pairs
        if parameter is not None and parameter.requires_grad
    }


def register_with_opacus(layer: type) -> None:
    """Tell Opacus of this class of module, if Opacus is loaded. Untold, it finds the same gradients by running forward
    and backward for each sample, through vmap.
    """
    opacus = sys.modules.get("opacus.grad_sample")
    if opacus is not None and layer not in _registered:
        opacus.register_grad_sampler(layer)(per_sample_gradients)
        _registered.add(layer)
