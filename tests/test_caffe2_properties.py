"""The three properties by which Caffe2 tested its operator: the same shapes, data, epsilons and thresholds."""

import os

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from groupnorm import caffe2, reference

F = np.float32

many = settings(deadline=None, max_examples=100, derandomize="CI" in os.environ)
orders = st.sampled_from(["NCHW", "NHWC"])
seeds = st.integers(0, 2**32 - 1)


def upto(largest, smallest=1):
    return st.integers(smallest, largest)


def check_forward(n, g, d, spatial, eps, order, seed):
    """All three outputs beside the reference in float64, threshold 5e-3; X = randn + 1."""
    rng = np.random.default_rng(seed)
    c = g * d
    shape = (n, c, *spatial) if order == "NCHW" else (n, *spatial, c)
    x = (rng.standard_normal(shape) + 1.0).astype(F)
    gamma, beta = rng.standard_normal((2, c)).astype(F)
    op = caffe2.GroupNormOp(group=g, epsilon=eps, order=order, is_test=False, num_outputs=3)
    wanted = reference.group_norm(x, g, gamma, beta, eps=eps, layout=order)
    for got, right in zip(op(x, gamma, beta), wanted, strict=True):
        assert got.shape == right.shape
        np.testing.assert_allclose(got, right, atol=5e-3, rtol=5e-3)


@many
@given(upto(5), upto(5), upto(5), upto(5, 2), upto(5, 2), st.floats(1e-5, 1e-4), orders, seeds)
def test_group_norm_2d(n, g, d, h, w, eps, order, seed):
    check_forward(n, g, d, (h, w), eps, order, seed)


@many
@given(upto(5), upto(3), upto(3, 2), upto(4, 2), upto(4, 2), upto(4, 2), st.floats(1e-5, 1e-4), orders, seeds)
def test_group_norm_3d(n, g, d, t, h, w, eps, order, seed):
    check_forward(n, g, d, (t, h, w), eps, order, seed)


@settings(many, max_examples=50)
@given(upto(5), upto(5), upto(5, 2), upto(5, 2), orders, seeds)
def test_group_norm_grad(n, g, h, w, order, seed):
    """The gradients of sum(Y^2)/2, for which dY = Y, beside central differences of step 0.05, to 0.005 in each element;
    X holds 0, 1, 2, ... in any order.
    """
    rng = np.random.default_rng(seed)
    c = 2 * g
    shape = (n, c, h, w) if order == "NCHW" else (n, h, w, c)
    x = rng.permutation(np.arange(n * c * h * w)).astype(F).reshape(shape)
    gamma, beta = rng.standard_normal((2, c)).astype(F)
    inputs = [x, gamma, beta]
    op = caffe2.GroupNormOp(group=g, order=order, is_test=False, num_outputs=3)
    y, mean, inv_std = op(*inputs)
    grads = caffe2.GroupNormGradientOp(group=g, order=order)(y, *inputs, mean, inv_std)
    for array, grad in zip(inputs, grads, strict=True):
        estimate = np.empty(array.size)
        flat = array.reshape(-1)  # a view: what is moved in it is moved in the input
        for i in range(array.size):
            value = flat[i]
            losses = []
            for moved in (value + F(0.05), value - F(0.05)):
                flat[i] = moved
                losses.append(np.sum(np.square(op(*inputs)[0], dtype=np.float64)) / 2)
            flat[i] = value
            estimate[i] = (losses[0] - losses[1]) / 0.1
        assert grad.shape == array.shape
        assert np.isclose(grad.reshape(-1), estimate, atol=0.005, rtol=0.005).all()
