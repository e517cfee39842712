"""A net over a dictionary of arrays: GroupNorm, GroupNormGradient, and what joins gradients, Sum and ConstantFill."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from groupnorm.caffe2.checks import FLOAT32, check_array
from groupnorm.caffe2.definition import argument, naming, operator_from_definition
from groupnorm.caffe2.proto import as_message
from groupnorm.errors import GroupNormError, OptionError, ShapeError

__all__ = ["run_net"]

Array = Any


def run_net(net: Any, workspace: Mapping[str, Array]) -> dict[str, Array]:
    """The workspace after the net has run: a new dictionary with every blob that was given and every one it computed.

    net: a NetDef of GroupNorm and GroupNormGradient operators, with the Sum and ConstantFill operators that
    `add_gradient_operators` adds; they run in their order. workspace: blob name to array, is left as it is. Device
    options and engines are ignored: everything runs on this package's CPU engine.

    Raises GroupNormError, always with the index, type and name of the operator: OptionError for a type that is not one
    of these or an argument that is wrong, both before anything runs; GroupNormError for a blob that is missing;
    ShapeError or DtypeError for arrays that do not fit. Warns as `operator_from_definition` does.
    """
    net = as_message("NetDef", net)
    if not isinstance(workspace, Mapping):
        raise OptionError(f"workspace must be a dictionary of blobs: got {type(workspace).__name__}")
    steps = []
    for index, op in enumerate(net.op):
        with naming(op, index):
            steps.append((index, op, _function(op)))
    blobs = dict(workspace)
    for index, op, function in steps:
        with naming(op, index):
            outputs = function(*(_blob(blobs, name) for name in op.input))
        blobs.update(zip(op.output, outputs, strict=True))
    return blobs


def _blob(blobs: dict[str, Array], name: str) -> Array:
    if name not in blobs:
        raise GroupNormError(f"there is no blob {name!r}: neither the workspace nor an operator before this one gives "
                             "it; add it to the workspace")  # fmt: skip
    return blobs[name]


def _function(op: Any) -> Callable[..., list[Array]]:
    """What computes the operator's outputs from its inputs."""
    if op.type == "Sum":
        if len(op.output) != 1 or not op.input:
            raise OptionError(f"Sum must have inputs and 1 output: got {len(op.input)} and {len(op.output)}")
        return _sum
    if op.type == "ConstantFill":
        return _constant_fill(op)
    if op.type not in ("GroupNorm", "GroupNormGradient"):
        raise OptionError("only GroupNorm, GroupNormGradient, Sum and ConstantFill run here; run the rest of the net "
                          "elsewhere, and put its results into the workspace")  # fmt: skip
    operator = operator_from_definition(op)
    written = [name for name in op.output if name]
    if len(set(written)) < len(written) or set(written) & set(op.input):
        raise OptionError(f"{op.type} cannot write over an input or write twice to one blob: got inputs "
                          f"{list(op.input)}, outputs {list(op.output)}; name other outputs")  # fmt: skip
    return operator


def _sum(*inputs: Array) -> list[Array]:
    first, *others = (check_array(f"input {number}", value, FLOAT32) for number, value in enumerate(inputs))
    for number, array in enumerate(others, 1):
        if array.shape != first.shape:
            raise ShapeError(f"the inputs must have one shape: got {first.shape} and, as input {number}, "
                             f"{array.shape}")  # fmt: skip
        first = first + array
    return [np.array(first)]


def _constant_fill(op: Any) -> Callable[..., list[Array]]:
    """The one form that occurs as the start of a gradient: an array of the input's shape, filled with `value`."""
    others = sorted({held.name for held in op.arg} - {"value"})
    if len(op.input) != 1 or len(op.output) != 1 or others:
        raise OptionError("ConstantFill must have 1 input, 1 output and no argument but value: got "
                          f"{len(op.input)}, {len(op.output)} and {', '.join(others) or 'no other'}; "
                          "put the constant into the workspace")  # fmt: skip
    value = argument(op, "value", "f", 0.0)
    return lambda like: [np.full(check_array("the input", like, FLOAT32).shape, value, np.float32)]
