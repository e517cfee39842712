"""Which road a call takes: what decides between the engine, autograd, operators and the composite."""

import sys
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from groupnorm.torch import gpu

__all__ = ["asks_for_gradient", "is_expanded", "is_followed", "is_for_operators", "is_plain"]

Tensor = Any

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_is_functorch_active = torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack
_is_tracing = torch._C._is_tracing


def is_plain(*tensors: Tensor) -> bool:
    """Whether these (or None) are dense tensors of PyTorch's own class, in memory that an engine can read."""
    return all(
        tensor is None
        or (
            tensor.__class__ in _PLAIN
            and (tensor.is_cpu or (tensor.is_cuda and gpu.is_here()))
            and tensor.layout is torch.strided
            and not tensor.is_nested
            and not tensor.is_quantized
        )
        for tensor in tensors
    )


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
    return bool(
        torch.compiler.is_compiling()
        or _is_functorch_active()
        or forward_ad._current_level >= 0
        or _modes() > 0
        or _is_tracing()
    )


def is_for_operators(x: Tensor, *tensors: Tensor) -> bool:
    """Whether who follows is a compiler that shall see one operator: for tensors that an engine will be given. Not for
    those that stand for others (DTensor), nor under transforms of torch.func, which know nothing of the operator.
    """
    if not (torch.compiler.is_compiling() or _is_tracing()) or _is_functorch_active():
        return False
    if not (x.is_cpu or (x.is_cuda and gpu.is_here())):
        return False
    return not any(tensor is not None and is_traceable_wrapper_subclass(tensor) for tensor in (x, *tensors))


def is_expanded(*tensors: Tensor) -> bool:
    """Whether one of these parameters stands for one of each sample (torch.nn.utils' call_for_per_sample_grads)."""
    module = sys.modules.get("torch.nn.utils._expanded_weights.expanded_weights_impl")
    return module is not None and any(isinstance(tensor, module.ExpandedWeight) for tensor in tensors)
