"""The operators that compilers and modes of dispatch see: `torch.ops.groupnorm.group_norm` and its backward.

Other eager code goes past them (they cost some microseconds); torch.compile and torch.export keep them as they are,
with the strides and types that the fakes declare. A schema may only grow by arguments with defaults: PyTorch keeps
compiled graphs on the disk, and looks at the operator's name alone.
"""

from typing import Any

import torch
from torch._prims_common import suggest_memory_format

from groupnorm.errors import EngineError, ShapeError
from groupnorm.torch import call, composite
from groupnorm.torch.checks import check

__all__ = ["group_norm"]

Tensor = Any

_OPTIONS = ("int num_groups, Tensor? weight, Tensor? bias, float eps, str? activation, Tensor? scale, Tensor? shift, "
            "Tensor? residual, Tensor? mask")  # fmt: skip
_library: Any = torch.library.Library("groupnorm", "DEF")  # type: ignore[no-untyped-call]
# Inductor lays the tensors between convolutions channels last, and would bring them back before an operator that does
# not say that it takes them as they lie: two copies around each norm, more than the norm itself takes.
# (PyTorch 2.4 never does, and has no word for it.)
_TAGS = [getattr(torch.Tag, name) for name in ("flexible_layout", "pt2_compliant_tag") if hasattr(torch.Tag, name)]
_library.define(f"group_norm(Tensor x, {_OPTIONS}) -> (Tensor, Tensor)", tags=_TAGS)
_library.define(
    f"group_norm_backward(Tensor dy, Tensor x, Tensor stats, {_OPTIONS}, bool[6]? needs=None) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str | None, scale: Tensor,
    shift: Tensor, residual: Tensor, mask: Tensor,
) -> Tensor:  # fmt: skip
    """y by way of the operator."""
    return torch.ops.groupnorm.group_norm(
        x, num_groups, weight, bias, eps, activation, scale, shift, residual, mask
    )[0]  # fmt: skip


def _forward(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str | None, scale: Tensor,
    shift: Tensor, residual: Tensor, mask: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, weight, bias, scale, shift, residual, mask = _as_tensors(x, weight, bias, scale, shift, residual, mask)
    kind = call.kind_of(x, num_groups, weight, bias, eps, activation, scale, shift, residual, mask, None)
    if not kind.plain:  # a program that was traced where there is an engine
        count, mean, m2 = composite.moments(x, num_groups, mask)
        stats = torch.stack((mean, torch.rsqrt(m2 / count.clamp(min=1) + eps)))
        y = composite.group_norm(x, num_groups, weight, bias, eps, activation, scale, shift, residual, mask)
        y = y.contiguous(memory_format=suggest_memory_format(x))
        return y, stats.to(torch.promote_types(x.dtype, torch.float32))
    return call.forward(kind, x, weight, bias, scale, shift, residual, mask, None, True)


def _as_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of a subclass, which a traced or exported model may be given, as the tensors that they are."""
    return tuple(t if t is None or t.__class__ is torch.Tensor else t.as_subclass(torch.Tensor) for t in tensors)


def _forward_fake(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str | None, scale: Tensor,
    shift: Tensor, residual: Tensor, mask: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check(x, num_groups, weight, bias, eps, activation, scale, shift, residual, mask, None)
    stats = torch.float64 if x.dtype == torch.float64 else torch.float32
    return call.empty_result(x), x.new_empty((2, x.shape[0], num_groups), dtype=stats)


def _backward(
    dy: Tensor, x: Tensor, stats: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float,
    activation: str | None, scale: Tensor, shift: Tensor, residual: Tensor, mask: Tensor,
    needs: list[bool] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    needs = _all_of(x, weight, bias, scale, shift, residual) if needs is None else needs
    dy, x, weight, bias, scale, shift, residual, mask = _as_tensors(dy, x, weight, bias, scale, shift, residual, mask)
    kind = call.kind_of(x, num_groups, weight, bias, eps, activation, scale, shift, residual, mask, None)
    if dy.shape != x.shape or stats.shape != (2, x.shape[0], kind.num_groups):
        raise ShapeError(f"dy must have x's shape, stats (2, N, G): got {tuple(dy.shape)} and {tuple(stats.shape)}, "
                         f"x is {tuple(x.shape)}, with {kind.num_groups} groups")  # fmt: skip
    if not kind.plain:
        raise EngineError(f"no engine computes gradients of tensors on {x.device} here: got a program that was traced "
                          "for training; call groupnorm.torch.group_norm itself")  # fmt: skip
    found = call.backward(kind, dy, x, weight, bias, scale, shift, residual, mask, stats, tuple(needs))
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in found)


def _backward_fake(
    dy: Tensor, x: Tensor, stats: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float,
    activation: str | None, scale: Tensor, shift: Tensor, residual: Tensor, mask: Tensor,
    needs: list[bool] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    given = (x, weight, bias, scale, shift, residual)
    needs = _all_of(*given) if needs is None else needs
    return tuple(
        x.new_empty(0) if not needed
        else tensor.new_empty(tensor.shape) if 0 < place < 5
        else call.empty_result(x).to(tensor.dtype)
        for place, (tensor, needed) in enumerate(zip(given, needs, strict=True))
    )  # fmt: skip


def _all_of(*given: Tensor) -> list[bool]:
    return [tensor is not None for tensor in given]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, num_groups, weight, bias, eps, activation, scale, shift, residual, mask = inputs
    _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.passed = None
    if residual is not None and activation is None and mask is None:  # its gradient is dy, whatever it is
        ctx.passed, residual = residual.dtype, None
    ctx.save_for_backward(x, weight, bias, scale, shift, residual, mask, stats)
    ctx.options = num_groups, eps, activation


def _differentiate(ctx: Any, dy: Tensor, dstats: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, scale, shift, residual, mask, stats = ctx.saved_tensors
    num_groups, eps, activation = ctx.options
    if dy is None:
        return (None,) * 10
    asked = [ctx.needs_input_grad[place] for place in (0, 2, 3, 6, 7, 8)]
    needs = (*asked[:5], asked[5] and ctx.passed is None)
    found: Any
    if not any(needs):
        found = (None,) * 6
    elif torch.is_grad_enabled():  # create_graph=True: these gradients will be differentiated
        found = composite.gradients(
            dy, needs, x, num_groups, weight, bias, eps, activation, scale, shift, residual, mask
        )
    else:
        found = torch.ops.groupnorm.group_norm_backward(
            dy, x, stats, num_groups, weight, bias, eps, activation, scale, shift, residual, mask, needs
        )
    dx, dweight, dbias, dscale, dshift, dresidual = (
        gradient if needed else None for gradient, needed in zip(found, needs, strict=True)
    )
    if asked[5] and ctx.passed is not None:
        dresidual = dy.to(ctx.passed)
    return dx, None, dweight, dbias, None, None, dscale, dshift, dresidual, None


for _key in ("CPU", "CUDA"):
    _library.impl("group_norm", _forward, _key)
    _library.impl("group_norm_backward", _backward, _key)
torch.library.register_fake("groupnorm::group_norm", _forward_fake, lib=_library)
torch.library.register_fake("groupnorm::group_norm_backward", _backward_fake, lib=_library)
torch.library.register_autograd("groupnorm::group_norm", _differentiate, setup_context=_setup_context, lib=_library)
