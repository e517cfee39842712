"""Forward and backward of the operator for one storage order, as functions; the engine of the package computes them.

They take float32, as the operator does, or float64; all arrays of a call have one type, which is that of the results.
Shapes, with S for any spatial axes: X, dY, dX (N, C, *S) for nchw and (N, *S, C) for nhwc, rank 2 and up; gamma, beta
of any rank with C elements; mu, rsig (N, G). Errors: ShapeError, DtypeError, OptionError.
"""

from typing import Any

from groupnorm.caffe2.checks import (
    FLOATS,
    check_array,
    check_epsilon,
    check_group,
    check_inputs,
    check_shape,
)
from groupnorm.numpy import group_norm, group_norm_backward

__all__ = [
    "backward",
    "forward",
    "group_norm_backward_nchw",
    "group_norm_backward_nhwc",
    "group_norm_forward_nchw",
    "group_norm_forward_nhwc",
]

Array = Any


def group_norm_forward_nchw(
    X: Array, gamma: Array, beta: Array, group: int, epsilon: float = 1e-5
) -> tuple[Array, Array, Array]:
    """Y, mu and rsig for channels on axis 1: Y = (X - mu)*rsig*gamma + beta, rsig = 1/sqrt(var + epsilon).

    mu and var are taken over the channels of a group and all positions, var divided by their number. Cost: X is read
    once and Y written once where a group fits in cache. Source: Caffe2's GroupNormForwardNCHW; equations (1) to (6) of
    `groupnorm.reference`.
    """
    return forward(X, gamma, beta, group, epsilon, "NCHW", FLOATS)


def group_norm_forward_nhwc(
    X: Array, gamma: Array, beta: Array, group: int, epsilon: float = 1e-5
) -> tuple[Array, Array, Array]:
    """Y, mu and rsig as `group_norm_forward_nchw` gives them, for channels on the last axis."""
    return forward(X, gamma, beta, group, epsilon, "NHWC", FLOATS)


def group_norm_backward_nchw(
    dY: Array, X: Array, gamma: Array, beta: Array, mu: Array, rsig: Array, group: int
) -> tuple[Array, Array, Array]:
    """dX, dgamma and dbeta for channels on axis 1, from dY, the gradient of Y, and forward's mu and rsig.

    dgamma and dbeta have the shapes of gamma and beta. beta is used for its shape only. mu and rsig carry no gradient
    themselves. Computed on centred data, not from the sums of dY*X that Caffe2 forms (`compute_internal_gradients`).
    Cost: X and dY are read once and dX written once where a group fits in cache. Source: equations (9) to (14) of
    `groupnorm.reference`.
    """
    return backward(dY, X, gamma, beta, mu, rsig, group, "NCHW", FLOATS)


def group_norm_backward_nhwc(
    dY: Array, X: Array, gamma: Array, beta: Array, mu: Array, rsig: Array, group: int
) -> tuple[Array, Array, Array]:
    """dX, dgamma and dbeta as `group_norm_backward_nchw` gives them, for channels on the last axis."""
    return backward(dY, X, gamma, beta, mu, rsig, group, "NHWC", FLOATS)


def forward(
    X: Array, gamma: Array, beta: Array, group: int, epsilon: float, order: str, dtypes: tuple[str, ...]
) -> tuple[Array, Array, Array]:
    """Y, mu and rsig for either order and the types that are allowed. epsilon is rounded to float32, as Caffe2 holds
    it, for float64 too.
    """
    group, epsilon = check_group(group), check_epsilon(epsilon)
    X, gamma, beta = check_inputs(X, gamma, beta, group, order, dtypes)
    Y, mu, rsig = group_norm(
        X, group, gamma.reshape(-1), beta.reshape(-1), eps=epsilon, layout=order, return_stats=True
    )
    return Y, mu, rsig


def backward(
    dY: Array, X: Array, gamma: Array, beta: Array, mu: Array, rsig: Array, group: int, order: str,
    dtypes: tuple[str, ...],
) -> tuple[Array, Array, Array]:  # fmt: skip
    """dX, dgamma and dbeta for either order and the types that are allowed."""
    group = check_group(group)
    X, gamma, beta = check_inputs(X, gamma, beta, group, order, dtypes)
    same = (X.dtype.name,)
    dY, mu, rsig = check_array("dY", dY, same), check_array("mu", mu, same), check_array("rsig", rsig, same)
    check_shape("dY", dY, X.shape, "X's shape")
    check_shape("mu", mu, (X.shape[0], group), "(N, group)")
    check_shape("rsig", rsig, (X.shape[0], group), "(N, group)")
    dX, dgamma, dbeta = group_norm_backward(
        dY, X, group, gamma.reshape(-1), beta.reshape(-1), mean=mu, rstd=rsig, layout=order
    )
    assert dgamma is not None
    assert dbeta is not None
    return dX, dgamma.reshape(gamma.shape), dbeta.reshape(beta.shape)
