"""Which road a call takes: what decides between the engine, autograd, and the composite."""

from typing import Any

import torch
from torch.autograd import forward_ad

__all__ = ["asks_for_gradient", "is_plain", "is_transformed"]

Tensor = Any

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_plain(*tensors: Tensor) -> bool:
    """Whether these (or None) are dense tensors of PyTorch's own class in host memory, which an engine can read."""
    return all(
        tensor is None
        or (
            tensor.__class__ in _PLAIN
            and tensor.is_cpu
            and tensor.layout is torch.strided
            and not tensor.is_nested
            and not tensor.is_quantized
        )
        for tensor in tensors
    )


def asks_for_gradient(*tensors: Tensor) -> bool:
    """Whether autograd follows the operations on these tensors (or None)."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_transformed() -> bool:
    """Whether somebody else follows the operations: the compiler, torch.func's transforms, forward-mode, or a mode of
    dispatch.
    """
    return bool(
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )
