"""ONNX Runtime and OpenVINO: inference of GroupNormalization as opset 21 defines it, channels first."""

from typing import Any

import numpy as np

from groupnorm.bench.ready import Ready, Unsupported
from groupnorm.bench.work import Work

__all__ = ["prepare_onnxruntime", "prepare_openvino"]


def prepare_onnxruntime(work: Work) -> Ready:
    """A session on a model of one or three nodes, with input and output bound to memory that exists."""
    import onnxruntime as ort

    _check(work)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = work.threads, 1, 3
    # Its workers spin on after a run; on two cores that made the next contestant's barrier wait 30 ms for a time slice.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(_onnx_model(work), options, providers=["CPUExecutionProvider"])
    y = np.empty_like(work.x)
    binding = session.io_binding()
    source, target = ort.OrtValue.ortvalue_from_numpy(work.x), ort.OrtValue.ortvalue_from_numpy(y)
    binding.bind_ortvalue_input("x", source)
    binding.bind_ortvalue_output("y", target)
    return Ready(lambda: session.run_with_iobinding(binding), lambda _: (target.numpy(),))


def prepare_openvino(work: Work) -> Ready:
    """A compiled model of the operation GroupNormalization-12, with input and output bound to memory that exists."""
    import openvino as ov
    from openvino import opset14 as ops

    _check(work)
    parameter = ops.parameter(list(work.case.shape), work.x.dtype.type, name="x")
    node = ops.group_normalization(parameter, ops.constant(work.weight), ops.constant(work.bias), work.case.num_groups,
                                   work.case.eps)  # fmt: skip
    if work.activation == "silu":
        node = ops.multiply(node, ops.sigmoid(node))  # which it fuses to a Swish
    elif work.activation == "relu":
        node = ops.relu(node)
    precision = {"float16": "f16"}.get(work.dtype, "f32")
    config = {"INFERENCE_NUM_THREADS": work.threads, "INFERENCE_PRECISION_HINT": precision}
    request = ov.Core().compile_model(ov.Model([node], [parameter], "group_norm"), "CPU", config).create_infer_request()
    y = np.empty_like(work.x)
    request.set_input_tensor(ov.Tensor(work.x, shared_memory=True))
    request.set_output_tensor(ov.Tensor(y, shared_memory=True))
    return Ready(request.infer, lambda _: (y,))


def _check(work: Work) -> None:
    if work.direction == "backward":
        raise Unsupported("inference only")
    if work.layout != "NCHW":
        raise Unsupported("the operator is defined for channels first")
    if work.dtype not in ("float32", "float16"):
        raise Unsupported(f"no {work.dtype} on the CPU")
    if work.activation not in (None, "relu", "silu"):
        raise Unsupported(f"no {work.activation} in this rival")


def _onnx_model(work: Work) -> bytes:
    """y = act(GroupNormalization(x)); SiLU is the two nodes Sigmoid and Mul, which ONNX Runtime fuses."""
    from onnx import TensorProto, helper, numpy_helper

    kind = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}[work.dtype]
    normed = "y" if work.activation is None else "z"
    nodes = [helper.make_node("GroupNormalization", ["x", "weight", "bias"], [normed], epsilon=work.case.eps,
                              num_groups=work.case.num_groups)]  # fmt: skip
    if work.activation == "relu":
        nodes.append(helper.make_node("Relu", ["z"], ["y"]))
    elif work.activation == "silu":
        nodes += [helper.make_node("Sigmoid", ["z"], ["s"]), helper.make_node("Mul", ["z", "s"], ["y"])]
    parameters: list[Any] = [numpy_helper.from_array(work.weight, "weight"), numpy_helper.from_array(work.bias, "bias")]
    x, y = (helper.make_tensor_value_info(name, kind, list(work.case.shape)) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "group_norm", [x], [y], parameters)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    found: bytes = model.SerializeToString()
    return found
