"""The checks of a call on tensors, by their shapes and types alone: they work for tensors without data, too."""

from typing import Any

import torch

from groupnorm._core.problem import check_activation, check_eps, check_num_groups
from groupnorm.errors import DtypeError, ShapeError

__all__ = ["FLOATS", "check", "clash"]

Tensor = Any

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check(
    x: Tensor, num_groups: Any, weight: Tensor, bias: Tensor, eps: Any, activation: Any, scale: Tensor, shift: Tensor,
    residual: Tensor, mask: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Raise ShapeError, DtypeError or OptionError if the arguments do not fit together."""
    _check_dense("x", x)
    if x.dim() < 2:
        raise ShapeError(f"x must have a batch and a channel axis: got {x.dim()} axes; add axes of length 1, "
                         "e.g. x[None]")  # fmt: skip
    n, c = x.shape[:2]
    check_num_groups(num_groups, c, None)
    check_eps(eps)
    check_activation(activation)
    wanted = {"weight": ((c,), "(C,)"), "bias": ((c,), "(C,)"), "scale": ((n, c), "(N, C)"),
              "shift": ((n, c), "(N, C)"), "residual": (tuple(x.shape), "x's shape"), "out": (tuple(x.shape),
              "x's shape")}  # fmt: skip
    given = {"weight": weight, "bias": bias, "scale": scale, "shift": shift, "residual": residual, "out": out}
    for name, tensor in given.items():
        if tensor is not None:
            _check_dense(name, tensor)
            _check_shape(name, tensor, *wanted[name])
            _check_device(name, tensor, x)
    if out is not None and out.dtype != x.dtype:
        raise DtypeError(f"out must have x's type: got {out.dtype}, x is {x.dtype}")
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise DtypeError(f"mask must be a tensor of bool: got {got}; True marks a real position")
        _check_shape("mask", mask, (n, *x.shape[2:]), "(N, *spatial)")
        _check_device("mask", mask, x)


def clash(out: Tensor, x: Tensor, *others: Tensor) -> bool:
    """Whether `out` may share memory with an input in any other way than being the very same elements. By addresses:
    what comes by DLPack has a storage of its own, wherever it lies.
    """
    begin, end = _span(out)
    for tensor in (x, *others):
        if tensor is not None and tensor is not out:
            first, last = _span(tensor)
            same = first == begin and tensor.stride() == out.stride() and tensor.dtype == out.dtype
            if first < end and begin < last and not (same and tensor.shape == out.shape):
                return True
    return False


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses between which a tensor lies."""
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def _check_dense(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise DtypeError(
            f"{name} must be a tensor: got {type(tensor).__name__}; use groupnorm.group_norm for NumPy arrays"
        )
    if tensor.is_nested:
        raise DtypeError(f"{name} must be a dense tensor: got a nested one; pad it with "
                         "torch.nested.to_padded_tensor and pass a mask")  # fmt: skip
    if tensor.is_quantized:
        raise DtypeError(f"{name} must be of a float type: got a quantized tensor; use {name}.dequantize()")
    if tensor.layout is not torch.strided:
        raise DtypeError(f"{name} must be a dense tensor: got {tensor.layout}; use {name}.to_dense()")
    if tensor.dtype not in FLOATS:
        raise DtypeError(f"{name} must be of type float16, bfloat16, float32 or float64: got {tensor.dtype}; "
                         f"convert it, e.g. with {name}.float()")  # fmt: skip


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ShapeError(f"{name} must have the shape {meaning} = {shape}: got {tuple(tensor.shape)}")


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device and "meta" not in (tensor.device.type, x.device.type):
        raise DtypeError(f"{name} must be on x's device: got {tensor.device}, x is on {x.device}")
