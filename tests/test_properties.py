"""What holds for group normalization of any data: invariances, independence, merging, and gradients by differences.

The last section follows the three checks of Caffe2's tests of its operator: small shapes of two and three spatial axes
in both orders with all three outputs, and each gradient of sum(y^2)/2 by central differences.
"""

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import groupnorm as gn
from groupnorm import reference

Array = Any
ENGINES = ("reference", "cpu")
U = 2.0**-53

few = settings(
    deadline=None,
    max_examples=20,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
engines = pytest.mark.parametrize("engine", ENGINES)


@st.composite
def problems(draw: st.DrawFn, smallest: int = 2, largest_axis: int = 9) -> dict[str, Any]:
    """x and what belongs to it, in float64, with a layout; the groups hold at least `smallest` elements."""
    n, g, d = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    spatial = draw(st.lists(st.integers(1, largest_axis), max_size=3))
    layout = draw(st.sampled_from(["NCHW", "NHWC"]))
    assume(d * int(np.prod(spatial)) >= smallest)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (n, g * d, *spatial) if layout == "NCHW" else (n, *spatial, g * d)
    mean, std = draw(st.floats(-100, 100)), draw(st.floats(0.01, 100))
    x = mean + std * rng.standard_normal(shape)
    weight, bias = rng.standard_normal((2, g * d))
    return {
        "x": x,
        "groups": g,
        "layout": layout,
        "weight": weight,
        "bias": bias,
        "rng": rng,
        "axis": 1 if layout == "NCHW" else -1,
    }


def grouped(p: dict[str, Any], array: Array) -> Array:
    """(N, G, M) of an array of x's shape."""
    moved = np.moveaxis(array, p["axis"], 1)
    return moved.reshape(len(moved), p["groups"], -1)


def normalized(p: dict[str, Any], engine: str, x: Array, eps: float = 0.0, **more: Any) -> Array:
    return gn.group_norm(x, p["groups"], eps=eps, layout=p["layout"], impl=engine, **more)


def tolerance(x: Array, p: dict[str, Any]) -> float:
    """Rounding of float64 after it is magnified by |mean|/std of the worst group."""
    e = grouped(p, x)
    return 100 * U * float(np.max(1 + np.abs(e.mean(2)) / np.maximum(e.std(2), 1e-300)))


# ---- invariances -----------------------------------------------------------------------------------------------------


@engines
@few
@given(problems(), st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_shift_and_scale_do_not_matter(engine: str, p: dict[str, Any], shift: float, scale: float) -> None:
    x = p["x"]
    y = normalized(p, engine, x)
    moved = x * scale + shift
    bound = tolerance(moved, p) + tolerance(x, p)
    assume(bound < 1e-6)
    np.testing.assert_allclose(normalized(p, engine, moved), y, atol=bound * 10, rtol=bound * 10)
    np.testing.assert_allclose(normalized(p, engine, -x), -y, atol=bound * 10, rtol=bound * 10)


@engines
@few
@given(problems())
def test_power_of_two_changes_no_bit(engine: str, p: dict[str, Any]) -> None:
    y = normalized(p, engine, p["x"])
    assert np.array_equal(normalized(p, engine, p["x"] * 0.25), y)


@engines
@few
@given(problems())
def test_mean_is_zero_and_variance_is_one(engine: str, p: dict[str, Any]) -> None:
    e = grouped(p, normalized(p, engine, p["x"]))
    bound = tolerance(p["x"], p) * 10
    assert np.abs(e.mean(2)).max() < bound
    assert np.abs(e.var(2) - 1).max() < bound


@engines
@few
@given(problems())
def test_order_inside_a_group_does_not_matter(engine: str, p: dict[str, Any]) -> None:
    """Positions and the channels of a group may be permuted: y is permuted alike."""
    x = np.moveaxis(p["x"], p["axis"], 1)
    n, c = x.shape[:2]
    cube = x.reshape(n, c, -1)
    positions = p["rng"].permutation(cube.shape[2])
    channels = np.concatenate(
        [block[p["rng"].permutation(len(block))] for block in np.split(np.arange(c), p["groups"])]
    )

    def turned(a: Array) -> Array:
        flat = np.moveaxis(a, p["axis"], 1).reshape(n, c, -1)[:, channels][:, :, positions]
        return np.moveaxis(flat.reshape(x.shape), 1, p["axis"])

    bound = tolerance(p["x"], p) * 10
    np.testing.assert_allclose(
        normalized(p, engine, turned(p["x"])), turned(normalized(p, engine, p["x"])), atol=bound, rtol=bound
    )


@engines
@few
@given(problems(), st.data())
def test_groups_do_not_know_each_other(engine: str, p: dict[str, Any], data: st.DataObject) -> None:
    """What is in one group changes no bit of another, forward or backward."""
    n, g = data.draw(st.integers(0, len(p["x"]) - 1)), data.draw(st.integers(0, p["groups"] - 1))
    options = {"weight": p["weight"], "bias": p["bias"], "activation": "tanh"}
    dy = p["rng"].standard_normal(p["x"].shape)
    other, other_dy = p["x"].copy(), dy.copy()
    for array in (other, other_dy):
        moved = np.moveaxis(array, p["axis"], 1)
        d = moved.shape[1] // p["groups"]
        moved[n, g * d : (g + 1) * d] *= -7.5

    def results(x: Array, dy: Array) -> list[Array]:
        dx = gn.group_norm_vjp(dy, x, p["groups"], layout=p["layout"], impl=engine, **options).dx
        return [grouped(p, a) for a in (normalized(p, engine, x, 1e-5, **options), dx)]

    for a, b in zip(results(p["x"], dy), results(other, other_dy), strict=True):
        same = np.ones(a.shape[:2], bool)
        same[n, g] = False
        assert np.array_equal(a[same], b[same])


# ---- moments ---------------------------------------------------------------------------------------------------------


@few
@given(problems(largest_axis=12), st.data())
def test_merged_pieces_are_the_whole(p: dict[str, Any], data: st.DataObject) -> None:
    x = np.moveaxis(p["x"], p["axis"], 1)
    cube = np.ascontiguousarray(x.reshape(*x.shape[:2], -1))
    cuts = sorted(data.draw(st.lists(st.integers(0, cube.shape[2]), max_size=5)))
    pieces = [gn.moments(piece, p["groups"]) for piece in np.split(cube, cuts, 2)]
    whole = gn.moments(cube, p["groups"])
    shuffled = [pieces[i] for i in p["rng"].permutation(len(pieces))]
    for merged in (gn.merge_moments(pieces), gn.merge_moments(shuffled)):
        assert np.array_equal(merged.count, whole.count)
        bound = tolerance(p["x"], p)
        np.testing.assert_allclose(merged.mean, whole.mean, atol=bound * np.sqrt(whole.var).max())
        np.testing.assert_allclose(merged.m2, whole.m2, rtol=bound * 100)


@few
@given(problems(), st.integers(0, 2**32 - 1))
def test_merging_is_associative_and_has_a_neutral_element(p: dict[str, Any], seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, c = (
        gn.Moments(rng.integers(0, 50, (2, 3)), 1e3 + rng.standard_normal((2, 3)), rng.uniform(0, 9, (2, 3)))
        for _ in range(3)
    )
    left, right, turned = (a + b) + c, a + (b + c), c + (a + b)
    for other in (right, turned):
        assert np.array_equal(left.count, other.count)
        some = left.count > 0
        np.testing.assert_allclose(left.mean[some], other.mean[some], rtol=1e-14)
        np.testing.assert_allclose(left.m2[some], other.m2[some], rtol=1e-11)
    nothing = gn.Moments(np.zeros((2, 3)), np.full((2, 3), 7.0), np.zeros((2, 3)))
    for same in (a + nothing, nothing + a):
        assert np.array_equal(same.count, a.count)
        some = a.count > 0
        assert np.array_equal(same.mean[some], a.mean[some])
        assert np.array_equal(same.m2[some], a.m2[some])


# ---- backward --------------------------------------------------------------------------------------------------------


@engines
@few
@given(problems(), st.floats(-3, 3), st.floats(-3, 3))
def test_backward_is_linear_in_dy(engine: str, p: dict[str, Any], a: float, b: float) -> None:
    d1, d2 = p["rng"].standard_normal((2, *p["x"].shape))
    options = {"weight": p["weight"], "bias": p["bias"], "layout": p["layout"], "activation": "gelu", "impl": engine}
    g1, g2, both = (gn.group_norm_vjp(dy, p["x"], p["groups"], **options) for dy in (d1, d2, a * d1 + b * d2))
    for name in ("dx", "dweight", "dbias"):
        x1, x2, x = (getattr(g, name) for g in (g1, g2, both))
        size = np.abs(x1).max() + np.abs(x2).max()
        np.testing.assert_allclose(x, a * x1 + b * x2, atol=1e-10 * size + 1e-13)


@engines
@few
@given(problems(smallest=3))
def test_dx_is_orthogonal_to_ones_and_xhat(engine: str, p: dict[str, Any]) -> None:
    """Neither a shift nor a scale of a group changes y (eps = 0), so dx has no part along them."""
    dy = p["rng"].standard_normal(p["x"].shape)
    got = gn.group_norm_vjp(dy, p["x"], p["groups"], p["weight"], layout=p["layout"], eps=0.0, impl=engine)
    dx, xhat = grouped(p, got.dx), grouped(p, normalized(p, engine, p["x"]))
    std = grouped(p, p["x"]).std(2)
    size = (np.abs(grouped(p, dy)).sum(2) * np.abs(p["weight"]).max() + 1e-9) / std
    bound = tolerance(p["x"], p) * 10
    assert (np.abs(dx.sum(2)) <= bound * size).all()
    assert (np.abs((dx * xhat).sum(2)) <= bound * size * np.abs(xhat).max()).all()


def difference(function: Any, at: Array, step: float) -> Array:
    """Central differences of a scalar function, one element after the other."""
    result = np.empty_like(at)
    for i in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[i] += step
        down[i] -= step
        result[i] = (function(up) - function(down)) / (2 * step)
    return result


@engines
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("activation", [None, "gelu", "tanh"])
def test_every_gradient_by_differences(engine: str, layout: str, activation: str | None) -> None:
    rng = np.random.default_rng(3)
    n, c, spatial = 2, 5, (3, 2)
    shape = (n, c, *spatial) if layout == "NCHW" else (n, *spatial, c)
    arrays = {"x": 2 + rng.standard_normal(shape), "weight": rng.standard_normal(c), "bias": rng.standard_normal(c)}
    if activation is None:  # the others are only another kernel each
        arrays |= {"scale": rng.standard_normal((n, c)), "shift": rng.standard_normal((n, c)),
                   "residual": rng.standard_normal(shape)}  # fmt: skip
    options = {"layout": layout, "activation": activation, "uneven": True, "eps": 0.1, "impl": engine}
    dy = rng.standard_normal(shape)

    def loss(**changed: Array) -> float:
        a = arrays | changed
        return float((gn.group_norm(a["x"], 2, **{k: v for k, v in a.items() if k != "x"}, **options) * dy).sum())

    got = gn.group_norm_vjp(dy, arrays["x"], 2, **{k: v for k, v in arrays.items() if k != "x"}, **options)
    for name, value in arrays.items():
        want = difference(lambda v, name=name: loss(**{name: v}), value, 1e-5)
        np.testing.assert_allclose(getattr(got, f"d{name}"), want, atol=2e-9 * max(1, np.abs(want).max()), err_msg=name)


# ---- Caffe2's three checks -------------------------------------------------------------------------------------------


@st.composite
def small_images(draw: st.DrawFn, spatial: int) -> tuple[Array, int, str, float, Array, Array]:
    n, g, d = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    sizes = [draw(st.integers(2, 5)) for _ in range(spatial)]
    order = draw(st.sampled_from(["NCHW", "NHWC"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (n, g * d, *sizes) if order == "NCHW" else (n, *sizes, g * d)
    x = (rng.standard_normal(shape) + 1).astype(np.float32)
    gamma, beta = rng.standard_normal((2, g * d)).astype(np.float32)
    return x, g, order, draw(st.floats(1e-5, 1e-4)), gamma, beta


@engines
@pytest.mark.parametrize("spatial", [2, 3])
@few
@given(st.data())
def test_all_three_outputs(engine: str, spatial: int, data: st.DataObject) -> None:
    x, groups, order, eps, gamma, beta = data.draw(small_images(spatial))
    y, mu, inv_sigma = gn.group_norm(x, groups, gamma, beta, eps=eps, layout=order, return_stats=True, impl=engine)
    e = np.moveaxis(x, 1 if order == "NCHW" else -1, 1).astype(np.float64)
    e = e.reshape(len(x), groups, -1)
    mean, std = e.mean(2), np.sqrt(e.var(2) + eps)
    xhat = ((e - mean[..., None]) / std[..., None]).reshape(len(x), len(gamma), -1)
    want = xhat * gamma[:, None] + beta[:, None]
    moved = np.moveaxis(y, 1 if order == "NCHW" else -1, 1)
    np.testing.assert_allclose(moved.reshape(want.shape), want, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(mu, mean, atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(inv_sigma, 1 / std, rtol=1e-6)


@engines
@pytest.mark.parametrize("order", ["NCHW", "NHWC"])
def test_gradient_of_half_the_sum_of_squares(engine: str, order: str) -> None:
    """X is a shuffled arange, so of large variance; the loss is sum(y^2)/2, so dy = y."""
    rng = np.random.default_rng(1)
    x = rng.permutation(2 * 6 * 3 * 2).astype(np.float64).reshape((2, 6, 3, 2) if order == "NCHW" else (2, 3, 2, 6))
    gamma, beta = rng.standard_normal((2, 6))

    def loss(x: Array, gamma: Array, beta: Array) -> float:
        return float((reference.group_norm(x, 3, gamma, beta, layout=order)[0] ** 2).sum() / 2)

    y = gn.group_norm(x, 3, gamma, beta, layout=order, impl=engine)
    dx, dgamma, dbeta = gn.group_norm_backward(y, x, 3, gamma, beta, layout=order, impl=engine)
    np.testing.assert_allclose(dx, difference(lambda v: loss(v, gamma, beta), x, 1e-3), atol=1e-7)
    np.testing.assert_allclose(dgamma, difference(lambda v: loss(x, v, beta), gamma, 1e-4), atol=1e-7)
    np.testing.assert_allclose(dbeta, difference(lambda v: loss(x, gamma, v), beta, 1e-4), atol=1e-7)
