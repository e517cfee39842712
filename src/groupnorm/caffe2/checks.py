"""What Caffe2's operator enforces of its arguments, and what it takes for granted, checked at the door."""

import math
import operator
from typing import Any

import numpy as np

from groupnorm.errors import DtypeError, OptionError, ShapeError

__all__ = ["FLOAT32", "FLOATS", "channel_axis", "check_array", "check_epsilon", "check_group", "check_inputs",
           "check_order", "check_shape"]  # fmt: skip

Array = Any

FLOAT32 = ("float32",)  # of the operators: Caffe2 registers them for float alone
FLOATS = ("float32", "float64")  # of the functions


def check_group(group: Any) -> int:
    """group as an int; OptionError if it is not a positive whole number."""
    try:
        number = None if isinstance(group, bool) else int(operator.index(group))
    except TypeError:
        number = None
    if number is None or number < 1:
        raise OptionError(f"group must be a whole number, at least 1: got {group!r}; Caffe2's default is 32")
    return number


def check_epsilon(epsilon: Any) -> float:
    """epsilon as Caffe2 holds it, rounded to float32; OptionError unless it is finite and not negative."""
    try:
        value = float(epsilon)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not 0 <= value <= float(np.finfo(np.float32).max):
        raise OptionError(f"epsilon must be a finite float32, at least 0: got {epsilon!r}; Caffe2's default is 1e-5")
    return float(np.float32(value))


def check_order(order: Any) -> str:
    """order as "NCHW" or "NHWC"; Caffe2 knows both in lower case as well. OptionError for anything else."""
    if isinstance(order, str) and order in ("NCHW", "nchw", "NHWC", "nhwc"):
        return order.upper()
    raise OptionError(f'order must be "NCHW" or "NHWC": got {order!r}; "NCHW" has channels on axis 1, "NHWC" last')


def channel_axis(X: Array, order: str) -> int:
    """The axis of X's channels; ShapeError for fewer than two axes."""
    if X.ndim < 2:
        raise ShapeError(f"X must have a batch and a channel axis: got the shape {X.shape}; add axes of length 1")
    return 1 if order == "NCHW" else X.ndim - 1


def check_array(name: str, value: Any, dtypes: tuple[str, ...]) -> Array:
    """value as an array of one of the types; DtypeError otherwise."""
    if isinstance(value, np.ma.MaskedArray):
        raise DtypeError(f"{name} must be a plain array: got a masked one, whose mask would be lost; pass {name}.data")
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: a tensor that asks for a gradient
        raise DtypeError(f"{name} must be an array of numbers: got {type(value).__name__} ({error})") from error
    if array.dtype.name not in dtypes:
        reason = "; Caffe2's operator has no other type" if dtypes == FLOAT32 else ""
        raise DtypeError(f"{name} must be {' or '.join(dtypes)}: got {array.dtype}{reason}; convert it, e.g. with "
                         f"{name}.astype(numpy.{dtypes[0]})")  # fmt: skip
    return array


def check_shape(name: str, array: Array, shape: tuple[int, ...], meaning: str) -> None:
    """ShapeError unless the array has the shape."""
    if array.shape != shape:
        raise ShapeError(f"{name} must have the shape {meaning} = {shape}: got {array.shape}")


def check_inputs(
    X: Any, gamma: Any, beta: Any, group: int, order: str, dtypes: tuple[str, ...]
) -> tuple[Array, Array, Array]:
    """X, gamma and beta as arrays, of one type, checked against each other and the group.

    gamma and beta may have any rank, as in Caffe2, which counts their elements.
    """
    X = check_array("X", X, dtypes)
    same = (X.dtype.name,)
    gamma, beta = check_array("gamma", gamma, same), check_array("beta", beta, same)
    C = X.shape[channel_axis(X, order)]
    for name, array in (("gamma", gamma), ("beta", beta)):
        if array.size != C:
            raise ShapeError(f"{name} must have one element for each of the {C} channels of X: got the shape "
                             f"{array.shape}; X has the shape {X.shape} and order {order}")  # fmt: skip
    if C < 1:
        raise ShapeError(f"X must have at least one channel: got the shape {X.shape} with order {order}")
    if C % group:
        divisors = ", ".join(str(d) for d in range(1, min(C, 64) + 1) if C % d == 0)
        raise ShapeError(f"group must divide the channels: got group = {group} and {C} channels; {divisors} would do "
                         "(the default is 32; the argument that Caffe2 reads is group)")  # fmt: skip
    return X, gamma, beta
