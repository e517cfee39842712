"""Differentiation: the engine's backward where a first derivative is asked for, the composite beyond."""

from typing import Any

import torch

from groupnorm.torch import call, composite

__all__ = ["Differentiable"]

Tensor = Any


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
        ctx.save_for_backward(x, weight, bias, scale, shift, residual, mask, stats)
        ctx.options = kind.num_groups, kind.eps, kind.activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs that need one."""
        x, weight, bias, scale, shift, residual, mask, stats = ctx.saved_tensors
        num_groups, eps, activation = ctx.options
        needs = ctx.needs_input_grad[:6]
        if torch.is_grad_enabled():  # create_graph=True: these gradients will be differentiated
            inputs = (x, weight, bias, scale, shift, residual)
            y = composite.group_norm(x, num_groups, weight, bias, eps, activation, scale, shift, residual, mask)
            wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need]
            found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            gradients = tuple(next(found) if need else None for need in needs)
        else:
            gradients = call.backward(dy, x, num_groups, weight, bias, stats, eps, activation, scale, shift, residual,
                                      mask, needs)  # fmt: skip
        return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None)
