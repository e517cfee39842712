"""Per-sample gradients of weight and bias, for Opacus."""

import sys
from typing import Any

import torch

from groupnorm.torch.functional import group_norm

__all__ = ["per_sample_gradients", "register_with_opacus"]

Tensor = Any

_registered: set[type] = set()


def per_sample_gradients(layer: Any, activations: list[Tensor], dy: Tensor) -> dict[Any, Tensor]:
    """The gradients of a `GroupNorm`'s weight and bias for each sample, (N, C), by parameter: what Opacus asks for.

    activations: the module's inputs, of which the first is x. A weight that is the same for all samples is a scale of
    weight - 1 and a shift of bias, whose gradients are the sums of equation (12) of `groupnorm.reference`, taken over s
    alone. Cost: one forward, and one backward that skips dx.
    """
    x, (n, c) = activations[0], activations[0].shape[:2]
    if layer.weight is None:
        return {}
    scale = (layer.weight.detach() - 1).expand(n, c).contiguous().requires_grad_()
    shift = torch.zeros_like(scale) if layer.bias is None else layer.bias.detach().expand(n, c).contiguous()
    shift.requires_grad_()
    with torch.enable_grad():
        y = group_norm(
            x, layer.num_groups, None, None, layer.eps, activation=layer.activation, scale=scale, shift=shift
        )
    found = zip((layer.weight, layer.bias), torch.autograd.grad(y, (scale, shift), dy), strict=True)
    return {parameter: gradient for parameter, gradient in found if parameter is not None and parameter.requires_grad}


def register_with_opacus(layer: type) -> None:
    """Tell Opacus of this class of module, if Opacus is loaded. Untold, it finds the same gradients by running forward
    and backward for each sample, through vmap.
    """
    opacus = sys.modules.get("opacus.grad_sample")
    if opacus is not None and layer not in _registered:
        opacus.register_grad_sampler(layer)(per_sample_gradients)
        _registered.add(layer)
