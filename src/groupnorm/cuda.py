"""The front end for arrays in GPU memory that are no PyTorch tensors: CuPy's, Numba's, those of JAX.

    import groupnorm.cuda as gnc
    y = gnc.group_norm(x, 32, weight, bias, activation="silu")  # a CuPy array of CuPy arrays

Arrays come in without a copy, by DLPack or else `__cuda_array_interface__`, and go through the GPU engine. Results go
back by DLPack to x's library; where that does not read it (Numba) they stay PyTorch tensors, which it takes. PyTorch is
needed, for memory and streams.
"""

import math
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from groupnorm._core.layout import channel_axis
from groupnorm.errors import DtypeError, EngineError, ShapeError
from groupnorm.reference import Gradients
from groupnorm.torch import call, gpu
from groupnorm.torch.checks import FLOATS

__all__ = ["group_norm", "group_norm_backward", "group_norm_vjp"]

Array = Any
Tensor = Any

_HOST = 1  # DLPack's number of host memory


def group_norm(
    x: Array, num_groups: int, weight: Array = None, bias: Array = None, *, eps: float = 1e-5, layout: str = "NCHW",
    activation: str | None = None, scale: Array = None, shift: Array = None, residual: Array = None, mask: Array = None,
    out: Array = None, return_stats: bool = False,
) -> Any:  # fmt: skip
    """`groupnorm.group_norm` of arrays in GPU memory, all on one device; results are arrays of x's library.

    Arguments, results, errors and cost as there; EngineError for arrays in host memory, and without Triton. Channels
    last, out has to be contiguous. Strides must not be negative. Work is queued on PyTorch's current stream, behind
    what the arrays' libraries have queued, as DLPack arranges it. A library that uses another stream has to wait for
    that one before it changes an argument, and before it reads out.
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
    if dy is None:
        raise DtypeError("dy must be an array of x's shape: got None; pass the gradient of y")
    _check("dy", dy, tensors["x"].shape, tensors["x"], FLOATS)
    stats = _statistics(mean, rstd, kind, tensors["x"], tensors["mask"])
    needs = tuple(tensor is not None for name, tensor in tensors.items() if name != "mask")
    found = call.backward(kind, dy, **tensors, stats=stats, needs=needs)
    gradients = (None if g is None else _given(g, x, last and g.dim() > 2) for g in found)
    return Gradients(*gradients)


def group_norm_backward(
    dy: Array, x: Array, num_groups: int, weight: Array = None, bias: Array = None, **options: Any
) -> tuple[Array, Array | None, Array | None]:
    """dx, dweight and dbias: the first three entries of `group_norm_vjp`, which says more."""
    return group_norm_vjp(dy, x, num_groups, weight, bias, **options)[:3]


def _statistics(mean: Tensor, rstd: Tensor, kind: call.Kind, x: Tensor, mask: Tensor) -> Tensor:
    """mean and rstd as one tensor (2, N, G); computed where they were not given."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if (mean is None) != (rstd is None):
        raise ShapeError("mean and rstd belong together: got one of them; pass both, as return_stats gave them")
    if mean is None:
        count, mean, m2 = call.moments(x, kind.num_groups, mask).unbind(2)
        return torch.stack((mean, (m2 / count.clamp(min=1) + kind.eps).rsqrt())).to(dtype)
    for name, tensor in (("mean", mean), ("rstd", rstd)):
        _check(name, tensor, (x.shape[0], kind.num_groups), x, (dtype,))
    return torch.stack((mean, rstd))


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor, dtypes: tuple[Any, ...]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ShapeError(f"{name} must have the shape {tuple(shape)}: got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes or tensor.device != x.device:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise DtypeError(f"{name} must be of type {kinds}, on {x.device}: got {tensor.dtype}, {tensor.device}")


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
    elif not hasattr(array, "__dlpack__") and not hasattr(array, "__cuda_array_interface__"):
        raise DtypeError(f"{name} must be an array in GPU memory: got {type(array).__name__}, which has neither "
                         "__dlpack__ nor __cuda_array_interface__")  # fmt: skip
    elif any(step < 0 for step in getattr(array, "strides", None) or ()):  # of which from_dlpack ends the process
        raise ShapeError(f"{name} must have no negative strides: got {array.strides}; pass a copy")
    elif not hasattr(array, "__dlpack__"):
        found = torch.as_tensor(array)
        _wait_for(array, found)
    elif array.__dlpack_device__()[0] == _HOST and not gpu.takes(torch.empty(0)):
        raise EngineError(f"{name} must lie in GPU memory: got a {type(array).__name__} in host memory; use "
                          "groupnorm.group_norm")  # fmt: skip
    else:
        found = from_dlpack(array)
    if found is not None and not gpu.takes(found):
        raise EngineError(f"{name} must lie in GPU memory: got a tensor on {found.device}; use groupnorm.torch")
    return found


def _wait_for(array: Array, found: Tensor) -> None:
    """Let the current stream wait for what the array's library has queued on its own; DLPack does that by itself."""
    stream = array.__cuda_array_interface__.get("stream")
    if stream and found.is_cuda:
        theirs: Any = torch.cuda.ExternalStream(stream, device=found.device)  # type: ignore[no-untyped-call]
        torch.cuda.current_stream(found.device).wait_stream(theirs)


def _kind(tensors: dict[str, Tensor], num_groups: int, eps: float, activation: str | None) -> call.Kind:
    x, weight, bias, *others = tensors.values()
    kind = call.kind_of(x, num_groups, weight, bias, eps, activation, *others)
    if not kind.plain:
        raise EngineError("the GPU engine needs Triton; pip install 'triton>=3.6'")
    return kind


def _given(tensor: Tensor, x: Array, last: bool = False) -> Array:
    """A result as an array of x's library; `last`: one of x's shape, whose channels go back to where they were."""
    if last:
        tensor = tensor.movedim(1, -1).reshape(x.shape)
    if isinstance(x, torch.Tensor):
        return tensor
    if hasattr(x, "__array_namespace__"):
        library = x.__array_namespace__()
    else:
        library = import_module(type(x).__module__.partition(".")[0])
    if not hasattr(library, "from_dlpack"):
        return tensor
    with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
        return library.from_dlpack(tensor)
