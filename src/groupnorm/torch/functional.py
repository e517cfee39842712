"""The function on tensors: which road a call takes."""

from typing import Any

import torch
from torch._prims_common import suggest_memory_format
from torch.overrides import handle_torch_function, has_torch_function

from groupnorm._core.problem import check_activation
from groupnorm.errors import OptionError
from groupnorm.torch import call, composite, ops
from groupnorm.torch.autocast import cast
from groupnorm.torch.autograd import Differentiable
from groupnorm.torch.checks import check
from groupnorm.torch.road import (
    as_plain,
    asks_for_gradient,
    is_dense,
    is_expanded,
    is_followed,
    is_for_operators,
    is_transformed,
)

__all__ = ["group_norm"]

Tensor = Any

# Without the look for transforms of torch.func that `Function.apply` begins with, 3 us of 12: they are not active here.
_differentiable: Any = super(torch.autograd.Function, Differentiable).apply


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor = None, bias: Tensor = None, eps: float = 1e-5, *,
    activation: str | None = None, scale: Tensor = None, shift: Tensor = None, residual: Tensor = None,
    mask: Tensor = None, out: Tensor = None,
) -> Tensor:  # fmt: skip
    """y = act(((x - mean)*rstd*weight + bias)*(1 + scale) + shift + residual), mean and rstd taken over each group.

    x: float16, bfloat16, float32 or float64, of shape (N, C, *spatial), contiguous, channels_last or with other
    strides; y has x's type and lies in memory as that of `torch.nn.functional.group_norm` does. weight, bias: (C,).
    scale, shift: (N, C). residual: x's shape, converted to x's type. All of any float type. mask: bool, (N, *spatial),
    True where a position is real; the others stay out of the statistics and give 0. activation: None, "relu", "silu",
    "gelu", "gelu_tanh", "sigmoid", "tanh" or "hardswish". out: a tensor like x that is filled and returned, x itself
    too, where no gradient is asked for.

    Statistics are taken in float32 or wider whatever x's type, under autocast too: x keeps its type unless
    `set_autocast` says otherwise. Differentiable to any order; backward computes the activation again, so that nothing
    of x's size is kept but x and, with an activation or a mask, the residual. Threads: `torch.get_num_threads()`.
    Raises GroupNormError, a ValueError: ShapeError, DtypeError or OptionError. Source: Wu and He, Group Normalization,
    ECCV 2018; equations (1) to (14) of `groupnorm.reference`.
    """
    if has_torch_function((x, weight, bias, scale, shift, residual, mask, out)):
        if is_expanded(weight, bias) and mask is None and out is None:
            check_activation(activation)  # the rest is PyTorch's to check, which knows what to do with these
            native = torch.nn.functional.group_norm
            return composite.by_native(x, num_groups, weight, bias, eps, activation, scale, shift, residual, native)
        return handle_torch_function(
            group_norm, (x, weight, bias, scale, shift, residual, mask, out), x, num_groups, weight, bias, eps,
            activation=activation, scale=scale, shift=shift, residual=residual, mask=mask, out=out,
        )  # fmt: skip
    x = cast(x)
    if is_followed():
        return _followed(x, num_groups, weight, bias, eps, activation, scale, shift, residual, mask, out)
    kind = call.kind_of(x, num_groups, weight, bias, eps, activation, scale, shift, residual, mask, out)
    if not kind.plain:
        given = (x, weight, bias, scale, shift, residual, mask, out)
        plain = tuple(map(as_plain, given))
        if any(now is not before for now, before in zip(plain, given, strict=True)):
            x, weight, bias, scale, shift, residual, mask, into = plain
            y = group_norm(x, kind.num_groups, weight, bias, kind.eps, activation=activation, scale=scale, shift=shift,
                           residual=residual, mask=mask, out=into)  # fmt: skip
            return y if out is None else out
    if asks_for_gradient(x, weight, bias, scale, shift, residual, out):
        _refuse_out(out)
        if kind.plain:
            return _differentiable(x, weight, bias, scale, shift, residual, mask, kind)
    if kind.plain:
        return call.forward(kind, x, weight, bias, scale, shift, residual, mask, out, False)[0]
    return _composed(x, kind.num_groups, weight, bias, eps, activation, scale, shift, residual, mask, out)


def _followed(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str | None, scale: Tensor,
    shift: Tensor, residual: Tensor, mask: Tensor, out: Tensor,
) -> Tensor:  # fmt: skip
    """y in operations that whoever follows can see: one operator for compilers, the composite for the others."""
    exporting = torch.onnx.is_in_onnx_export()
    compiles = torch.compiler.is_compiling() or torch._C._is_tracing()
    if not compiles:  # where the operator does it
        check(x, num_groups, weight, bias, eps, activation, scale, shift, residual, mask, out)
    tensors = (x, weight, bias, scale, shift, residual, mask)
    if out is None and not exporting and is_for_operators(*tensors):
        return ops.group_norm(x, num_groups, weight, bias, eps, activation, scale, shift, residual, mask)
    if compiles:
        check(x, num_groups, weight, bias, eps, activation, scale, shift, residual, mask, out)
    if out is not None and asks_for_gradient(x, weight, bias, scale, shift, residual, out):
        _refuse_out(out)
    if exporting and mask is None and out is None:  # ONNX has this operator, too
        return composite.by_native(x, num_groups, weight, bias, eps, activation, scale, shift, residual)
    return _composed(x, num_groups, weight, bias, eps, activation, scale, shift, residual, mask, out)


def _composed(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str | None, scale: Tensor,
    shift: Tensor, residual: Tensor, mask: Tensor, out: Tensor,
) -> Tensor:  # fmt: skip
    """y in PyTorch's own operations."""
    if x.is_meta and any(t is not None and not t.is_meta for t in (weight, bias, scale, shift, residual, mask)):
        return call.empty_result(x)  # as PyTorch does: shapes are shown with parameters that have data, too
    if mask is None and not x.is_cpu and is_dense(x) and not is_transformed():  # its kernels are for these
        y = composite.by_native(x, num_groups, weight, bias, eps, activation, scale, shift, residual)
    else:
        y = composite.group_norm(x, num_groups, weight, bias, eps, activation, scale, shift, residual, mask)
    if out is not None:
        return out.copy_(y)
    if is_transformed() or torch.onnx.is_in_onnx_export():  # whose older form knows no channels_last_3d
        return y
    return y.contiguous(memory_format=suggest_memory_format(x))


def _refuse_out(out: Tensor) -> None:
    if out is not None:
        raise OptionError("out cannot be given where a gradient is asked for: got tensors that require one; "
                          "call under torch.no_grad(), or without out")  # fmt: skip
