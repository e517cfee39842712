"""Differentiation: the engine's backward where a first derivative is asked for, the composite beyond."""

from typing import Any

import torch

from groupnorm.torch import call, composite

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
        ctx.save_for_backward(x, weight, bias, scale, shift, residual, mask, stats)
        ctx.kind = kind
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs that need one."""
        x, weight, bias, scale, shift, residual, mask, stats = ctx.saved_tensors
        kind, needs = ctx.kind, ctx.needs_input_grad[:6]
        if torch.is_grad_enabled() or _is_batch(dy):  # create_graph=True: these gradients will be differentiated
            found = composite.gradients(dy, needs, x, kind.num_groups, weight, bias, kind.eps, kind.activation, scale,
                                        shift, residual, mask)  # fmt: skip
            return *found, None, None
        return *call.backward(kind, dy, x, weight, bias, scale, shift, residual, mask, stats, needs), None, None
