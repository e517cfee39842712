"""Tensors to the engine and back, without copies: an engine is told where their memory begins.

As in the NumPy front end, a call is recognised by everything about it but its data, and what was worked out for it once
(checks, engine, plan) is kept as a `Kind`.
"""

import contextlib
import itertools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch._prims_common import suggest_memory_format

from groupnorm._core import buffers
from groupnorm._core.arguments import Call, Options, prepare
from groupnorm._dispatch import choose
from groupnorm.errors import ShapeError
from groupnorm.torch import gpu
from groupnorm.torch.checks import check, clash
from groupnorm.torch.road import is_plain

__all__ = ["Gradients", "Kind", "backward", "empty_result", "forward", "kind_of", "moments", "normalize"]

Tensor = Any

_KINDS_KEPT = 4096  # a program with more kinds of call than this starts over
_STATS = {torch.float64: torch.float64}  # the type of mean and rstd where it is not float32
_kinds: dict[Any, "Kind"] = {}
_get_num_threads = torch.get_num_threads


@dataclass(frozen=True, slots=True)
class Kind:
    """What is kept of a kind of call. Without `plain` no engine takes the tensors: then it is the composite's."""

    num_groups: int
    eps: float
    activation: str | None
    plain: bool = False
    convert: frozenset[str] = frozenset()  # the tensors that have to be converted or packed first
    memory_format: Any = None  # of what is packed
    strides: tuple[int, ...] = ()  # of a result of x's shape
    run: Callable[..., None] | None = None  # the engine with its plan; None if something is converted, or x is empty
    stats_shape: tuple[int, ...] = ()  # mean and rstd together
    stats_dtype: Any = None
    stats_bytes: int = 0  # of mean alone
    large: bool = False  # results lie in recycled memory
    alike: bool = False  # `torch.empty_like` makes them
    usual: bool = False  # without scale, shift, residual and mask
    short: bool = False  # with weight and bias besides, and without out: for small x the way there is what takes time
    backwards: dict[Any, "Kind"] = field(default_factory=dict, compare=False, repr=False)  # by what is new there


class Gradients(NamedTuple):
    """What `backward` gives; None where the call has no such tensor, or nobody needs its gradient."""

    dx: Tensor
    dweight: Tensor
    dbias: Tensor
    dscale: Tensor
    dshift: Tensor
    dresidual: Tensor


def kind_of(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str | None, scale: Tensor,
    shift: Tensor, residual: Tensor, mask: Tensor, out: Tensor,
) -> Kind:  # fmt: skip
    """What is known of this kind of forward, found out now if it is new. Raises whatever is wrong with the call."""
    few = scale is None and shift is None and residual is None and mask is None and out is None
    try:
        if few and weight is not None and bias is not None:
            # What `_form` gives, for the usual tensors without its calls: 16 KB take 2.5 us, and this 1.6.
            key: Any = (
                num_groups, num_groups.__class__, eps, activation, _get_num_threads(),
                x.__class__, x.dtype, x.is_cpu or x.device, x.is_neg(), x.shape, x.stride(),
                weight.__class__, weight.dtype, weight.is_cpu or weight.device, weight.is_neg(), weight.shape,
                weight.stride(), bias.__class__, bias.dtype, bias.is_cpu or bias.device, bias.is_neg(), bias.shape,
                bias.stride(),
            )  # fmt: skip
        else:
            tensors = (x, weight, bias, scale, shift, residual, mask, out)
            key = (num_groups, num_groups.__class__, eps, activation, _get_num_threads(), *map(_form, tensors))
        kind = _kinds.get(key)
    except (AttributeError, RuntimeError, TypeError):  # no tensor or no strides; an option that cannot be hashed
        kind = None
    if kind is not None:
        return kind
    check(x, num_groups, weight, bias, eps, activation, scale, shift, residual, mask, out)
    num_groups, eps = int(num_groups), float(eps)
    if not is_plain(x, weight, bias, scale, shift, residual, mask, out):
        return Kind(num_groups, eps, activation)
    named = {"x": x, "weight": weight, "bias": bias, "scale": scale, "shift": shift, "residual": residual,
             "mask": mask, "out": out}  # fmt: skip
    kind = _learn(Options("forward", num_groups, eps, "NCHW", activation, False), named)
    return kind if any(isinstance(part, torch.Tensor) for part in key[:3]) else _keep(key, kind)  # they may change


def forward(
    kind: Kind, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, residual: Tensor, mask: Tensor,
    out: Tensor, stats: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and mean and rstd as one tensor (2, N, G) if `stats`, without autograd. y lies in memory as PyTorch's own
    group_norm would lay it; it is `out` where that is given.
    """
    if kind.short and kind.run is not None and not stats:
        y = torch.empty_like(x)
        kind.run(False, x.data_ptr() or _at(x), y.data_ptr(), weight.data_ptr() or _at(weight),
                 bias.data_ptr() or _at(bias), 0, 0, 0, 0, 0, 0)  # fmt: skip
        return y, None
    if kind.convert or (out is not None and clash(out, x, residual, weight, bias, scale, shift)):
        tensors = {"x": x, "weight": weight, "bias": bias, "scale": scale, "shift": shift, "residual": residual,
                   "mask": mask}  # fmt: skip
        _convert(kind, tensors)
        x, weight, bias, scale, shift, residual, mask = tensors.values()
        direct = kind_of(x, kind.num_groups, weight, bias, kind.eps, kind.activation, scale, shift, residual, mask,
                         None)  # fmt: skip
        y, found = forward(direct, x, weight, bias, scale, shift, residual, mask, None, stats)
        return (y if out is None else out.copy_(y)), found
    run = kind.run
    if run is None:
        return _empty(kind, x)[0] if out is None else out, _stats_of_nothing(kind, x) if stats else None
    fresh = False
    if out is not None:
        y = out
        torch.autograd.graph.increment_version(out)
    elif kind.alike:
        y = torch.empty_like(x)
    else:
        y, fresh = _empty(kind, x)
    found, mean, rstd = None, 0, 0
    if stats:
        found = torch.empty(kind.stats_shape, dtype=kind.stats_dtype, device=x.device)
        mean = found.data_ptr()
        rstd = mean + kind.stats_bytes
    if kind.usual:
        run(fresh, x.data_ptr() or _at(x), y.data_ptr(), _at(weight), _at(bias), 0, 0, 0, 0, mean, rstd)
    else:
        run(fresh, _at(x), y.data_ptr(), _at(weight), _at(bias), _at(scale), _at(shift), _at(residual), _at(mask), mean,
            rstd)  # fmt: skip
    return y, found


def backward(
    of: Kind, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, residual: Tensor,
    mask: Tensor, stats: Tensor, needs: tuple[bool, ...],
) -> Gradients:  # fmt: skip
    """The gradients of x, weight, bias, scale, shift and residual, those that `needs` marks, in their types. `of` is
    the kind of the forward, whose tensors these are, `stats` what it gave.
    """
    # With types and strides: tensors that saved_tensors_hooks packed may come back with others.
    key: Any = (needs, _get_num_threads(), dy.dtype, dy.is_cpu or dy.device, dy.is_neg(), dy.stride(), x.dtype,
                x.stride(), stats.dtype, weight is None or (weight.dtype, weight.stride()),
                bias is None or (bias.dtype, bias.stride()))  # fmt: skip
    if not of.usual:
        key += tuple(map(_form, (scale, shift, residual, mask)))
    kind = of.backwards.get(key)
    if kind is None and stats.dtype != torch.promote_types(x.dtype, torch.float32):
        stats = stats.to(torch.promote_types(x.dtype, torch.float32))
        return backward(of, dy, x, weight, bias, scale, shift, residual, mask, stats, needs)
    if kind is None:
        tensors = {"x": x, "weight": weight, "bias": bias, "scale": scale, "shift": shift, "residual": residual,
                   "mask": mask, "dy": dy, "mean": stats[0], "rstd": stats[1]}  # fmt: skip
        options = Options("backward", of.num_groups, of.eps, "NCHW", of.activation, False)
        kind = of.backwards[key] = _learn(options, tensors, dx=needs[0] or needs[5])
    if kind.convert:
        tensors = {"x": x, "weight": weight, "bias": bias, "scale": scale, "shift": shift, "residual": residual,
                   "mask": mask, "dy": dy}  # fmt: skip
        _convert(kind, tensors)
        dtype = None if residual is None else residual.dtype
        x, weight, bias, scale, shift, residual, mask, dy = tensors.values()
        direct = kind_of(x, of.num_groups, weight, bias, of.eps, of.activation, scale, shift, residual, mask, None)
        found = backward(direct, dy, x, weight, bias, scale, shift, residual, mask, stats, needs)
        return found if found.dresidual is None else found._replace(dresidual=found.dresidual.to(dtype))
    needs_x, needs_weight, needs_bias, needs_scale, needs_shift, needs_residual = needs
    dx, fresh = _empty(kind, x) if needs_x or needs_residual else (None, False)
    if kind.run is None:  # there are no elements
        dweight, dbias, dscale, dshift = (
            tensor.new_zeros(tensor.shape) if needed else None
            for tensor, needed in zip((weight, bias, scale, shift), needs[1:5], strict=True)
        )
        dresidual = dx.to(residual.dtype, copy=True) if dx is not None and needs_residual else None
        return Gradients(dx if needs_x else None, dweight, dbias, dscale, dshift, dresidual)
    dweight = torch.empty_like(weight) if needs_weight else None
    dbias = torch.empty_like(bias) if needs_bias else None
    dscale = dshift = dresidual = None
    if not kind.usual:
        dscale = torch.empty_like(scale) if needs_scale else None
        dshift = torch.empty_like(shift) if needs_shift else None
        dresidual = None if dx is None or residual is None else _empty(kind, x)[0]
    mean = stats.data_ptr()
    rstd = mean + kind.stats_bytes
    if kind.usual:
        kind.run(fresh, _at(x), 0, _at(weight), _at(bias), 0, 0, 0, 0, mean, rstd, 0, _at(dy), _at(dx), _at(dweight),
                 _at(dbias))  # fmt: skip
    else:
        kind.run(fresh, _at(x), 0, _at(weight), _at(bias), _at(scale), _at(shift), _at(residual), _at(mask), mean, rstd,
                 0, _at(dy), _at(dx), _at(dweight), _at(dbias), _at(dscale), _at(dshift), _at(dresidual))  # fmt: skip
    dx, dresidual = dx if needs_x else None, dresidual if needs_residual else None  # kernels give both
    return Gradients(dx, dweight, dbias, dscale, dshift, dresidual)


def _stats_of_nothing(kind: Kind, x: Tensor) -> Tensor:
    """mean 0 and rstd of variance 0."""
    shape, dtype = (x.shape[0], kind.num_groups), _STATS.get(x.dtype, torch.float32)
    rstd = math.inf if kind.eps == 0 else kind.eps**-0.5
    return torch.stack((x.new_zeros(shape, dtype=dtype), x.new_full(shape, rstd, dtype=dtype)))


def empty_result(x: Tensor) -> Tensor:
    """An uninitialised tensor that lies in memory as the result of PyTorch's own group_norm does."""
    return torch.empty_like(x, memory_format=suggest_memory_format(x))


def moments(x: Tensor, num_groups: int, mask: Tensor) -> Tensor:
    """Count, mean and M2 of each group, as one float64 tensor (N, G, 3)."""
    tensors = {"x": x, "mask": mask}
    num_groups = int(num_groups)  # a tensor may change
    key = ("moments", num_groups, torch.get_num_threads(), _form(x), _form(mask))
    options = Options("moments", num_groups, 0.0, "NCHW", None, False)
    kind = _kinds.get(key) or _keep(key, _learn(options, tensors))
    if kind.convert:
        _convert(kind, tensors)
        return moments(tensors["x"], num_groups, tensors["mask"])
    found = x.new_empty((x.shape[0], num_groups, 3), dtype=torch.float64)
    if kind.run is None:
        return found.zero_()
    kind.run(False, _at(x), 0, 0, 0, 0, 0, 0, _at(mask), 0, 0, found.data_ptr())
    if gpu.takes(x):
        gpu.count_exactly(found, x, mask)
    return found


def normalize(
    x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str | None, scale: Tensor,
    shift: Tensor, residual: Tensor,
) -> Tensor:  # fmt: skip
    """y from given moments, a float64 tensor (N, G, 3)."""
    tensors = {"x": x, "weight": weight, "bias": bias, "scale": scale, "shift": shift, "residual": residual}
    groups, eps = statistics.shape[1], float(eps)  # a tensor may change
    key = ("normalize", groups, eps, activation, torch.get_num_threads(), *map(_form, tensors.values()))
    options = Options("normalize", groups, eps, "NCHW", activation, False)
    kind = _kinds.get(key) or _keep(key, _learn(options, tensors))
    if kind.convert:
        _convert(kind, tensors)
        x, weight, bias, *others = tensors.values()
        return normalize(x, statistics, weight, bias, eps, activation, *others)
    y, fresh = _empty(kind, x)
    if kind.run is None:
        return y
    statistics = statistics.contiguous()
    kind.run(fresh, _at(x), y.data_ptr(), _at(weight), _at(bias), _at(scale), _at(shift), _at(residual), 0, 0, 0,
             statistics.data_ptr())  # fmt: skip
    return y


def _form(tensor: Tensor) -> Any:
    """Everything about a tensor but its data; something new for what has no strides: that is never recognised."""
    if tensor is None:
        return None
    try:
        return (tensor.__class__, tensor.dtype, tensor.is_cpu or tensor.device, tensor.is_neg(), tensor.shape,
                tensor.stride())  # fmt: skip
    except (AttributeError, RuntimeError):  # no tensor, a sparse one, a nested one
        return object()


def _keep(key: Any, kind: Kind) -> Kind:
    if len(_kinds) >= _KINDS_KEPT:
        _kinds.clear()
    with contextlib.suppress(TypeError):  # an option that cannot be hashed
        _kinds[key] = kind
    return kind


def _learn(options: Options, tensors: dict[str, Tensor], dx: bool = True) -> Kind:
    """Choose the engine and the plan of a new kind of call."""
    x = tensors["x"]
    for tensor in tensors.values():
        _at(tensor)
    memory_format = suggest_memory_format(x)
    strides = empty_result(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")).stride()
    kind = Kind(options.num_groups, options.eps, options.activation, True, frozenset(), memory_format, strides)
    if gpu.takes(x):
        found = gpu.fit(options, tensors, dx)
        if found.plan is None:
            return replace(kind, convert=found.convert)
        return _planned(kind, tensors, found.engine, found.plan, large=False)
    arrays = {name: _view(tensor) for name, tensor in tensors.items()}
    call, given = prepare(options, arrays)
    convert = {name for name in given if given[name] is not arrays[name]}
    convert |= {name for name, tensor in tensors.items() if tensor is not None and tensor.is_neg()}
    if not _lies_so(call, strides) or "mask" in convert:  # a mask is in the order of x's positions
        convert |= {"x"}
    out = tensors.get("out")
    if out is not None and torch._debug_has_internal_overlap(out) == 1:
        raise ShapeError("out must have memory of its own for each element: got an expanded tensor; pass out.clone()")
    if out is not None and not call.fills_out:
        convert |= {"out"}
    if not x.numel():
        convert = set()
    if convert or not x.numel():
        return replace(kind, convert=frozenset(convert))
    engine, plan = choose(replace(call.problem, dx=dx), None, torch.get_num_threads())
    return _planned(kind, tensors, engine, plan, large=x.nbytes >= buffers.LARGE)


def _planned(kind: Kind, tensors: dict[str, Tensor], engine: Any, plan: Any, *, large: bool) -> Kind:
    """The kind of call that an engine does with a plan."""
    x, p = tensors["x"], plan.problem
    stats = _STATS.get(x.dtype, torch.float32)
    usual = all(tensors.get(name) is None for name in ("scale", "shift", "residual", "mask"))
    alike = not large and torch.empty_like(x).stride() == kind.strides
    both = tensors.get("weight") is not None and tensors.get("bias") is not None
    short = usual and alike and both and tensors.get("out") is None
    return replace(
        kind, run=partial(engine.run_at, plan), stats_shape=(2, p.N, p.G), stats_dtype=stats,
        stats_bytes=p.N * p.G * stats.itemsize, large=large, usual=usual, alike=alike, short=short,
    )  # fmt: skip


def _lies_so(call: Call, strides: tuple[int, ...]) -> bool:
    """Whether the engine's own results lie in memory with these strides."""
    steps = list(itertools.accumulate(reversed(call.stored_shape[1:]), operator.mul, initial=1))[::-1]
    axes = call.axes or range(len(steps))
    return all(
        call.stored_shape[axis] == 1 or steps[axis] == stride for axis, stride in zip(axes, strides, strict=True)
    )


def _convert(kind: Kind, tensors: dict[str, Tensor]) -> None:
    """Bring the tensors of this kind of call into types and strides that an engine takes."""
    dtype = tensors["x"].dtype
    for name in kind.convert & tensors.keys():
        tensor = tensors[name].resolve_neg()
        if name in ("x", "residual", "dy"):
            tensor = tensor.to(dtype).contiguous(memory_format=kind.memory_format)
        tensors[name] = tensor if name in ("x", "residual", "dy") else tensor.contiguous()


def _at(tensor: Tensor) -> int:
    """Where the tensor's memory begins; 0 for None. Raises ShapeError for one whose memory was given back."""
    if tensor is None:
        return 0
    address: int = tensor.data_ptr()
    if address == 0 and tensor.numel():
        raise ShapeError(f"tensors must have memory: got one of shape {tuple(tensor.shape)} whose storage was freed; "
                         "gather or allocate it first")  # fmt: skip
    return address


def _view(tensor: Tensor) -> Any:
    """A NumPy array on the tensor's memory."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    if tensor.is_neg():  # of which only the shape and the strides are looked at
        tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes  # which CUDA tensors do without

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _empty(kind: Kind, x: Tensor) -> tuple[Tensor, bool]:
    """A result of x's shape and type, and whether it lies in memory that was never written."""
    if kind.alike:
        return torch.empty_like(x), False
    lent = buffers.lend(x.nbytes) if kind.large else None
    if lent is None:  # a large one that is not lent may come from the system
        return torch.empty_strided(x.shape, kind.strides, dtype=x.dtype, device=x.device), kind.large
    fresh = buffers.first_write(lent)
    # Detached: a view may not be changed in place where it was made in a Function, or without gradients.
    return torch.from_numpy(lent).view(x.dtype).as_strided(x.shape, kind.strides).detach(), fresh
