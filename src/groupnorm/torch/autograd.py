"""Differentiation: the engine's backward where a first derivative is asked for, the composite beyond."""

from typing import Any

import torch

from groupnorm.torch import call, composite
from groupnorm.torch.road import is_followed

__all__ = ["Differentiable"]

Tensor = Any


_is_batch = torch._C._functorch.is_legacy_batchedtensor  # many dy at once, from torch.autograd.grad(is_grads_batched)


class Differentiable(torch.autograd.Function):
    """y = group_norm(x, ...). Keeps the inputs, mean and rstd for backward, nothing of x's size beside x: z, of which
    the activation is taken, is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, residual: Tensor, mask: Tensor,
        kind: call.Kind,
    ) -> Tensor:  # fmt: skip
        """y, by an engine."""
        y, stats = call.forward(kind, x, weight, bias, scale, shift, residual, mask, None, True)
        ctx.kind, ctx.passed = kind, None
        if residual is not None and kind.activation is None and mask is None:  # its gradient is dy, whatever it is
            ctx.passed, residual = residual.dtype, None
        ctx.save_for_backward(x, weight, bias, scale, shift, residual, mask, stats)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs that need one."""
        x, weight, bias, scale, shift, residual, mask, stats = ctx.saved_tensors
        kind, needs = ctx.kind, ctx.needs_input_grad[:6]
        if ctx.passed is not None:
            needs = (*needs[:5], False)
        if dy._is_zerotensor():  # zeros without memory, as the slope of a sign gives
            dy = torch.zeros(dy.shape, dtype=dy.dtype, device=dy.device)
        found: Any
        if not any(needs):
            found = (None,) * 6
        # With create_graph=True these gradients will be differentiated.
        elif torch.is_grad_enabled() or is_followed() or dy.__class__ is not torch.Tensor or _is_batch(dy):
            found = composite.gradients(dy, needs, x, kind.num_groups, weight, bias, kind.eps, kind.activation, scale,
                                        shift, residual, mask)  # fmt: skip
        else:
            found = call.backward(kind, dy, x, weight, bias, scale, shift, residual, mask, stats, needs)
        if ctx.passed is not None and ctx.needs_input_grad[5]:
            found = (*found[:5], dy.to(ctx.passed))
        return *found, None, None
