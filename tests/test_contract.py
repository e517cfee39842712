"""The contract of an engine, part 1: values, for every type, layout, rank and option. Budgets are in contract.py."""

from typing import Any

import numpy as np
import pytest

import groupnorm as gn
from contract import (
    DTYPES,
    ENGINES,
    LARGE_MEAN,
    LAYOUTS,
    Case,
    Engine,
    check,
    check_backward,
    check_forward,
    draw,
    layouts,
)
from groupnorm import reference

pytestmark = [
    pytest.mark.parametrize("engine", ENGINES, ids=str),
    layouts,
]
shifted = pytest.mark.parametrize("loc", [0.0, LARGE_MEAN], ids=["", "large-mean"])

RANKS = {2: (5, 12), 3: (3, 12, 17), 4: (2, 12, 7, 9), 5: (2, 6, 3, 5, 7), 6: (2, 6, 2, 3, 2, 5)}
SIZES = [  # shape, groups
    ((3, 5), 5),  # one element a group: x is its own mean
    ((4, 7, 1, 1), 7),
    ((2, 1, 1), 1),
    ((1, 1, 300), 1),
    ((3, 6, 5, 5), 1),
    ((2, 13, 11), 13),  # a group for each channel
    ((2, 9, 4, 4), 3),  # channels per group that are no power of two
    ((2, 25, 3, 7), 5),
    ((1, 22, 9, 5), 2),
    ((2, 33, 10, 3), 11),
    ((2, 96, 28, 28), 32),
    ((1, 40, 65, 33), 8),  # no multiple of the lanes in any direction
    ((1, 64, 31, 33), 4),
    ((2, 160, 17, 16), 10),
    ((1, 2, 300, 301), 1),  # few large groups: an engine may cut these
    ((1, 3, 5000), 3),
]
WITHIN_16_BIT = ("relu", "silu")
ACTIVATIONS = [
    *(("float32", activation) for activation in reference.ACTIVATIONS if activation is not None),
    *((dtype, activation) for dtype in ("float16", "bfloat16") for activation in WITHIN_16_BIT),
    *(("float64", activation) for activation in ("gelu", "tanh")),
]


@shifted
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_types_and_ranks(engine: Engine, layout: str, dtype: str, rank: int, loc: float) -> None:
    check(engine, Case(RANKS[rank], 3, dtype, layout, loc=loc))


@shifted
@pytest.mark.parametrize(("shape", "groups"), SIZES, ids=str)
def test_sizes(engine: Engine, layout: str, shape: tuple[int, ...], groups: int, loc: float) -> None:
    check(engine, Case(shape, groups, layout=layout, loc=loc))


@pytest.mark.parametrize("positions", [9, 16, 33, 100, 250, 1030])
@pytest.mark.parametrize(("channels", "groups"), [(64, 64), (32, 8)])
def test_many_draws(engine: Engine, layout: str, positions: int, channels: int, groups: int) -> None:
    """What is summed first may lie far from the mean: one draw says nothing about that, so each sample is one."""
    check_forward(engine, draw(Case((40, channels, positions), groups, layout=layout)))


@pytest.mark.parametrize("positions", [33, 600, 1030])
def test_first_elements_far_from_the_mean(engine: Engine, layout: str, positions: int) -> None:
    """Each group begins 3.9 standard deviations off: near enough that no unit is read twice for it."""
    drawn = draw(Case((20, 64, positions), 64, layout=layout, weight=None, bias=None))
    (drawn.x if layout == "NCHW" else np.moveaxis(drawn.x, -1, 1))[:, :, 0] = 3.9
    check_forward(engine, drawn)


@pytest.mark.parametrize("name", ["NC", "NCL", "NCHW", "NCDHW", "NLC", "NHWC", "NDHWC"])
def test_spellings_of_layouts(engine: Engine, layout: str, name: str) -> None:
    rank = 4 if name in LAYOUTS else len(name)
    last = name.endswith("C") and name != "NC"
    if last != (layout == "NHWC"):
        pytest.skip("the other layout's name")
    drawn = draw(Case(RANKS[rank], 3, layout=layout))
    got = engine.group_norm(drawn.x, 3, layout=name)
    assert np.array_equal(got, engine.group_norm(drawn.x, 3, layout=layout))


@shifted
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (None, None),
        ("float32", None),
        (None, "float32"),
        ("float64", "float16"),
        ("bfloat16", "float64"),
        ("float16", None),
    ],
)
def test_weight_and_bias(
    engine: Engine, layout: str, weight: str | None, bias: str | None, dtype: str, loc: float
) -> None:
    check(engine, Case((3, 20, 7, 5), 5, dtype, layout, weight=weight, bias=bias, loc=loc))


@shifted
@pytest.mark.parametrize(
    ("weight", "bias", "scale", "shift"),
    [
        ("float32", "float32", "float32", "float32"),
        ("float32", "float32", "float32", None),
        ("float32", None, None, "float32"),
        (None, None, "float16", "bfloat16"),
        (None, "bfloat16", "float64", None),
    ],
)
def test_scale_and_shift(
    engine: Engine, layout: str, weight: Any, bias: Any, scale: Any, shift: Any, loc: float
) -> None:
    case = Case((3, 20, 7, 5), 5, layout=layout, weight=weight, bias=bias, scale=scale, shift=shift, loc=loc)
    check(engine, case)
    check(engine, case.but(activation="silu"))


@shifted
@pytest.mark.parametrize(("dtype", "activation"), ACTIVATIONS)
def test_activations(engine: Engine, layout: str, dtype: str, activation: str, loc: float) -> None:
    check(engine, Case((2, 12, 9, 11), 3, dtype, layout, activation=activation, loc=loc))


@shifted
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_residual(engine: Engine, layout: str, dtype: str, activation: str | None, loc: float) -> None:
    case = Case((2, 20, 9, 7), 5, dtype, layout, residual=True, activation=activation, loc=loc)
    check(engine, case)
    check(engine, case.but(scale="float32", shift="float32"))


@shifted
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((3, 6, 41), 3), ((3, 10, 6, 7), 5), ((2, 33, 4, 3, 9), 11), ((4, 8), 2), ((2, 6, 200, 9), 1)],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_mask(engine: Engine, layout: str, dtype: str, shape: tuple[int, ...], groups: int, loc: float) -> None:
    check(engine, Case(shape, groups, dtype, layout, mask=True, loc=loc))


@shifted
@pytest.mark.parametrize("residual", [False, True])
def test_mask_with_everything(engine: Engine, layout: str, residual: bool, loc: float) -> None:
    case = Case((3, 20, 6, 7), 3, layout=layout, scale="float32", shift="float16", residual=residual, mask=True,
                uneven=True, activation="silu", loc=loc)  # fmt: skip
    check(engine, case)


def test_sample_without_a_real_position(engine: Engine, layout: str) -> None:
    drawn = draw(Case((3, 10, 6, 7), 5, layout=layout, mask=True, eps=1e-3))
    y, mean, rstd = engine.group_norm(drawn.x, 5, **drawn.options, return_stats=True)
    assert (y[-1] == 0).all()
    assert (mean[-1] == 0).all()
    np.testing.assert_allclose(rstd[-1], 1e-3**-0.5, rtol=1e-6)
    got = engine.vjp(drawn.dy, drawn.x, 5, **drawn.options)
    assert (got.dx[-1] == 0).all()
    assert np.isfinite(got.dweight).all()


@shifted
@pytest.mark.parametrize(("channels", "groups"), [(10, 3), (7, 4), (33, 2), (5, 5), (40, 9), (64, 7)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_uneven(engine: Engine, layout: str, dtype: str, channels: int, groups: int, loc: float) -> None:
    check(engine, Case((2, channels, 6, 7), groups, dtype, layout, uneven=True, loc=loc))


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-3, 10.0])
def test_eps(engine: Engine, layout: str, eps: float) -> None:
    check(engine, Case((2, 12, 9, 7), 3, layout=layout, eps=eps))
    check(engine, Case((2, 12, 9, 7), 3, "float16", layout, eps=eps))


@pytest.mark.parametrize(
    "shape", [(0, 8), (0, 8, 4, 4), (2, 8, 0), (2, 8, 3, 0), (0, 8, 0, 2), (2, 8, 0, 2, 3)], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_nothing_at_all(engine: Engine, layout: str, dtype: str, shape: tuple[int, ...]) -> None:
    drawn = draw(Case(shape, 4, dtype, layout, scale="float32", residual=True))
    y, mean, rstd = engine.group_norm(drawn.x, 4, **drawn.options, return_stats=True)
    assert (y.shape, y.dtype) == (drawn.x.shape, drawn.x.dtype)
    assert mean.shape == rstd.shape == (shape[0], 4)
    assert (mean == 0).all()
    np.testing.assert_allclose(rstd, 1e-5**-0.5, rtol=1e-6)
    got = engine.vjp(drawn.dy, drawn.x, 4, **drawn.options)
    assert got.dx.shape == got.dresidual.shape == drawn.x.shape
    assert all((getattr(got, name) == 0).all() for name in ("dweight", "dbias", "dscale"))
    out = np.empty_like(drawn.x)
    assert engine.group_norm(drawn.x, 4, layout=layout, out=out) is not None
    assert (engine.moments(drawn.x, 4, layout=layout).count == 0).all()


@shifted
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_given_to_backward(engine: Engine, layout: str, dtype: str, loc: float) -> None:
    drawn = draw(Case((2, 12, 9, 11), 3, dtype, layout, loc=loc))
    y, mean, rstd = engine.group_norm(drawn.x, 3, **drawn.options, return_stats=True)
    assert mean.dtype == rstd.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert np.array_equal(y, engine.group_norm(drawn.x, 3, **drawn.options))
    check_backward(engine, drawn, mean=mean, rstd=rstd)
    check_backward(engine, drawn, mean=mean.astype(np.float64), rstd=np.asfortranarray(rstd))


def test_statistics_of_the_callers_own(engine: Engine, layout: str) -> None:
    """Backward uses the statistics that it is given, as running or shared ones would be."""
    drawn = draw(Case((2, 12, 9, 11), 3, "float64", layout, bias="float64"))
    mean, rstd = np.full((2, 3), 0.25), np.full((2, 3), 0.5)
    got = engine.vjp(drawn.dy, drawn.x, 3, **drawn.options, mean=mean, rstd=rstd)
    want = reference.group_norm_vjp(drawn.dy, drawn.x, 3, **drawn.options, mean=mean, rstd=rstd)
    np.testing.assert_allclose(got.dbias, want.dbias, rtol=1e-12, atol=1e-12)


@shifted
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_moments(engine: Engine, layout: str, dtype: str, uneven: bool, loc: float) -> None:
    case = Case((3, 10, 6, 37), 4 if uneven else 5, dtype, layout, mask=uneven, uneven=uneven, loc=loc)
    drawn = draw(case)
    options = {"layout": layout, "mask": drawn.options.get("mask"), "uneven": uneven}
    got = engine.moments(drawn.x, case.groups, **options)
    count, mean, m2 = reference.moments(drawn.x, case.groups, **options)
    assert np.array_equal(got.count, count)
    std = np.sqrt(m2 / np.maximum(count, 1))
    u = 2.0**-53 if dtype == "float64" else 2.0**-24
    assert (np.abs(got.mean - mean) <= 4 * u * std + 4 * 2.0**-53 * np.abs(mean)).all()
    assert (np.abs(got.m2 - m2) <= 32 * u * m2).all()
    public = gn.moments(drawn.x, case.groups, **options)
    np.testing.assert_allclose(public.m2, m2, rtol=32 * u)


@shifted
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_statistics_merged_over_tiles(engine: Engine, layout: str, dtype: str, loc: float) -> None:
    """Moments of tiles of an image, merged, normalise each tile as the whole image would be."""
    drawn = draw(Case((2, 16, 40, 30), 4, dtype, layout, loc=loc))
    axis = 2 if layout == "NCHW" else 1
    tiles = np.split(drawn.x, [1, 17], axis)
    merged = gn.merge_moments([engine.moments(tile, 4, layout=layout) for tile in tiles])
    whole = engine.moments(drawn.x, 4, layout=layout)
    assert np.array_equal(merged.count, whole.count)
    u = 2.0**-53 if dtype == "float64" else 2.0**-24
    std = np.sqrt(whole.var)
    assert (np.abs(merged.mean - whole.mean) <= 8 * u * std + 8 * 2.0**-53 * np.abs(whole.mean)).all()
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=32 * u)
    if engine.name != "cpu":
        return  # normalize takes no engine
    parameters = {name: drawn.options[name] for name in ("weight", "bias", "layout")}
    pieces = [gn.normalize(tile, merged, **parameters, activation="silu") for tile in tiles]
    want = reference.group_norm(drawn.x, 4, **parameters, activation="silu")[0]
    tolerance = 8 * (u if dtype != "bfloat16" else 2.0**-9) * (1 + loc)
    np.testing.assert_allclose(
        np.concatenate(pieces, axis).astype(np.float64), want, rtol=tolerance, atol=4 * tolerance
    )


def test_forward_and_backward_of_one_call_belong_together(engine: Engine, layout: str) -> None:
    """`group_norm_backward` is the first three of `group_norm_vjp`."""
    drawn = draw(Case((2, 12, 9, 7), 3, layout=layout, scale="float32"))
    check_forward(engine, drawn)
    got = gn.group_norm_backward(drawn.dy, drawn.x, 3, **drawn.options, impl=engine.name)
    want = engine.vjp(drawn.dy, drawn.x, 3, **drawn.options)
    assert isinstance(got, tuple)
    assert all(np.array_equal(a, b) for a, b in zip(got, want[:3], strict=True))
