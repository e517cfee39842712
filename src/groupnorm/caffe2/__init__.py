"""Caffe2's GroupNorm operator: forward, gradient, its definitions as protobufs, nets of it, and ONNX.

    from groupnorm.caffe2 import GroupNormOp
    Y, mean, inv_std = GroupNormOp(group=32, is_test=False, num_outputs=3)(X, gamma, beta)

Caffe2's names stand for these of the package: group = num_groups, order = layout, gamma = weight, beta = bias,
mu = mean, rsig = inv_std = rstd, epsilon = eps. A table of every symbol of the operator is in docs/caffe2.md.

operators.py    the two operators              functional.py  forward and backward for one order, as functions
formulae.py     the operator's internal sums   checks.py      what the operator enforces of its arguments
proto.py        the protobuf messages          definition.py  from an operator's definition to the operator, and back
gradient.py     gradient operators of a net    run.py         a net over a dictionary of arrays
net_file.py     .pb and .pbtxt                 onnx_model.py  a net as an ONNX model

NetDef, OperatorDef, Argument, DeviceOption and TensorProto are message classes, made when they are first asked for;
they and what works on nets need protobuf, `to_onnx` needs onnx.
"""

from typing import Any

from groupnorm.caffe2.definition import IgnoredArgumentWarning, create_operator, operator_from_definition
from groupnorm.caffe2.formulae import compute_fused_params, compute_internal_gradients, gamma_beta_backward
from groupnorm.caffe2.functional import (
    group_norm_backward_nchw,
    group_norm_backward_nhwc,
    group_norm_forward_nchw,
    group_norm_forward_nhwc,
)
from groupnorm.caffe2.gradient import add_gradient_operators, get_group_norm_gradient
from groupnorm.caffe2.net_file import load_net, save_net
from groupnorm.caffe2.onnx_model import to_onnx
from groupnorm.caffe2.operators import GroupNormGradientOp, GroupNormOp
from groupnorm.caffe2.proto import MESSAGES, message_class
from groupnorm.caffe2.run import run_net

__all__ = [
    "GroupNormGradientOp",
    "GroupNormOp",
    "IgnoredArgumentWarning",
    "add_gradient_operators",
    "compute_fused_params",
    "compute_internal_gradients",
    "create_operator",
    "gamma_beta_backward",
    "get_group_norm_gradient",
    "group_norm_backward_nchw",
    "group_norm_backward_nhwc",
    "group_norm_forward_nchw",
    "group_norm_forward_nhwc",
    "load_net",
    "operator_from_definition",
    "run_net",
    "save_net",
    "to_onnx",
]


def __getattr__(name: str) -> Any:
    """The message classes: `groupnorm.caffe2.NetDef` and the others of `proto.MESSAGES`."""
    if name in MESSAGES:
        return message_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
