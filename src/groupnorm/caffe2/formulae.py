"""The sums and coefficients that Caffe2's operator forms inside, by its formulae, in NumPy.

They are here to be compared with, and for code that was written around them; the operators do not use them. ds is a sum
over raw X, and dgamma is the difference ds - db*mu: where |mean|/std of X is large, both terms are that much larger
than what remains, and so many digits are lost. The operators go through the engine, which works on X - mu.

float32 or float64, all arrays of a call of one type; sums are made in float64 and rounded once, to that type.
"""

from typing import Any

import numpy as np

from groupnorm.caffe2.checks import FLOATS, channel_axis, check_array, check_order, check_shape
from groupnorm.errors import ShapeError

__all__ = ["compute_fused_params", "compute_internal_gradients", "gamma_beta_backward"]

Array = Any


def compute_internal_gradients(dY: Array, X: Array, order: str = "NCHW") -> tuple[Array, Array]:
    """ds and db, (N, C) each: ds[n,c] = sum over positions of dY*X, db[n,c] = sum over positions of dY.

    dY, X: one shape, channels where `order` says. ds loses digits where |mean|/std of X is large. Cost: both arrays
    are copied to float64. Source: Caffe2's ComputeInternalGradients.
    """
    order = check_order(order)
    X = check_array("X", X, FLOATS)
    dY = check_array("dY", dY, (X.dtype.name,))
    check_shape("dY", dY, X.shape, "X's shape")
    axis = channel_axis(X, order)
    others = tuple(i for i in range(1, X.ndim) if i != axis)
    d = dY.astype(np.float64)
    return (d * X).sum(others).astype(X.dtype), d.sum(others).astype(X.dtype)


def compute_fused_params(gamma: Array, beta: Array, mu: Array, rsig: Array) -> tuple[Array, Array]:
    """scale and bias, (N, C) each, with Y = X*scale + bias: scale = gamma*rsig, bias = beta - scale*mu.

    gamma, beta: C elements. mu, rsig: (N, G), where G divides C. Where |mean|/std of X is large, so is |bias|, and
    X*scale + bias loses that many digits. Source: Caffe2's ComputeFusedParams.
    """
    gamma = check_array("gamma", gamma, FLOATS).reshape(-1)
    same = (gamma.dtype.name,)
    beta = check_array("beta", beta, same).reshape(-1)
    check_shape("beta", beta, gamma.shape, "gamma's number of elements")
    mu, rsig = _of_channels(mu, rsig, gamma.size, same)
    scale = gamma.astype(np.float64) * rsig
    return scale.astype(gamma.dtype), (beta - scale * mu).astype(gamma.dtype)


def gamma_beta_backward(ds: Array, db: Array, mu: Array, rsig: Array) -> tuple[Array, Array]:
    """dgamma and dbeta, (C,) each: dgamma = sum_n (ds - db*mu)*rsig, dbeta = sum_n db.

    ds, db: (N, C), from `compute_internal_gradients`. mu, rsig: (N, G), where G divides C. The difference ds - db*mu
    loses digits where |mean|/std of X is large. Source: Caffe2's GammaBetaBackward.
    """
    ds = check_array("ds", ds, FLOATS)
    same = (ds.dtype.name,)
    db = check_array("db", db, same)
    if ds.ndim != 2:
        raise ShapeError(f"ds must have the shape (N, C): got {ds.shape}; compute_internal_gradients gives it")
    check_shape("db", db, ds.shape, "ds's shape")
    mu, rsig = _of_channels(mu, rsig, ds.shape[1], same)
    if len(mu) != len(ds):
        raise ShapeError(f"mu and rsig must have a row for each of the {len(ds)} rows of ds: got {len(mu)}")
    dgamma = ((ds - db.astype(np.float64) * mu) * rsig).sum(0)
    return dgamma.astype(ds.dtype), db.astype(np.float64).sum(0).astype(ds.dtype)


def _of_channels(mu: Any, rsig: Any, C: int, dtypes: tuple[str, ...]) -> tuple[Array, Array]:
    """mu and rsig in float64, each group's value repeated for its channels: (N, C)."""
    mu, rsig = check_array("mu", mu, dtypes), check_array("rsig", rsig, dtypes)
    check_shape("rsig", rsig, mu.shape, "mu's shape")
    if mu.ndim != 2 or mu.shape[1] < 1 or C % mu.shape[1]:
        raise ShapeError(f"mu must have the shape (N, G) where G divides the {C} channels: got {mu.shape}")
    D = C // mu.shape[1]
    return np.repeat(mu.astype(np.float64), D, 1), np.repeat(rsig.astype(np.float64), D, 1)
