"""Which road a call takes: what decides between the engine, autograd, operators and the composite."""

import sys
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from groupnorm.torch import gpu

__all__ = ["as_plain", "asks_for_gradient", "is_dense", "is_expanded", "is_followed", "is_for_operators", "is_plain",
           "is_transformed"]  # fmt: skip

Tensor = Any

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_is_functorch_active = torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack
_modes_before_dispatch: Any = torch._ops._len_torch_dispatch_stack_pre_dispatch
_is_tracing = torch._C._is_tracing
# Whether any thread is in a mode; PyTorch 2.4 does not say.
_may_be_in_mode: Any = getattr(_python_dispatch, "is_in_torch_dispatch_mode", lambda: True)


def is_plain(*tensors: Tensor) -> bool:
    """Whether these (or None) are dense tensors of PyTorch's own class, in memory that an engine can read."""
    return is_dense(*tensors) and all(
        tensor is None or tensor.is_cpu or (tensor.is_cuda and gpu.is_here()) for tensor in tensors
    )


def is_dense(*tensors: Tensor) -> bool:
    """Whether these (or None) are dense tensors of PyTorch's own class, on whatever device."""
    return all(
        tensor is None
        or (
            tensor.__class__ in _PLAIN
            and tensor.layout is torch.strided
            and not tensor.is_nested
            and not tensor.is_quantized
        )
        for tensor in tensors
    )


def as_plain(tensor: Tensor) -> Tensor:
    """A tensor of a subclass that adds something to PyTorch's own class (MONAI's MetaTensor), as one of that class: the
    same memory, followed by autograd. Anything else as it is: None, or what computes by a way of its own.
    """
    kind: Any = tensor.__class__
    if kind in _PLAIN or not isinstance(tensor, torch.Tensor):
        return tensor
    computes = kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return tensor if computes else tensor.as_subclass(torch.Tensor)


def asks_for_gradient(*tensors: Tensor) -> bool:
    """Whether autograd follows the operations on these tensors (or None)."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def is_followed() -> bool:
    """Whether somebody else follows the operations, who would not see what an engine does to memory: the compiler,
    torch.jit.trace, torch.func's transforms, forward-mode, or a mode of dispatch.
    """
    return bool(  # what the functions below say, without their calls: every call of group_norm comes through here
        torch.compiler.is_compiling()
        or _is_functorch_active()
        or forward_ad._current_level >= 0
        or _modes() > 0
        or (_may_be_in_mode() and _modes_before_dispatch() > 0)
        or _is_tracing()
    )


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode is active: they know PyTorch's own operations only."""
    return bool(_is_functorch_active() or forward_ad._current_level >= 0)


def _is_in_mode() -> bool:
    """Whether a mode of dispatch sees every operation, be it before autograd (make_fx with pre_dispatch)."""
    return bool(_modes() > 0 or (_may_be_in_mode() and _modes_before_dispatch() > 0))


def is_for_operators(x: Tensor, *tensors: Tensor) -> bool:
    """Whether who follows, a compiler or a mode of dispatch, shall see one operator: for tensors that an engine will be
    given. Not for those that stand for others (DTensor), nor under transforms, which know nothing of the operator.
    """
    compiles = torch.compiler.is_compiling() or _is_tracing()
    if _is_functorch_active() or not (compiles or (_is_in_mode() and not is_transformed())):
        return False
    if not (x.is_cpu or (x.is_cuda and gpu.is_here())):
        return False
    given = [tensor for tensor in (x, *tensors) if tensor is not None]
    if compiles:
        return not any(is_traceable_wrapper_subclass(tensor) for tensor in given)
    fake: Any = sys.modules.get("torch._subclasses.fake_tensor")
    return all(tensor.__class__ in _PLAIN or (fake and isinstance(tensor, fake.FakeTensor)) for tensor in given)


def is_expanded(*tensors: Tensor) -> bool:
    """Whether one of these parameters stands for one of each sample (torch.nn.utils' call_for_per_sample_grads)."""
    module = sys.modules.get("torch.nn.utils._expanded_weights.expanded_weights_impl")
    return module is not None and any(isinstance(tensor, module.ExpandedWeight) for tensor in tensors)
