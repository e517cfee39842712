"""From a caller's arguments to a Problem: the checks at the door, and the arrays as engines take them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from groupnorm._core import buffers
from groupnorm._core.layout import Walk, channel_axis, memory_order, walk
from groupnorm._core.problem import DTYPES, Problem, check_activation, check_eps, check_num_groups
from groupnorm.errors import DtypeError, ShapeError

__all__ = ["Call", "Options", "prepare"]

Array = Any

_LIKE_X = ("residual", "dy")  # arrays of x's shape that are read
_PARAMETERS = ("weight", "bias", "scale", "shift")


class Options(NamedTuple):
    """The arguments of a call that are not arrays, as they were given."""

    task: str
    num_groups: Any
    eps: Any
    layout: Any
    activation: Any
    uneven: Any


@dataclass(frozen=True, slots=True)
class Call:
    """A checked kind of call: its Problem, and how its results are allocated."""

    problem: Problem
    dtype: Any
    stats_dtype: Any
    stored_shape: tuple[int, ...]  # of an output, in the order of memory
    axes: tuple[int, ...] | None  # which turn the stored shape into x's; None if they are the same
    fills_out: bool  # an engine can walk `out`

    def empty(self) -> Array:
        """An output of x's shape that lies in memory as x does."""
        array = buffers.empty(self.stored_shape, self.dtype)
        return array if self.axes is None else array.transpose(self.axes)

    def empty_stats(self) -> tuple[Array, Array]:
        """mean and rstd, to be filled."""
        shape = (self.problem.N, self.problem.G)
        return np.empty(shape, self.stats_dtype), np.empty(shape, self.stats_dtype)

    def takes(self, out: Array, like_x: tuple[Array, ...], others: tuple[Array, ...]) -> bool:
        """Whether an engine can write y into `out` at once: where out can be walked like x, and shares memory with an
        input only by being the very same elements of x or the residual (`like_x`). Where not, y is computed apart and
        copied. Raises ShapeError for a read-only array.
        """
        if not out.flags.writeable:
            raise ShapeError("out must be writeable: got a read-only array; pass a copy, or leave out away")
        if not self.fills_out:
            return False
        for array in like_x:
            if array is not None and array is not out and np.may_share_memory(array, out):
                place = array.__array_interface__["data"][0] == out.__array_interface__["data"][0]
                if not (place and array.strides == out.strides):
                    return False
        return not any(array is not None and np.may_share_memory(array, out) for array in others)


def prepare(options: Options, arrays: dict[str, Array]) -> tuple[Call, dict[str, Array]]:
    """The checked call, and its arrays as an engine takes them (the same objects wherever nothing had to be converted).

    Raises ShapeError, DtypeError or OptionError.
    """
    x = _floats("x", arrays["x"])
    axis = channel_axis(options.layout, x.ndim)
    uneven = bool(options.uneven)
    groups = check_num_groups(options.num_groups, x.shape[axis], uneven)
    eps, activation = check_eps(options.eps), check_activation(options.activation)
    given: dict[str, Array] = dict.fromkeys(arrays)

    order = memory_order(x.shape, x.strides, axis)
    steps = walk(x.shape, x.strides, x.itemsize, axis, order)
    if steps is None:
        x = np.ascontiguousarray(x)
        order = memory_order(x.shape, x.strides, axis)
        steps = walk(x.shape, x.strides, x.itemsize, axis, order)
        assert steps is not None
    channels_last = steps.s != 1
    stored = (0, *order, axis) if channels_last else (0, axis, *order)
    n, c = x.shape[0], x.shape[axis]
    s = int(np.prod([x.shape[i] for i in order], dtype=np.int64))
    given["x"] = x
    walks = {"x": steps}
    own = Walk(c * s, 1, c) if channels_last else Walk(c * s, s, 1)  # of an array allocated in the order of memory
    walks |= dict.fromkeys(("y", "dx", "dresidual"), own)

    if options.task == "backward" and arrays["dy"] is None:
        raise DtypeError("dy must be an array of x's shape: got None; pass the gradient of y")
    for name in _LIKE_X:
        if arrays.get(name) is not None:
            array = _floats(name, arrays[name])
            _check_shape(name, array, x.shape, "x's shape")
            if array.dtype != x.dtype:
                array = array.astype(x.dtype)
            found = walk(array.shape, array.strides, array.itemsize, axis, order)
            if found is None or (found.c if channels_last else found.s) != 1:
                array, found = _stored(array, stored), own
            given[name], walks[name] = array, found
    fills_out = False
    if arrays.get("out") is not None:
        given["out"] = out = _check_out(arrays["out"], x)
        found = walk(out.shape, out.strides, out.itemsize, axis, order)
        fills_out = found is not None and (found.c if channels_last else found.s) == 1
        if found is not None and fills_out:
            walks["y"] = found

    for name in _PARAMETERS:
        if arrays.get(name) is not None:
            array = _floats(name, arrays[name])
            per_sample = name in ("scale", "shift")
            _check_shape(name, array, (n, c) if per_sample else (c,), "(N, C)" if per_sample else "(C,)")
            given[name] = array if array.flags.c_contiguous else np.ascontiguousarray(array)
    if arrays.get("mask") is not None:
        given["mask"] = _check_mask(arrays["mask"], x.shape, axis, order)
    stats_dtype = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    if (arrays.get("mean") is None) != (arrays.get("rstd") is None):
        raise ShapeError(
            "mean and rstd belong together: got one of them; pass both, as return_stats gave them, or none"
        )
    for name in ("mean", "rstd"):
        if arrays.get(name) is not None:
            array = _floats(name, arrays[name])
            _check_shape(name, array, (n, groups), "(N, G)")
            given[name] = np.ascontiguousarray(array, stats_dtype) if _differs(array, stats_dtype) else array

    problem = Problem(
        options.task, x.dtype.name, n, c, s, groups, eps, activation,
        **{name: given[name].dtype.name for name in _PARAMETERS if given.get(name) is not None},
        mask=given.get("mask") is not None, stats=given.get("mean") is not None, uneven=uneven, walks=walks,
    )  # fmt: skip
    back = tuple(int(i) for i in np.argsort(stored))
    natural = stored == tuple(range(x.ndim))
    stored_shape = tuple(x.shape[i] for i in stored)
    return Call(problem, x.dtype, stats_dtype, stored_shape, None if natural else back, fills_out), given


def _floats(name: str, value: Any) -> Array:
    """value as a plain array of one of our types; the same object if it is one already."""
    if value is None:
        raise DtypeError(f"{name} must be an array: got None")
    _refuse_masked(name, value)
    if value.__class__ is not np.ndarray and getattr(value, "requires_grad", False) is True:
        raise DtypeError(f"{name} must be an array: got a {type(value).__name__} that asks for a gradient; use "
                         "groupnorm.torch for tensors, or pass its detach()")  # fmt: skip
    if hasattr(value, "__cuda_array_interface__"):
        raise DtypeError(f"{name} must be an array in host memory: got {type(value).__name__} in GPU memory; use "
                         "groupnorm.cuda, or groupnorm.torch for tensors")  # fmt: skip
    try:
        array = value if value.__class__ is np.ndarray else np.asarray(value)
    except (ValueError, TypeError) as error:
        raise DtypeError(f"{name} must be an array of numbers: got {type(value).__name__} ({error})") from error
    if array.dtype.name not in DTYPES:
        raise DtypeError(f"{name} must be of type {', '.join(DTYPES)}: got {array.dtype}; convert it, e.g. with "
                         f"{name}.astype(numpy.float32)")  # fmt: skip
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _refuse_masked(name: str, value: Any) -> None:
    if isinstance(value, np.ma.MaskedArray):
        raise DtypeError(f"{name} must be a plain array: got a masked one, whose mask would be lost; pass {name}.data, "
                         "and for x mask=, True where a position is real")  # fmt: skip


def _differs(array: Array, dtype: Any) -> bool:
    return bool(array.dtype != dtype) or not array.flags.c_contiguous


def _check_shape(name: str, array: Array, wanted: tuple[int, ...], meaning: str) -> None:
    if array.shape != wanted:
        raise ShapeError(f"{name} must have the shape {meaning} = {wanted}: got {array.shape}")


def _stored(array: Array, stored: tuple[int, ...]) -> Array:
    """A copy of the array whose axes lie in memory in the order `stored`."""
    return np.ascontiguousarray(array.transpose(stored)).transpose(np.argsort(stored))


def _check_out(out: Any, x: Array) -> Array:
    if not isinstance(out, np.ndarray):
        raise DtypeError(f"out must be a NumPy array: got {type(out).__name__}")
    if out.dtype != x.dtype:
        order = "" if out.dtype.isnative else ", and this machine's byte order"
        raise DtypeError(f"out must have x's type{order}: got {out.dtype}, x is {x.dtype}")
    _check_shape("out", out, x.shape, "x's shape")
    if out.size and any(stride == 0 and size > 1 for stride, size in zip(out.strides, out.shape, strict=True)):
        raise ShapeError("out must have memory of its own for each element: got a broadcast array; pass a copy")
    return out


def _check_mask(mask: Any, shape: tuple[int, ...], axis: int, order: tuple[int, ...]) -> Array:
    """The mask with its positions in the order in which x is walked, contiguous."""
    _refuse_masked("mask", mask)
    try:
        array = np.asarray(mask)
    except (ValueError, TypeError) as error:
        raise DtypeError(f"mask must be an array of bool: got {type(mask).__name__} ({error})") from error
    if array.dtype != np.bool_:
        raise DtypeError(
            f"mask must be of type bool: got {array.dtype}; True marks a real position, e.g. mask = lengths > t"
        )
    wanted = tuple(size for i, size in enumerate(shape) if i != axis)
    if array.shape != wanted:
        raise ShapeError(f"mask must have the shape (N, *spatial) = {wanted}: got {array.shape}")
    without_channels = [i if i < axis else i - 1 for i in order]
    if without_channels == sorted(without_channels) and array.flags.c_contiguous:
        return array
    return np.ascontiguousarray(array.transpose(0, *without_channels))
