"""Tensors to the engine and back, without copies: an engine sees NumPy arrays that lie on the tensors' memory.

As in the NumPy front end, a call is recognised by everything about it but its data, and what was worked out for it once
(checks, engine, plan) is kept.
"""

import itertools
import operator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from torch._prims_common import suggest_memory_format

from groupnorm._core import buffers
from groupnorm._core.arguments import Call, Options, prepare
from groupnorm._dispatch import choose
from groupnorm.torch.checks import check

__all__ = ["Gradients", "backward", "empty_result", "forward", "moments", "normalize"]

Tensor = Any

_CALLS_KEPT = 4096  # a program with more kinds of call than this starts over
_LARGE = 1 << 20  # bytes from which an output lies in recycled memory: see `_core/buffers.py`
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_STATS = {torch.float64: torch.float64}  # the type of mean and rstd where it is not float32
_calls: dict[Any, "_Known"] = {}


class _Known(NamedTuple):
    """What is kept of a kind of call."""

    engine: Any
    plan: Any
    call: Call
    strides: tuple[int, ...]  # of a result of x's shape
    pack: Any  # the memory format that x is brought into first, None if it is walked as it lies
    plain: bool  # the arrays of the call are taken as they are; else they are converted each time


class Gradients(NamedTuple):
    """What `backward` gives; None where the call has no such tensor, or nobody needs its gradient."""

    dx: Tensor
    dweight: Tensor
    dbias: Tensor
    dscale: Tensor
    dshift: Tensor
    dresidual: Tensor


def forward(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str | None, scale: Tensor,
    shift: Tensor, residual: Tensor, mask: Tensor, out: Tensor, stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, and mean and rstd of shape (N, G) if `stats`, of CPU tensors, without autograd. y lies in memory as PyTorch's
    own group_norm would lay it; it is `out` where that is given.
    """
    tensors = {"x": x, "weight": weight, "bias": bias, "scale": scale, "shift": shift, "residual": residual,
               "mask": mask, "out": out}  # fmt: skip
    key = ("forward", num_groups, num_groups.__class__, eps, activation, torch.get_num_threads(), _form(x),
           _form(weight), _form(bias), _form(scale), _form(shift), _form(residual), _form(mask),
           _form(out))  # fmt: skip
    options = Options("forward", num_groups, eps, "NCHW", activation, False)
    known = _recall(key)
    if known is None:
        check(x, num_groups, weight, bias, eps, activation, scale, shift, residual, mask, out)
        known = _learn(key, options, tensors)
    arrays = _arrays(known, options, tensors)
    if out is None:
        y, result = _empty(x, known.strides)
        target = result
    else:
        y, result = out, arrays["out"]
        target = known.call.target(result, arrays["x"], arrays["residual"])
    shape, dtype = (known.call.problem.N, known.call.problem.G), _STATS.get(x.dtype, torch.float32)
    mean, rstd = (torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)) if stats else (None, None)
    known.engine.forward(
        known.plan, arrays["x"], target, arrays["weight"], arrays["bias"], arrays["scale"], arrays["shift"],
        arrays["residual"], arrays["mask"], _view(mean), _view(rstd), None,
    )  # fmt: skip
    if target is not result:
        np.copyto(result, target)
    return y, mean, rstd


def backward(
    dy: Tensor, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, eps: float,
    activation: str | None, scale: Tensor, shift: Tensor, residual: Tensor, mask: Tensor, needs: tuple[bool, ...],
) -> Gradients:  # fmt: skip
    """The gradients of x, weight, bias, scale, shift and residual, those that `needs` marks, in their types."""
    tensors = {"x": x, "weight": weight, "bias": bias, "scale": scale, "shift": shift, "residual": residual,
               "mask": mask, "dy": dy, "mean": mean, "rstd": rstd}  # fmt: skip
    key = ("backward", num_groups, eps, activation, torch.get_num_threads(), _form(dy), _form(x), _form(weight),
           _form(bias), _form(scale), _form(shift), _form(residual), _form(mask))  # fmt: skip
    options = Options("backward", num_groups, eps, "NCHW", activation, False)
    known = _recall(key) or _learn(key, options, tensors)
    arrays = _arrays(known, options, tensors)
    _, needs_weight, needs_bias, needs_scale, needs_shift, _ = needs
    dx, dx_array = _empty(x, known.strides)
    dresidual, dresidual_array = (None, None) if residual is None else _empty(x, known.strides)
    dweight, dbias = _empty_like(weight, needs_weight), _empty_like(bias, needs_bias)
    dscale, dshift = _empty_like(scale, needs_scale), _empty_like(shift, needs_shift)
    known.engine.backward(
        known.plan, arrays["dy"], arrays["x"], dx_array, arrays["weight"], arrays["bias"], arrays["scale"],
        arrays["shift"], arrays["residual"], arrays["mask"], arrays["mean"], arrays["rstd"], _view(dweight),
        _view(dbias), _view(dscale), _view(dshift), dresidual_array,
    )  # fmt: skip
    if dresidual is not None and residual.dtype != x.dtype:
        dresidual = dresidual.to(residual.dtype)
    return Gradients(dx, dweight, dbias, dscale, dshift, dresidual)


def empty_result(x: Tensor) -> Tensor:
    """An uninitialised tensor that lies in memory as the result of PyTorch's own group_norm does."""
    return torch.empty_like(x, memory_format=suggest_memory_format(x))


def moments(x: Tensor, num_groups: int, mask: Tensor) -> Tensor:
    """Count, mean and M2 of each group, as one float64 tensor (N, G, 3)."""
    tensors = {"x": x, "mask": mask}
    key = ("moments", num_groups, torch.get_num_threads(), _form(x), _form(mask))
    options = Options("moments", num_groups, 0.0, "NCHW", None, False)
    known = _recall(key) or _learn(key, options, tensors)
    arrays = _arrays(known, options, tensors)
    found = torch.empty((x.shape[0], num_groups, 3), dtype=torch.float64)
    known.engine.forward(known.plan, arrays["x"], None, None, None, None, None, None, arrays["mask"], None, None,
                         found.numpy())  # fmt: skip
    return found


def normalize(
    x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str | None, scale: Tensor,
    shift: Tensor, residual: Tensor,
) -> Tensor:  # fmt: skip
    """y from given moments, a float64 tensor (N, G, 3)."""
    tensors = {"x": x, "weight": weight, "bias": bias, "scale": scale, "shift": shift, "residual": residual}
    groups = statistics.shape[1]
    key = ("normalize", groups, eps, activation, torch.get_num_threads(), _form(x), _form(weight), _form(bias),
           _form(scale), _form(shift), _form(residual))  # fmt: skip
    options = Options("normalize", groups, eps, "NCHW", activation, False)
    known = _recall(key) or _learn(key, options, tensors)
    arrays = _arrays(known, options, tensors)
    y, result = _empty(x, known.strides)
    known.engine.forward(
        known.plan, arrays["x"], result, arrays["weight"], arrays["bias"], arrays["scale"], arrays["shift"],
        arrays["residual"], None, None, None, statistics.detach().contiguous().numpy(),
    )  # fmt: skip
    return y


def _form(tensor: Tensor) -> Any:
    """Everything about a tensor but its data."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


def _recall(key: Any) -> _Known | None:
    try:
        return _calls.get(key)
    except TypeError:  # an option that cannot be hashed; the checks will name it
        return None


def _learn(key: Any, options: Options, tensors: dict[str, Tensor]) -> _Known:
    """Choose the engine and the plan of a new kind of call."""
    x = tensors["x"]
    strides = empty_result(x.to("meta")).stride()
    arrays = {name: _view(tensor) for name, tensor in tensors.items()}
    call, given = prepare(options, arrays)
    pack = None
    if not _lies_so(call, strides):
        pack = suggest_memory_format(x)
        arrays["x"] = _view(x.contiguous(memory_format=pack))
        call, given = prepare(options, arrays)
    plain = all(given[name] is arrays[name] for name in given)
    known = _Known(*choose(call.problem, None, torch.get_num_threads()), call, strides, pack, plain)
    if len(_calls) >= _CALLS_KEPT:
        _calls.clear()
    _calls[key] = known
    return known


def _lies_so(call: Call, strides: tuple[int, ...]) -> bool:
    """Whether the engine's own results lie in memory with these strides."""
    steps = list(itertools.accumulate(reversed(call.stored_shape[1:]), operator.mul, initial=1))[::-1]
    axes = call.axes or range(len(steps))
    return all(
        call.stored_shape[axis] == 1 or steps[axis] == stride for axis, stride in zip(axes, strides, strict=True)
    )


def _arrays(known: _Known, options: Options, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The tensors of a known kind of call as its engine takes them."""
    arrays = {name: _view(tensor) for name, tensor in tensors.items()}
    if known.pack is not None:
        arrays["x"] = _view(tensors["x"].contiguous(memory_format=known.pack))
    return arrays if known.plain else arrays | prepare(options, arrays)[1]


def _view(tensor: Tensor) -> Any:
    """A NumPy array on the tensor's memory."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_BFLOAT16)
    return tensor.numpy()


def _empty(x: Tensor, strides: tuple[int, ...]) -> tuple[Tensor, Any]:
    """A result of x's shape and type, and the NumPy array on it."""
    if x.nbytes < _LARGE:
        tensor = torch.empty_strided(x.shape, strides, dtype=x.dtype)
        return tensor, _view(tensor)
    dtype = _view(x.new_empty(0)).dtype
    room = buffers.empty((x.numel(),), dtype)
    array = np.ndarray(x.shape, dtype, room, strides=[stride * dtype.itemsize for stride in strides])
    flat = torch.from_numpy(room.view(np.int16) if dtype == _BFLOAT16 else room)
    return flat.view(x.dtype).as_strided(x.shape, strides), array


def _empty_like(parameter: Tensor, needed: bool) -> Tensor:
    return torch.empty(parameter.shape, dtype=parameter.dtype) if needed and parameter is not None else None
