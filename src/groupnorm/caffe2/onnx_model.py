"""A net of GroupNorm operators as an ONNX model, with GroupNormalization of opset 21."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from operator import index
from typing import Any

import numpy as np

from groupnorm._version import __version__
from groupnorm.caffe2.checks import FLOAT32, check_array
from groupnorm.caffe2.definition import group_norm_operators, naming
from groupnorm.caffe2.operators import GroupNormOp
from groupnorm.caffe2.proto import as_message
from groupnorm.errors import GroupNormError, OptionError, ShapeError

__all__ = ["to_onnx"]

Array = Any
Shape = tuple[int | str | None, ...]

_FIRST_OPSET = 21  # the first with a scale and bias for each channel; opset 18 has them for each group
_RANK = 4  # of an X whose shape is not given


def to_onnx(
    net: Any, *, shapes: Mapping[str, Sequence[int | str | None]] | None = None,
    constants: Mapping[str, Array] | None = None, opset: int = 21,
) -> Any:  # fmt: skip
    """An onnx.ModelProto that computes what the net's GroupNorm operators compute, in float32.

    net: a NetDef of GroupNorm operators. shapes: the shapes of inputs, numbers or names for a dimension; an X that is
    not listed has rank 4 with symbolic dimensions, gamma and beta rank 1. constants: arrays of gammas and betas, which
    become part of the model; it may be a whole workspace, other blobs stay inputs. opset: 21 or later.

    Channels last gets a Transpose before and after. Y, mean and inv_std keep the names of their blobs; mean and inv_std
    are computed, in two passes, where somebody reads them. The model's outputs are the net's external_output, or what
    no operator reads where the net names none.

    Raises OptionError for an operator that is not GroupNorm (gradients have no ONNX operator), a blob written twice, or
    an opset that is too old; ShapeError for shapes that do not fit; GroupNormError for an output that the net does not
    have, or where onnx is not installed. Source: ONNX operator GroupNormalization, version 21. A runtime without a
    kernel for it runs the function that ONNX gives, which takes the variance as E[x^2] - E[x]^2 in float32.
    """
    try:
        import onnx
        from onnx import helper
    except ImportError as error:
        raise GroupNormError("to_onnx needs onnx, which is not installed: pip install 'onnx>=1.17'") from error
    newest = onnx.defs.onnx_opset_version()
    if opset not in range(_FIRST_OPSET, newest + 1):
        raise OptionError(f"opset must be {_FIRST_OPSET} to {newest}: got {opset!r}; before {_FIRST_OPSET} "
                          "GroupNormalization has no scale for each channel")  # fmt: skip
    net = as_message("NetDef", net)
    operators = _operators(net)
    outputs = _outputs(net)
    graph = _Graph(
        helper, dict(constants or {}), {blob: _sizes(blob, shape) for blob, shape in (shapes or {}).items()},
        {blob for op in net.op for blob in (*op.input, *op.output)},
    )  # fmt: skip
    needed = {*outputs, *(blob for op in net.op for blob in op.input)}
    for place, (op, operator) in enumerate(zip(net.op, operators, strict=True)):
        with naming(op, place):
            _add(graph, op, operator, needed)
    unknown = sorted(set(graph.shapes) - set(graph.dims))
    if unknown:
        raise OptionError(f"shapes names {', '.join(unknown)}, which the net does not read; name its inputs")
    order = {blob: place for place, blob in enumerate(net.external_input)}
    inputs = sorted(graph.inputs, key=lambda blob: order.get(blob, len(order)))
    made = helper.make_graph(
        graph.nodes, net.name or "net", [graph.value(blob) for blob in inputs], [graph.value(b) for b in outputs],
        initializer=[onnx.numpy_helper.from_array(array, blob) for blob, array in graph.initializers.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(made, opset_imports=opsets, producer_name="groupnorm", producer_version=__version__,
                              ir_version=helper.find_min_ir_version_for(opsets))  # fmt: skip
    onnx.checker.check_model(model, full_check=True)
    return model


@dataclass(slots=True)
class _Graph:
    """The graph as it grows. dims: shape of every blob so far; taken: names that stand for something already."""

    helper: Any
    constants: dict[str, Array]
    shapes: dict[str, Shape]
    taken: set[str]
    nodes: list[Any] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    initializers: dict[str, Array] = field(default_factory=dict)
    dims: dict[str, Shape] = field(default_factory=dict)

    def add(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Append a node with one output, which is returned."""
        self.nodes.append(self.helper.make_node(kind, inputs, [output], **attributes))
        return output

    def fresh(self, name: str) -> str:
        """A name like this one that nothing has yet."""
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def constant(self, name: str, values: Any, dtype: Any) -> str:
        name = self.fresh(name)
        self.initializers[name] = np.asarray(values, dtype)
        return name

    def value(self, blob: str) -> Any:
        return self.helper.make_tensor_value_info(blob, 1, self.dims[blob])  # 1 is FLOAT

    def read(self, blob: str, rank: int) -> None:
        """See to it that the blob exists: computed before, or an input of the model."""
        if blob not in self.dims:
            shape = self.shapes.get(blob)
            self.dims[blob] = tuple(f"{blob}_{i}" for i in range(rank)) if shape is None else shape
            self.inputs.append(blob)

    def read_parameter(self, blob: str) -> str:
        """A gamma or beta as the (C,) that ONNX wants: constant, computed before, or an input of the model."""
        if blob in self.constants and blob not in self.dims:
            array = check_array(f"constant {blob!r}", self.constants[blob], FLOAT32)
            self.initializers[blob], self.dims[blob] = array.reshape(-1).astype(np.float32), (array.size,)
        self.read(blob, 1)
        if len(self.dims[blob]) == 1:
            return blob
        flat = self.constant(f"{blob}/flat_shape", [-1], np.int64)
        return self.add("Reshape", [blob, flat], self.fresh(f"{blob}/flat"))


def _sizes(blob: str, shape: Iterable[Any]) -> tuple[Any, ...]:
    """A shape as ONNX has it: whole numbers, and names or None for what is not known."""
    try:
        return tuple(size if size is None or isinstance(size, str) else index(size) for size in shape)
    except TypeError as error:
        raise ShapeError(f"the shape of {blob!r} must be whole numbers, names or None: got {shape!r}") from error


def _add(graph: _Graph, op: Any, operator: GroupNormOp, needed: set[str]) -> None:
    """The nodes of one operator."""
    X, gamma, beta = op.input
    Y = op.output[0]
    graph.read(X, _RANK)
    scale, bias = graph.read_parameter(gamma), graph.read_parameter(beta)
    dims = graph.dims[X]
    rank = len(dims)
    if rank < 2:
        raise ShapeError(f"X must have a batch and a channel axis: got the shape {dims} for {X!r}")
    C = dims[1 if operator.order == "NCHW" else rank - 1]
    if isinstance(C, int) and C % operator.group:
        raise ShapeError(f"group must divide the channels: got group = {operator.group} and {C} channels of {X!r}")
    for blob in (gamma, beta):
        sizes = [size for size in graph.dims[blob] if isinstance(size, int)]
        if isinstance(C, int) and len(sizes) == len(graph.dims[blob]) and prod(sizes) != C:
            raise ShapeError(f"{blob!r} must have one element for each of the {C} channels of {X!r}: got the shape "
                             f"{graph.dims[blob]}")  # fmt: skip
    channels_last = operator.order == "NHWC" and rank > 2  # at rank 2 both orders are the same
    x = X
    if channels_last:
        x = graph.add("Transpose", [X], graph.fresh(f"{Y}/nchw"), perm=[0, rank - 1, *range(1, rank - 1)])
    y = graph.fresh(f"{Y}/nchw_normalized") if channels_last else Y
    graph.add("GroupNormalization", [x, scale, bias], y, num_groups=operator.group, epsilon=operator.epsilon,
              stash_type=1)  # fmt: skip
    if channels_last:
        graph.add("Transpose", [y], Y, perm=[0, *range(2, rank), 1])
    graph.dims[Y] = dims
    for blob in op.output[1:]:
        graph.dims[blob] = (dims[0], operator.group)
    if needed.intersection(op.output[1:]):
        _add_statistics(graph, x, op.output[1], op.output[2], operator)


def _add_statistics(graph: _Graph, x: str, mean: str, inv_std: str, operator: GroupNormOp) -> None:
    """mean and inv_std = 1/sqrt(E[(x - mean)^2] + epsilon), (N, G), from x with channels on axis 1."""

    def step(kind: str, *inputs: str, **attributes: Any) -> str:
        return graph.add(kind, inputs, graph.fresh(f"{mean}/{kind.lower()}"), **attributes)

    axis = graph.constant(f"{mean}/axis", [2], np.int64)
    groups = step("Reshape", x, graph.constant(f"{mean}/groups", [0, operator.group, -1], np.int64))  # (N, G, D*S)
    average = step("ReduceMean", groups, axis, keepdims=1)
    centred = step("Sub", groups, average)
    variance = step("ReduceMean", step("Mul", centred, centred), axis, keepdims=0)
    epsilon = graph.constant(f"{mean}/epsilon", operator.epsilon, np.float32)
    graph.add("Squeeze", [average, axis], mean)
    graph.add("Reciprocal", [step("Sqrt", step("Add", variance, epsilon))], inv_std)


def _operators(net: Any) -> list[GroupNormOp]:
    operators = group_norm_operators(
        net, "only GroupNorm is exported; gradients have no ONNX operator: export the net without them, and the rest "
        "of the net elsewhere",
    )  # fmt: skip
    if not operators:
        raise OptionError("the net has no operators: there is nothing to export")
    return operators


def _outputs(net: Any) -> list[str]:
    written = list(dict.fromkeys(blob for op in net.op for blob in op.output))
    if not net.external_output:
        read = {blob for op in net.op for blob in op.input}
        return [blob for blob in written if blob not in read]
    for blob in net.external_output:
        if blob not in written:
            raise GroupNormError(f"external_output names {blob!r}, which no operator writes; it may be one of "
                                 f"{', '.join(written)}")  # fmt: skip
    return list(dict.fromkeys(net.external_output))
