"""The function on tensors: which road a call takes."""

from typing import Any

import torch

from groupnorm.errors import OptionError
from groupnorm.torch import call, composite, ops
from groupnorm.torch.autograd import Differentiable
from groupnorm.torch.checks import check
from groupnorm.torch.road import asks_for_gradient, is_plain, is_transformed

__all__ = ["group_norm"]

Tensor = Any


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor = None, bias: Tensor = None, eps: float = 1e-5, *,
    activation: str | None = None, scale: Tensor = None, shift: Tensor = None, residual: Tensor = None,
    mask: Tensor = None, out: Tensor = None,
) -> Tensor:  # fmt: skip
    """y = act(((x - mean)*rstd*weight + bias)*(1 + scale) + shift + residual), mean and rstd taken over each group.

    x: float16, bfloat16, float32 or float64, of shape (N, C, *spatial), contiguous, channels_last or with other
    strides; y has x's type and lies in memory as that of `torch.nn.functional.group_norm` does. weight, bias: (C,).
    scale, shift: (N, C). residual: x's shape. All of any float type. mask: bool, (N, *spatial), True where a position
    is real; the others stay out of the statistics and give 0. activation: None, "relu", "silu", "gelu", "gelu_tanh",
    "sigmoid", "tanh" or "hardswish". out: a tensor like x that is filled and returned, x itself too, where no gradient
    is asked for.

    Statistics are taken in float32 or wider whatever x's type, under autocast too: x keeps its type. Differentiable to
    any order; backward computes the activation again, so that nothing of x's size but x is kept. Threads:
    `torch.get_num_threads()`. Raises GroupNormError (a ValueError): ShapeError, DtypeError or OptionError. Source: Wu
    and He, Group Normalization, ECCV 2018; equations (1) to (14) of `groupnorm.reference`.
    """
    if torch.compiler.is_compiling() and out is None and x.is_cpu:
        return ops.group_norm(x, num_groups, weight, bias, eps, activation, scale, shift, residual, mask)
    tensors = (x, weight, bias, scale, shift, residual)
    for_engine = is_plain(*tensors, mask, out) and not is_transformed()
    if not for_engine:
        check(x, num_groups, weight, bias, eps, activation, scale, shift, residual, mask, out)
    differentiable = asks_for_gradient(*tensors)
    if out is not None and differentiable:
        raise OptionError("out cannot be given where a gradient is asked for: got tensors that require one; "
                          "call under torch.no_grad(), or without out")  # fmt: skip
    if x.is_meta and not all(tensor is None or tensor.is_meta for tensor in tensors):
        return call.empty_result(
            x
        )  # as PyTorch does: with parameters that have data, a tensor without any shows shapes
    if not for_engine:
        y = composite.group_norm(x, num_groups, weight, bias, eps, activation, scale, shift, residual, mask)
        return y if out is None else out.copy_(y)
    if differentiable:
        return Differentiable.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, scale, shift, residual, mask, num_groups, eps, activation
        )
    return call.forward(x, num_groups, weight, bias, eps, activation, scale, shift, residual, mask, out, False)[0]
