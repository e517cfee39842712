"""Caffe2's GroupNorm and its gradient as operators on arrays: values, shapes, rules, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from groupnorm import DtypeError, OptionError, ShapeError, caffe2, reference

SOURCE = str(Path(__file__).resolve().parents[1] / "src")
F = np.float32

# One sample, two channels of two positions, one group, epsilon 4. By hand: the mean of 1, 3, 5, 7 is 4, the variance
# (9 + 1 + 1 + 9)/4 = 5, so rsig = 1/sqrt(5 + 4) = 1/3 and xhat = -1, -1/3, 1/3, 1.
X = np.array([[[1, 3], [5, 7]]], F)
GAMMA, BETA = np.array([3, 6], F), np.array([1, -1], F)
Y = [[[3 * -1 + 1, 3 * -1 / 3 + 1], [6 / 3 - 1, 6 - 1]]]  # = -2, 0, 1, 5
MU, RSIG = np.array([[4]], F), np.array([[1 / 3]], F)
# ds = (1*1 + 0*3, 0*5 + 2*7) = (1, 14), db = (1, 2). dgamma = (ds - db*4)/3 = (-1, 2), dbeta = db.
# Sds = 3*1 + 6*14 = 87, Sdb = 3*1 + 6*2 = 15, X_scale = (15*4 - 87)/27/4 = -1/4, bias = 4/4 - 15/3/4 = -1/4, and
# dX = gamma/3*dY - X/4 - 1/4 = (1 - 1/4 - 1/4, -3/4 - 1/4), (-5/4 - 1/4, 4 - 7/4 - 1/4).
DY = np.array([[[1, 0], [0, 2]]], F)
DS, DB = [[1, 14]], [[1, 2]]
DX, DGAMMA, DBETA = [[[0.5, -1], [-1.5, 2]]], [-1, 2], [1, 2]


def close(got, wanted):
    assert got.shape == np.shape(wanted)
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def random(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, F)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["NCHW", "NHWC", "nchw", "nhwc"])
def test_forward_by_hand(order):
    def back(array):
        return array.swapaxes(1, 2) if order.lower() == "nhwc" else array

    op = caffe2.GroupNormOp(group=1, epsilon=4.0, order=order, is_test=False, num_outputs=3)
    y, mean, inv_std = op(back(X), GAMMA, BETA)
    close(back(y), Y)
    close(mean, MU)
    close(inv_std, RSIG)  # the inverse, 1/3, and not the standard deviation, 3
    [alone] = caffe2.GroupNormOp(group=1, epsilon=4.0, order=order)(back(X), GAMMA, BETA)
    assert np.array_equal(alone, y)


@pytest.mark.parametrize("order", ["NCHW", "NHWC"])
def test_gradient_by_hand(order):
    def back(array):
        return array.swapaxes(1, 2) if order == "NHWC" else array

    dx, dgamma, dbeta = caffe2.GroupNormGradientOp(group=1, order=order)(back(DY), back(X), GAMMA, BETA, MU, RSIG)
    close(back(dx), DX)
    close(dgamma, DGAMMA)
    close(dbeta, DBETA)


def test_internal_formulae_by_hand():
    ds, db = caffe2.compute_internal_gradients(DY, X)
    close(ds, DS)
    close(db, DB)
    for got, wanted in zip(caffe2.gamma_beta_backward(ds, db, MU, RSIG), (DGAMMA, DBETA), strict=True):
        close(got, wanted)
    scale, bias = caffe2.compute_fused_params(GAMMA, BETA, MU, RSIG)
    close(scale, [[1, 2]])  # gamma/3
    close(bias, [[1 - 4, -1 - 8]])  # beta - scale*4
    close(X * scale[:, :, None] + bias[:, :, None], Y)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", ["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", [(3, 6), (2, 6, 5), (2, 6, 3, 4), (2, 6, 2, 3, 4)])
def test_functions_are_the_reference_and_the_formulae(shape, order, dtype):
    tolerance = {"rtol": 0, "atol": 3e-5 if dtype == np.float32 else 1e-11}
    x, dy = np.moveaxis(random((2, *shape)), 2, 2 if order == "NCHW" else -1).astype(dtype) + 2
    gamma, beta = random((2, 6), 1).astype(dtype)
    layout = order.lower()
    y, mu, rsig = getattr(caffe2, f"group_norm_forward_{layout}")(x, gamma, beta, 3, 1e-3)
    grads = getattr(caffe2, f"group_norm_backward_{layout}")(dy, x, gamma, beta, mu, rsig, 3)
    assert {a.dtype for a in (y, mu, rsig, *grads)} == {np.dtype(dtype)}
    epsilon = float(F(1e-3))  # Caffe2 holds it so
    for got, wanted in zip(
        (y, mu, rsig), reference.group_norm(x, 3, gamma, beta, eps=epsilon, layout=order), strict=True
    ):
        np.testing.assert_allclose(got, wanted, **tolerance)
    wanted = reference.group_norm_backward(dy, x, 3, gamma, beta, eps=epsilon, layout=order)
    for got, right in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(got, right, **tolerance)

    scale, bias = caffe2.compute_fused_params(gamma, beta, mu, rsig)
    axes = (..., *(None,) * (x.ndim - 2)) if order == "NCHW" else (slice(None), *(None,) * (x.ndim - 2))
    np.testing.assert_allclose(x * scale[axes] + bias[axes], y, **tolerance)
    ds, db = caffe2.compute_internal_gradients(dy, x, order)
    assert ds.shape == db.shape == (shape[0], 6)
    for got, right in zip(caffe2.gamma_beta_backward(ds, db, mu, rsig), wanted[1:], strict=True):
        np.testing.assert_allclose(got, right, **tolerance)


def test_a_large_mean_costs_the_operator_nothing():
    x, dy = random((2, 2, 8, 16, 16))
    x += F(1000)
    gamma, beta = random((2, 8), 1)
    _, mu, rsig = caffe2.GroupNormOp(group=2, num_outputs=3)(x, gamma, beta)
    wanted = reference.group_norm_backward(dy, x, 2, gamma, beta, eps=float(F(1e-5)))
    for got, right in zip(caffe2.GroupNormGradientOp(group=2)(dy, x, gamma, beta, mu, rsig), wanted, strict=True):
        assert np.linalg.norm(got - right) < 1e-6 * np.linalg.norm(right)


# ---- rules -----------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_caffe2():
    op = caffe2.GroupNormOp()
    assert (op.group, op.order, op.is_test, op.num_outputs) == (32, "NCHW", True, 1)
    assert op.epsilon == float(F(1e-5)) != 1e-5
    assert caffe2.GroupNormGradientOp() == caffe2.GroupNormGradientOp(group=32, order="NCHW")
    x = random((2, 64, 3))
    _, mean, _ = caffe2.GroupNormOp(num_outputs=3)(x, np.ones(64, F), np.zeros(64, F))
    assert mean.shape == (2, 32)
    np.testing.assert_allclose(mean, x.reshape(2, 32, 6).mean(2), atol=1e-6)


@pytest.mark.parametrize(
    ("is_test", "outputs", "allowed"),
    [(True, 1, True), (True, 3, True), (False, 3, True), (False, 1, False), (True, 2, False), (False, 2, False),
     (True, 0, False), (True, 4, False)],
)  # fmt: skip
def test_how_many_outputs(is_test, outputs, allowed):
    if allowed:
        got = caffe2.GroupNormOp(group=1, is_test=is_test, num_outputs=outputs)(X, GAMMA, BETA)
        assert isinstance(got, list)
        assert len(got) == outputs
    else:
        with pytest.raises(OptionError, match=r"is_test=0 must have 3|1 output \(Y\) or 3"):
            caffe2.GroupNormOp(group=1, is_test=is_test, num_outputs=outputs)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (1, 6, 1, 1), (2, 3)])
def test_gamma_and_beta_of_any_rank(shape):
    x, dy = random((2, 2, 6, 4))
    gamma, beta = random((2, 6), 1)
    forward = caffe2.GroupNormOp(group=3, num_outputs=3)
    wanted = forward(x, gamma, beta)
    got = forward(x, gamma.reshape(shape), beta[:, None])
    assert all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))
    op = caffe2.GroupNormGradientOp(group=3)
    dx, dgamma, dbeta = op(dy, x, gamma.reshape(shape), beta[:, None], *got[1:])
    assert (dgamma.shape, dbeta.shape) == (shape, (6, 1))  # each like its parameter, as in Caffe2
    for a, b in zip((dx, dgamma, dbeta), op(dy, x, gamma, beta, *got[1:]), strict=True):
        assert np.array_equal(a.ravel(), b.ravel())


@pytest.mark.parametrize("order", ["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (2, 4, 0, 3), (0, 4)])
def test_nothing_to_do(shape, order):
    x = np.moveaxis(np.empty(shape, F), 1, 1 if order == "NCHW" else -1)
    gamma = beta = np.ones(4, F)
    y, mean, inv_std = caffe2.GroupNormOp(group=2, order=order, num_outputs=3)(x, gamma, beta)
    assert (y.shape, y.dtype, mean.dtype) == (x.shape, F, F)
    assert np.array_equal(mean, np.zeros((shape[0], 2)))
    np.testing.assert_allclose(inv_std, np.full((shape[0], 2), 1e-5**-0.5), rtol=1e-6)
    dx, dgamma, dbeta = caffe2.GroupNormGradientOp(group=2, order=order)(x, x, gamma, beta, mean, inv_std)
    assert dx.shape == x.shape
    assert np.array_equal([dgamma, dbeta], np.zeros((2, 4)))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 0}, "group must be a whole number, at least 1: got 0"),
        ({"group": -2}, "got -2"),
        ({"group": 2.0}, r"got 2\.0"),
        ({"group": True}, "got True"),
        ({"group": "2"}, "got '2'"),
        ({"epsilon": -1e-5}, "epsilon must be a finite float32"),
        ({"epsilon": float("nan")}, "got nan"),
        ({"epsilon": 1e39}, "got 1e"),
        ({"epsilon": "small"}, "got 'small'"),
        ({"order": "NCWH"}, 'order must be "NCHW" or "NHWC": got \'NCWH\''),
        ({"order": "NDHWC"}, "got 'NDHWC'"),
        ({"order": 1}, "got 1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(OptionError, match=message):
        caffe2.GroupNormOp(**options)
    if "epsilon" not in options:
        with pytest.raises(OptionError, match=message):
            caffe2.GroupNormGradientOp(**options)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, bool, object])
@pytest.mark.parametrize("which", range(6))
def test_only_float32(which, dtype):
    arrays = [DY, X, GAMMA, BETA, MU, RSIG]
    arrays[which] = arrays[which].astype(dtype)
    name = ["dY", "X", "gamma", "beta", "mu", "rsig"][which]
    with pytest.raises(DtypeError, match=rf"{name} must be float32: got {np.dtype(dtype)}.*{name}\.astype"):
        caffe2.GroupNormGradientOp(group=1)(*arrays)
    if name in {"X", "gamma", "beta"}:
        with pytest.raises(DtypeError, match=f"{name} must be float32"):
            caffe2.GroupNormOp(group=1)(*arrays[1:4])


def test_other_byte_order_and_lists():
    swapped = caffe2.GroupNormOp(group=1, epsilon=4.0)(X.astype(">f4"), GAMMA.astype(">f4"), BETA)
    close(swapped[0], Y)
    with pytest.raises(DtypeError, match="X must be float32: got float64"):
        caffe2.GroupNormOp(group=1)(X.tolist(), GAMMA, BETA)
    with pytest.raises(DtypeError, match="X must be an array of numbers: got list"):
        caffe2.GroupNormOp(group=1)([[1.0], [1.0, 2.0]], GAMMA, BETA)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": np.ones(4, F)}, "X must have a batch and a channel axis"),
        ({"X": np.float32(1)}, "X must have a batch and a channel axis"),
        ({"X": np.ones((1, 3, 2), F)}, "gamma must have one element for each of the 3 channels"),
        ({"gamma": np.ones(3, F)}, "gamma must have one element for each of the 2 channels"),
        ({"beta": np.ones((2, 2), F)}, "beta must have one element for each of the 2 channels"),
        ({"X": np.ones((1, 0, 2), F), "gamma": np.ones(0, F), "beta": np.ones(0, F)}, "at least one channel"),
    ],
)
def test_shapes_are_checked(arrays, message):
    x, gamma, beta = ({"X": X, "gamma": GAMMA, "beta": BETA} | arrays).values()
    with pytest.raises(ShapeError, match=message):
        caffe2.GroupNormOp(group=1)(x, gamma, beta)
    with pytest.raises(ShapeError, match=message):
        caffe2.GroupNormGradientOp(group=1)(x, x, gamma, beta, MU, RSIG)


def test_group_must_divide_the_channels():
    x, gamma = np.ones((2, 48, 4), F), np.ones(48, F)
    with pytest.raises(ShapeError, match="group must divide the channels: got group = 32 and 48 channels; 1, 2, 3, 4"):
        caffe2.GroupNormOp()(x, gamma, gamma)
    with pytest.raises(ShapeError, match="got group = 5 and 48 channels"):
        caffe2.group_norm_forward_nchw(x, gamma, gamma, 5)
    with pytest.raises(ShapeError, match="got group = 3 and 4 channels"):  # of the last axis
        caffe2.GroupNormOp(3, order="NHWC")(np.ones((2, 6, 4), F), gamma[:4], gamma[:4])


@pytest.mark.parametrize(
    ("which", "array", "message"),
    [
        (0, np.ones((1, 2, 3), F), r"dY must have the shape X's shape = \(1, 2, 2\): got \(1, 2, 3\)"),
        (4, np.ones((1, 2), F), r"mu must have the shape \(N, group\) = \(1, 1\): got \(1, 2\)"),
        (5, np.ones(1, F), r"rsig must have the shape \(N, group\) = \(1, 1\): got \(1,\)"),
    ],
)
def test_shapes_of_the_gradient_are_checked(which, array, message):
    arrays = [DY, X, GAMMA, BETA, MU, RSIG]
    arrays[which] = array
    with pytest.raises(ShapeError, match=message):
        caffe2.GroupNormGradientOp(group=1)(*arrays)


def test_formulae_check_their_arguments():
    with pytest.raises(ShapeError, match="dY must have the shape X's shape"):
        caffe2.compute_internal_gradients(DY[:, :1], X)
    with pytest.raises(DtypeError, match="dY must be float32: got float64"):
        caffe2.compute_internal_gradients(DY.astype(float), X)
    with pytest.raises(DtypeError, match="X must be float32 or float64: got int64"):
        caffe2.compute_internal_gradients(DY, X.astype(np.int64))
    with pytest.raises(OptionError, match="order must be"):
        caffe2.compute_internal_gradients(DY, X, "NC")
    with pytest.raises(ShapeError, match="G divides the 2 channels"):
        caffe2.compute_fused_params(GAMMA, BETA, np.ones((1, 3), F), np.ones((1, 3), F))
    with pytest.raises(ShapeError, match="rsig must have the shape mu's shape"):
        caffe2.compute_fused_params(GAMMA, BETA, MU, RSIG[0])
    with pytest.raises(ShapeError, match="beta must have the shape"):
        caffe2.compute_fused_params(GAMMA, BETA[:1], MU, RSIG)
    with pytest.raises(ShapeError, match=r"ds must have the shape \(N, C\)"):
        caffe2.gamma_beta_backward(np.ones(2, F), np.ones(2, F), MU, RSIG)
    with pytest.raises(ShapeError, match="mu and rsig must have a row for each of the 2 rows of ds"):
        caffe2.gamma_beta_backward(np.ones((2, 2), F), np.ones((2, 2), F), MU, RSIG)


# ---- what an import loads --------------------------------------------------------------------------------------------


def test_operators_need_no_protobuf():
    program = (
        "import sys; sys.modules['google'] = sys.modules['google.protobuf'] = sys.modules['onnx'] = None\n"
        "import numpy as np; from groupnorm import GroupNormError, caffe2\n"
        "print(caffe2.GroupNormOp(1)(np.ones((1, 2, 2), 'f4'), np.ones(2, 'f4'), np.ones(2, 'f4'))[0].tolist())\n"
        "try: caffe2.NetDef()\n"
        "except GroupNormError as error: print(error)\n"
    )
    environment = os.environ | {"PYTHONPATH": SOURCE}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    values, message = run.stdout.splitlines()
    assert values == "[[[1.0, 1.0], [1.0, 1.0]]]"
    assert "pip install 'protobuf>=4.25'" in message


def test_public_names_are_documented():
    for name in caffe2.__all__:
        assert len(getattr(caffe2, name).__doc__.strip()) > 20
    with pytest.raises(AttributeError, match="no attribute 'NetDeaf'"):
        caffe2.NetDeaf  # noqa: B018
