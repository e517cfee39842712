"""The front end for arrays in GPU memory that are no PyTorch tensors: CuPy's, Numba's, those of JAX.

    import groupnorm.cuda as gnc
    y = gnc.group_norm(x, 32, weight, bias, activation="silu")  # a CuPy array of CuPy arrays

Arrays come in without a copy, by DLPack or else `__cuda_array_interface__`, and go through the GPU engine. Results go
back by DLPack to x's library; where that does not read it (Numba) they stay PyTorch tensors, which it takes. PyTorch is
needed, for memory and streams.
"""

import math
from importlib import import_module
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from groupnorm._core.layout import channel_axis
from groupnorm.errors import DtypeError, EngineError, ShapeError
from groupnorm.reference import Gradients
from groupnorm.torch import call, gpu

__all__ = ["group_norm", "group_norm_backward", "group_norm_vjp"]

Array = Any
Tensor = Any


def group_norm(
    x: Array, num_groups: int, weight: Array = None, bias: Array = None, *, eps: float = 1e-5, layout: str = "NCHW",
    activation: str | None = None, scale: Array = None, shift: Array = None, residual: Array = None, mask: Array = None,
    out: Array = None, return_stats: bool = False,
) -> Any:  # fmt: skip
    """`groupnorm.group_norm` of arrays in GPU memory, all on one device; results are arrays of x's library.

    Arguments, results, errors and cost as there; EngineError for arrays in host memory, and without Triton. out has to
    be contiguous. Work is queued on PyTorch's current stream; DLPack orders that of other libraries with it, but not
    what they do to out.
    """
    last, tensors = _tensors(layout, x=x, weight=weight, bias=bias, scale=scale, shift=shift, residual=residual,
                             mask=mask, out=out)  # fmt: skip
    kind = _kind(tensors, num_groups, eps, activation)
    y, stats = call.forward(kind, **tensors, stats=return_stats)
    y = out if out is not None else _given(y, x, last)
    return (y, _given(stats[0], x), _given(stats[1], x)) if return_stats else y


def group_norm_vjp(
    dy: Array, x: Array, num_groups: int, weight: Array = None, bias: Array = None, *, mean: Array = None,
    rstd: Array = None, eps: float = 1e-5, layout: str = "NCHW", activation: str | None = None, scale: Array = None,
    shift: Array = None, residual: Array = None, mask: Array = None,
) -> Gradients:  # fmt: skip
    """`groupnorm.group_norm_vjp` of arrays in GPU memory: every gradient, as an array of x's library.

    mean and rstd: float32 (float64 for float64 x), as `return_stats` gave them. Other arguments, results, errors and
    cost as there, and as in this module's `group_norm`.
    """
    last, tensors = _tensors(layout, x=x, weight=weight, bias=bias, scale=scale, shift=shift, residual=residual,
                             mask=mask, dy=dy, mean=mean, rstd=rstd)  # fmt: skip
    dy, mean, rstd = (tensors.pop(name) for name in ("dy", "mean", "rstd"))
    kind = _kind({**tensors, "out": None}, num_groups, eps, activation)
    if dy is None or dy.shape != tensors["x"].shape:
        raise ShapeError(f"dy must have x's shape: got {None if dy is None else tuple(dy.shape)}")
    if (mean is None) != (rstd is None):
        raise ShapeError("mean and rstd belong together: got one of them; pass both, as return_stats gave them")
    if mean is None:
        stats = call.forward(kind, **tensors, out=None, stats=True)[1]
    else:
        stats = torch.stack((mean, rstd))
        wanted = torch.float64 if tensors["x"].dtype == torch.float64 else torch.float32
        if stats.shape[1:] != (tensors["x"].shape[0], kind.num_groups) or stats.dtype != wanted:
            raise ShapeError(f"mean and rstd must have the shape (N, G) and type {wanted}: got "
                             f"{tuple(stats.shape[1:])}, {stats.dtype}")  # fmt: skip
    needs = tuple(tensor is not None for name, tensor in tensors.items() if name != "mask")
    found = call.backward(kind, dy, **tensors, stats=stats, needs=needs)
    gradients = (None if g is None else _given(g, x, last and g.dim() > 2) for g in found)
    return Gradients(*gradients)


def group_norm_backward(
    dy: Array, x: Array, num_groups: int, weight: Array = None, bias: Array = None, **options: Any
) -> tuple[Array, Array | None, Array | None]:
    """dx, dweight and dbias: the first three entries of `group_norm_vjp`, which says more."""
    return group_norm_vjp(dy, x, num_groups, weight, bias, **options)[:3]


def _tensors(layout: str, **arrays: Array) -> tuple[bool, dict[str, Tensor]]:
    """Whether channels are last, and the arrays as tensors with channels on axis 1, all positions on axis 3 then."""
    tensors = {name: _tensor(name, array) for name, array in arrays.items()}
    x = tensors["x"]
    if x is None:
        raise DtypeError("x must be an array: got None")
    if channel_axis(layout, x.dim()) == 1:
        return False, tensors
    n, *spatial, c = x.shape
    positions = math.prod(spatial)
    for name in ("x", "residual", "dy", "mask", "out"):
        tensor = tensors.get(name)
        wanted = x.shape[:-1] if name == "mask" else x.shape
        if tensor is None:
            continue
        if tensor.shape != wanted:
            raise ShapeError(f"{name} must have the shape {tuple(wanted)}: got {tuple(tensor.shape)}")
        if name == "out" and not tensor.is_contiguous():
            raise ShapeError("out must be contiguous: got an array with gaps, or whose axes are in another order")
        if name == "mask":
            tensors[name] = tensor.reshape(n, 1, positions)
        else:
            tensors[name] = tensor.reshape(n, 1, positions, c).movedim(-1, 1)
    return True, tensors


def _tensor(name: str, array: Array) -> Tensor:
    """The array's memory as a tensor."""
    if array is None or isinstance(array, torch.Tensor):
        found = array
    elif hasattr(array, "__dlpack__"):
        found = from_dlpack(array)
    elif hasattr(array, "__cuda_array_interface__"):
        found = torch.as_tensor(array, device="cuda")
    else:
        raise DtypeError(f"{name} must be an array in GPU memory: got {type(array).__name__}, which has neither "
                         "__dlpack__ nor __cuda_array_interface__")  # fmt: skip
    if found is not None and not gpu.takes(found):
        raise EngineError(f"{name} must lie in GPU memory: got an array on {found.device}; use groupnorm.group_norm")
    return found


def _kind(tensors: dict[str, Tensor], num_groups: int, eps: float, activation: str | None) -> call.Kind:
    x, weight, bias, *others = tensors.values()
    kind = call.kind_of(x, num_groups, weight, bias, eps, activation, *others)
    if not kind.plain:
        raise EngineError("the GPU engine needs Triton; pip install 'groupnorm[gpu]'")
    return kind


def _given(tensor: Tensor, x: Array, last: bool = False) -> Array:
    """A result as an array of x's library; `last`: one of x's shape, whose channels go back to where they were."""
    if last:
        tensor = tensor.movedim(1, -1).reshape(x.shape)
    if isinstance(x, torch.Tensor):
        return tensor
    library = x.__array_namespace__() if hasattr(x, "__array_namespace__") else _library(x)
    return library.from_dlpack(tensor) if hasattr(library, "from_dlpack") else tensor


def _library(array: Array) -> Any:
    return import_module(type(array).__module__.partition(".")[0])
