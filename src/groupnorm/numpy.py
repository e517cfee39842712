"""The NumPy front end: the public functions on arrays.

A call is recognised by everything about it but its data (shapes, strides, dtypes, options); what was worked out for it
once is kept, so a repeated call costs one dictionary look-up before the kernel.
"""

import contextlib
from typing import Any

import numpy as np

from groupnorm._core.arguments import Call, Options, prepare
from groupnorm._core.moments import Moments
from groupnorm._core.threads import get_num_threads
from groupnorm._dispatch import choose
from groupnorm.errors import GroupNormError, ShapeError
from groupnorm.reference import Gradients

__all__ = ["group_norm", "group_norm_backward", "group_norm_vjp", "moments", "normalize"]

Array = Any

_CALLS_KEPT = 4096  # a program with more kinds of call than this starts over; a kept call weighs about 2 KB
_calls: dict[Any, tuple[Any, Any, Call]] = {}  # what a call looks like -> engine, plan, call


def group_norm(
    x: Array, num_groups: int, weight: Array = None, bias: Array = None, *, eps: float = 1e-5, layout: str = "NCHW",
    activation: str | None = None, scale: Array = None, shift: Array = None, residual: Array = None, mask: Array = None,
    uneven: bool = False, out: Array = None, return_stats: bool = False, impl: str | None = None,
) -> Any:  # fmt: skip
    """y = act(((x - mean)*rstd*weight + bias)*(1 + scale) + shift + residual), mean and rstd taken over each group.

    x: float16, bfloat16 (`ml_dtypes.bfloat16`), float32 or float64, of shape (N, C, *spatial), or (N, *spatial, C) for
    layout "NHWC", any strides. weight, bias: (C,). scale, shift: (N, C). residual: x's shape. mask: bool, (N,
    *spatial), True where a position is real; the others stay out of the statistics and give 0. activation: None,
    "relu", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh" or "hardswish". uneven: if num_groups does not divide C, the
    last group takes what remains. out: an array like x that is filled and returned; it may be x itself. impl: None
    picks the engine; "cpu" and "reference" are obeyed or refused.

    Returns y, of x's dtype and shape; with return_stats also mean and rstd, (N, G), float32 (float64 for float64 x).
    Raises GroupNormError: ShapeError, DtypeError, OptionError or EngineError. Cost: x is read once from memory and y
    written once where a group fits in cache; memory beyond y is a few numbers for each channel of each piece of some
    10^5 elements. Source: Wu and He, Group Normalization, ECCV 2018; equations (1) to (8) of `groupnorm.reference`.
    """
    key = (
        "forward", num_groups, num_groups.__class__, eps, layout, activation, uneven, impl, get_num_threads(), _form(x),
        _form(weight), _form(bias), _form(scale), _form(shift), _form(residual), _form(mask), _form(out),
    )  # fmt: skip
    known, asked = _recall(key), mask
    if known is None:
        options = Options("forward", num_groups, eps, layout, activation, uneven)
        arrays = {"x": x, "weight": weight, "bias": bias, "scale": scale, "shift": shift, "residual": residual,
                  "mask": mask, "out": out}  # fmt: skip
        known, checked = _learn(key, options, arrays, impl)
        x, weight, bias, scale, shift, residual, mask = (
            checked[name] for name in ("x", "weight", "bias", "scale", "shift", "residual", "mask")
        )
    engine, plan, call = known
    if out is not None and not call.takes(out, (x, residual), (weight, bias, scale, shift, mask)):
        y, mean, rstd = group_norm(
            x, num_groups, weight, bias, eps=eps, layout=layout, activation=activation, scale=scale, shift=shift,
            residual=residual, mask=asked, uneven=uneven, return_stats=True, impl=impl,
        )  # fmt: skip
        np.copyto(out, y)
        return (out, mean, rstd) if return_stats else out
    y = call.empty() if out is None else out
    mean, rstd = call.empty_stats() if return_stats else (None, None)
    engine.forward(plan, x, y, weight, bias, scale, shift, residual, mask, mean, rstd, None)
    return (y, mean, rstd) if return_stats else y


def group_norm_vjp(
    dy: Array, x: Array, num_groups: int, weight: Array = None, bias: Array = None, *, mean: Array = None,
    rstd: Array = None, eps: float = 1e-5, layout: str = "NCHW", activation: str | None = None, scale: Array = None,
    shift: Array = None, residual: Array = None, mask: Array = None, uneven: bool = False, impl: str | None = None,
) -> Gradients:  # fmt: skip
    """Every gradient of `group_norm` for dy, the gradient of its y: dx, dweight, dbias, dscale, dshift, dresidual.

    Arguments are those of `group_norm`; dy has x's shape. mean and rstd, (N, G), are what `return_stats` gave; without
    them they are computed again. Returns `Gradients`, a named tuple; an entry is None where the forward had no such
    argument, and has the dtype of that argument otherwise, dresidual that of x. The activation is computed again from
    x, so nothing else need be saved. Raises as `group_norm` does. Cost: x and dy are read once and dx written once
    where a group fits in cache. Source: equations (9) to (14) of `groupnorm.reference`.
    """
    key = (
        "backward", num_groups, num_groups.__class__, eps, layout, activation, uneven, impl, get_num_threads(),
        _form(dy), _form(x), _form(weight), _form(bias), _form(mean), _form(rstd), _form(scale), _form(shift),
        _form(residual), _form(mask),
    )  # fmt: skip
    known = _recall(key)
    if known is None:
        options = Options("backward", num_groups, eps, layout, activation, uneven)
        arrays = {"x": x, "weight": weight, "bias": bias, "scale": scale, "shift": shift, "residual": residual,
                  "mask": mask, "dy": dy, "mean": mean, "rstd": rstd}  # fmt: skip
        known, checked = _learn(key, options, arrays, impl)
        dy, x, weight, bias, scale, shift, residual, mask, mean, rstd = (
            checked[name]
            for name in ("dy", "x", "weight", "bias", "scale", "shift", "residual", "mask", "mean", "rstd")
        )
    engine, plan, call = known
    dx = call.empty()
    dweight, dbias, dscale, dshift = _empty_like(weight), _empty_like(bias), _empty_like(scale), _empty_like(shift)
    dresidual = None if residual is None else call.empty()
    engine.backward(plan, dy, x, dx, weight, bias, scale, shift, residual, mask, mean, rstd, dweight, dbias, dscale,
                    dshift, dresidual)  # fmt: skip
    return Gradients(dx, dweight, dbias, dscale, dshift, dresidual)


def group_norm_backward(
    dy: Array, x: Array, num_groups: int, weight: Array = None, bias: Array = None, *, mean: Array = None,
    rstd: Array = None, eps: float = 1e-5, layout: str = "NCHW", activation: str | None = None, scale: Array = None,
    shift: Array = None, residual: Array = None, mask: Array = None, uneven: bool = False, impl: str | None = None,
) -> tuple[Array, Array | None, Array | None]:  # fmt: skip
    """dx, dweight and dbias: the first three entries of `group_norm_vjp`, which says more."""
    return group_norm_vjp(
        dy, x, num_groups, weight, bias, mean=mean, rstd=rstd, eps=eps, layout=layout, activation=activation,
        scale=scale, shift=shift, residual=residual, mask=mask, uneven=uneven, impl=impl,
    )[:3]  # fmt: skip


def moments(x: Array, num_groups: int, *, layout: str = "NCHW", mask: Array = None, uneven: bool = False) -> Moments:
    """Count, mean and M2 of every group of x, each (N, G) float64: statistics that merge with those of other pieces.

    Arguments and errors as for `group_norm`. Cost: x is read once.
    """
    key = ("moments", num_groups, num_groups.__class__, layout, uneven, get_num_threads(), _form(x), _form(mask))
    known = _recall(key)
    if known is None:
        options = Options("moments", num_groups, 0.0, layout, None, uneven)
        known, checked = _learn(key, options, {"x": x, "mask": mask}, None)
        x, mask = checked["x"], checked["mask"]
    engine, plan, call = known
    found = np.empty((call.problem.N, call.problem.G, 3))
    engine.forward(plan, x, None, None, None, None, None, None, mask, None, None, found)
    return Moments(*(np.ascontiguousarray(found[..., i]) for i in range(3)))


def normalize(
    x: Array, m: Moments, weight: Array = None, bias: Array = None, *, eps: float = 1e-5, layout: str = "NCHW",
    activation: str | None = None, scale: Array = None, shift: Array = None, residual: Array = None, uneven: bool =
    False, out: Array = None,
) -> Array:  # fmt: skip
    """`group_norm` with statistics supplied by the caller: m, a `Moments` of shape (N, G), e.g. merged over tiles.

    Arguments, result and errors as for `group_norm`. Cost: x is read once and y written once.
    """
    given: Any = m
    if not isinstance(given, Moments) or given.mean.ndim != 2:
        got = f"the shape {m.mean.shape}" if isinstance(given, Moments) else type(m).__name__
        raise GroupNormError(f"m must be Moments of shape (N, G): got {got}; make them with groupnorm.moments")
    groups = m.mean.shape[1]
    key = (
        "normalize", groups, eps, layout, activation, uneven, get_num_threads(), _form(x), _form(weight), _form(bias),
        _form(scale), _form(shift), _form(residual), _form(out),
    )  # fmt: skip
    known = _recall(key)
    if known is None:
        options = Options("normalize", groups, eps, layout, activation, uneven)
        arrays = {
            "x": x,
            "weight": weight,
            "bias": bias,
            "scale": scale,
            "shift": shift,
            "residual": residual,
            "out": out,
        }
        known, checked = _learn(key, options, arrays, None)
        x, weight, bias, scale, shift, residual = (
            checked[name] for name in ("x", "weight", "bias", "scale", "shift", "residual")
        )
    engine, plan, call = known
    if m.mean.shape[0] != call.problem.N:
        raise ShapeError(f"m must have one row for each sample: got {m.mean.shape[0]} rows, {call.problem.N} samples")
    if out is not None and not call.takes(out, (x, residual), (weight, bias, scale, shift)):
        y = normalize(
            x, m, weight, bias, eps=eps, layout=layout, activation=activation, scale=scale, shift=shift,
            residual=residual, uneven=uneven,
        )  # fmt: skip
        np.copyto(out, y)
        return out
    y = call.empty() if out is None else out
    statistics = np.stack((m.count, m.mean, m.m2), 2)
    engine.forward(plan, x, y, weight, bias, scale, shift, residual, None, None, None, statistics)
    return y


def _empty_like(parameter: Array | None) -> Array | None:
    return None if parameter is None else np.empty(parameter.shape, parameter.dtype)


class _Unknown:
    """The form of what is no plain array: equal to no other, so that such a call is never recognised."""


def _form(array: Array) -> Any:
    """Everything about an array but its data."""
    if array is None:
        return None
    if array.__class__ is np.ndarray:
        return array.shape, array.strides, array.dtype
    return _Unknown()


def _recall(key: Any) -> tuple[Any, Any, Call] | None:
    try:
        return _calls.get(key)
    except TypeError:  # an option that cannot be hashed; the checks will name it
        return None


def _learn(key: Any, options: Options, arrays: dict[str, Any], impl: str | None) -> Any:
    """Check the arguments of a new kind of call and choose its engine; returns that and the arrays as engines take
    them.
    """
    call, given = prepare(options, arrays)
    known = (*choose(call.problem, impl, get_num_threads()), call)
    if all(given[name] is arrays[name] for name in given) and not any(part.__class__ is _Unknown for part in key):
        if len(_calls) >= _CALLS_KEPT:
            _calls.clear()
        with contextlib.suppress(TypeError):  # an option that is right but cannot be hashed: eps as an array
            _calls[key] = known
    return known, given
