"""The contract of an engine, part 3: bits, constants, where NaN goes, and values near the ends of a type."""

import math
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest

import groupnorm as gn
from contract import DTYPES, ENGINES, Case, Drawn, Engine, check_backward, check_forward, draw, layouts, to_layout
from groupnorm import reference

pytestmark = [pytest.mark.parametrize("engine", ENGINES, ids=str), layouts]
Array = Any


@pytest.fixture
def threads() -> Iterator[Any]:
    before = gn.get_num_threads()
    yield gn.set_num_threads
    gn.set_num_threads(before)


# ---- bits ------------------------------------------------------------------------------------------------------------

BITS = [  # shape, groups: many groups, one huge group, few large ones, an odd number of pieces, one channel beyond 2^18
    ((5, 64, 31, 29), 8),
    ((1, 8, 128, 130), 1),
    ((3, 8, 90, 91), 2),
    ((2, 34, 70, 71), 1),
    ((1, 1, 530, 500), 1),
    ((1, 96, 40, 41), 2),
]


def everything(engine: Engine, drawn: Drawn, samples: slice = slice(None)) -> list[Array]:
    options = dict(drawn.options)
    for name in ("scale", "shift", "residual", "mask"):
        if options.get(name) is not None:
            options[name] = options[name][samples]
    x, dy = drawn.x[samples], drawn.dy[samples]
    y, mean, rstd = engine.group_norm(x, drawn.case.groups, **options, return_stats=True)
    return [y, mean, rstd, *(g for g in engine.vjp(dy, x, drawn.case.groups, **options) if g is not None)]


def differing(first: list[Array], second: list[Array]) -> list[int]:
    return [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a.tobytes() != b.tobytes()]


@pytest.mark.parametrize(("shape", "groups"), BITS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_bits_do_not_depend_on_threads_or_batch(
    engine: Engine, layout: str, dtype: str, shape: tuple[int, ...], groups: int, threads: Any
) -> None:
    if engine.name == "reference":
        pytest.skip("the specification has no threads")
    drawn = draw(Case(shape, groups, dtype, layout, loc=2.0))
    threads(1)
    first = everything(engine, drawn)
    for number in (2, 3, 1, 2, 7):
        threads(number)
        assert not differing(first, everything(engine, drawn)), f"{number} threads"
    for n in range(shape[0] if shape[0] > 1 else 0):
        alone = everything(engine, drawn, slice(n, n + 1))
        for i in range(4):  # y, mean, rstd and dx; gradients of parameters are sums over the batch
            assert alone[i].tobytes() == first[i][n : n + 1].tobytes(), f"sample {n} alone, result {i}"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bits_where_slabs_are_narrow(
    engine: Engine, layout: str, dtype: str, threads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many channels go together depends on caches and threads; which of them are summed again must not."""
    if engine.name != "cpu":
        pytest.skip("other engines have no slabs")
    planning, front = import_module("groupnorm._engines.cpu.plan"), import_module("groupnorm.numpy")
    drawn = draw(Case((4, 256, 19, 20), 16, dtype, layout))
    np.moveaxis(drawn.x, drawn.axis, -1)[:, 0, 0, 1::33] += 1e4  # an outlier in the first row: a pivot off its mean
    caches, found = planning.CACHES, []
    for share in (caches.l3, 1 << 17, 1 << 15, 1 << 14):
        monkeypatch.setattr(planning, "CACHES", caches._replace(l2=min(share, caches.l2), l3=share))
        for number in (1, 2, 4):
            threads(number)
            monkeypatch.setattr(front, "_calls", {})
            found.append(everything(engine, drawn))
    assert not any(differing(found[0], other) for other in found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", [(2, 24, 35, 33), (2, 32, 32, 4)], ids=str)
def test_bits_by_every_way_of_writing(
    engine: Engine, layout: str, dtype: str, shape: tuple[int, ...], threads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the cache, past it, or with lines fetched ahead, whatever this processor would be given."""
    if engine.name != "cpu":
        pytest.skip("other engines write in one way")
    planning, front = import_module("groupnorm._engines.cpu.plan"), import_module("groupnorm.numpy")
    drawn, caches, found = draw(Case(shape, 8, dtype, layout)), planning.CACHES, []
    threads(2)
    ways = {planning.THROUGH: (1 << 30, 1 << 30), planning.PAST: (1, 1), planning.FETCHED: (1, 1 << 30)}
    for way, (l2, l3) in ways.items():
        monkeypatch.setattr(planning, "CACHES", caches._replace(l2=l2, l3=l3))
        monkeypatch.setattr(planning, "_SLOW_L3", way == planning.FETCHED)
        monkeypatch.setattr(front, "_calls", {})
        found.append(everything(engine, drawn))
        used = {plan.way for _, plan, _ in front._calls.values()}
        assert way in used, f"{used} without {way}"
    assert not any(differing(found[0], other) for other in found)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bits_of_backward_by_either_road(engine: Engine, layout: str, dtype: str, threads: Any) -> None:
    """With an activation, whose slope depends on the last bit of the mean, without given statistics."""
    if engine.name == "reference":
        pytest.skip("the specification has no roads")
    drawn = draw(Case((1, 8, 128, 130), 1, dtype, layout, activation="silu", loc=50.0))
    threads(1)
    first = everything(engine, drawn)
    for number in (2, 3):
        threads(number)
        assert not differing(first, everything(engine, drawn)), f"{number} threads"


def test_bits_with_every_option(engine: Engine, layout: str, threads: Any) -> None:
    """Also when the groups are of different sizes and the masks of different samples are not alike."""
    case = Case((3, 20, 61, 67), 3, layout=layout, scale="float32", shift="float32", residual=True, mask=True,
                uneven=True, activation="silu")  # fmt: skip
    drawn = draw(case)
    threads(1)
    first = everything(engine, drawn)
    for number in (2, 3):
        threads(number)
        assert not differing(first, everything(engine, drawn)), f"{number} threads"
    alone = everything(engine, drawn, slice(1, 2))
    assert all(alone[i].tobytes() == first[i][1:2].tobytes() for i in range(4))


# ---- constants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4, 6e4, 1e-8])
@pytest.mark.parametrize(("shape", "groups"), [((2, 12, 13, 11), 4), ((1, 6, 130, 129), 1), ((3, 5), 1)], ids=str)
def test_constant_group(
    engine: Engine, layout: str, dtype: str, value: float, shape: tuple[int, ...], groups: int
) -> None:
    """Deviations from the mean of equal numbers are zero, not nearly zero: y is the bias."""
    drawn = draw(Case(shape, groups, dtype, layout, bias=dtype))
    x = np.full_like(drawn.x, value)
    y, mean, rstd = engine.group_norm(x, groups, **drawn.options, return_stats=True)
    bias = drawn.options["bias"][:, None]
    moved = np.moveaxis(y, drawn.axis, 1).reshape(shape[0], shape[1], -1)
    assert np.array_equal(moved.astype(np.float64), np.broadcast_to(bias, moved.shape).astype(np.float64))
    assert (mean == x.flat[0].astype(mean.dtype)).all()
    np.testing.assert_allclose(rstd, 1e-5**-0.5, rtol=1e-6)
    assert (engine.moments(x, groups, layout=layout).m2 == 0).all()
    got = engine.vjp(drawn.dy, x, groups, **drawn.options)
    assert (np.asarray(got.dweight, np.float64) == 0).all()


@pytest.mark.parametrize("value", [1e15, 1e300, 0.1])
def test_constant_group_in_float64(engine: Engine, layout: str, value: float) -> None:
    x = to_layout(np.full((2, 6, 37, 5), value), layout)
    assert (engine.group_norm(x, 2, layout=layout) == 0).all()


def test_constant_channels_of_different_values(engine: Engine, layout: str) -> None:
    """Dead channels: each constant, of another size, which is all the variance that the group has."""
    values = np.array([0.0, 1e-3, 5.0, -40.0, 300.0, 300.5, 1e4, 1.0], np.float32)
    x = to_layout(np.broadcast_to(values[None, :, None, None], (2, 8, 19, 17)).copy(), layout)
    want = reference.group_norm(x, 2, layout=layout)[0]
    np.testing.assert_allclose(engine.group_norm(x, 2, layout=layout), want, rtol=2e-6, atol=2e-6)


def test_one_dead_channel(engine: Engine, layout: str) -> None:
    case = Case((2, 12, 19, 17), 3, layout=layout)
    drawn = draw(case)
    np.moveaxis(drawn.x, drawn.axis, 1)[:, 5] = 1e4
    check_forward(engine, drawn)
    check_backward(engine, drawn)


@pytest.mark.parametrize("outlier", [1e3, 1e5, -1e6])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_outlier_in_the_first_place(engine: Engine, layout: str, dtype: str, outlier: float) -> None:
    """Who takes the first element for a typical one loses the others."""
    drawn = draw(Case((2, 12, 40, 41), 3, dtype, layout))
    np.moveaxis(drawn.x, drawn.axis, 1)[:, ::4, 0, 0] = outlier
    check_forward(engine, drawn)
    np.moveaxis(drawn.x, drawn.axis, 1)[:, ::4, 0] = outlier
    check_forward(engine, drawn)


@pytest.mark.parametrize("shape", [(4, 64, 33, 17), (2, 32, 96, 96)])
def test_float64_moments_are_as_good_as_its_roundings(engine: Engine, layout: str, shape: tuple[int, ...]) -> None:
    """No wider type takes up its sums, so a pivot beside the mean would cost digits; against exact sums."""
    drawn = draw(Case(shape, 32, "float64", layout))
    _, _, rstd = engine.group_norm(drawn.x, 32, layout=layout, eps=0.0, return_stats=True)
    for found, group in zip(np.ravel(rstd), drawn.cube(drawn.x).reshape(shape[0] * 32, -1), strict=True):
        mean = math.fsum(group) / group.size
        exact = 1 / math.sqrt(math.fsum((group - mean) ** 2) / group.size)
        assert abs(found / exact - 1) <= 6 * 2.0**-53


def test_a_step_in_the_middle(engine: Engine, layout: str) -> None:
    """A mean that jumps between pieces: a pivot taken from what came before is far from what follows."""
    drawn = draw(Case((1, 4, 150, 151), 1, layout=layout))
    np.moveaxis(drawn.x, drawn.axis, 1)[:, :, 70:] += np.float32(1e4)
    check_forward(engine, drawn)
    check_backward(engine, drawn)


# ---- where NaN and infinity go ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups", "uneven"), [((2, 12, 13, 11), 4, False), ((2, 33, 7, 5), 4, True)], ids=str
)
def test_nan_stays_in_its_group(
    engine: Engine, layout: str, dtype: str, value: float, shape: tuple[int, ...], groups: int, uneven: bool
) -> None:
    drawn = draw(Case(shape, groups, dtype, layout, uneven=uneven))
    clean = everything(engine, drawn)
    np.moveaxis(drawn.x, drawn.axis, 1)[1, shape[1] // groups, 2, 3] = value
    outside = np.ones(shape[:2], bool)
    outside[1, shape[1] // groups : 2 * (shape[1] // groups)] = False
    with np.errstate(invalid="ignore"):
        dirty = everything(engine, drawn)
    y, dx = (np.moveaxis(dirty[i], drawn.axis, 1) for i in (0, 3))
    for got, before in ((y, clean[0]), (dx, clean[3])):
        assert np.array_equal(got[outside], np.moveaxis(before, drawn.axis, 1)[outside])
    assert np.isnan(y[~outside].astype(np.float64)).all() or (
        np.isinf(value) and np.isnan(y[~outside].astype(np.float64)).any()
    )
    assert np.isfinite(np.delete(dirty[1].ravel(), groups + 1)).all()


def test_nan_is_not_lost(engine: Engine, layout: str) -> None:
    """A NaN in x is in y and dx, also after an activation that cuts off; one in dy is in dx."""
    drawn = draw(Case((2, 12, 9, 11), 3, layout=layout, activation="relu"))
    dy = drawn.dy.copy()
    dy[0, 1, 1, 1] = np.nan
    x = drawn.x + 100  # so that relu lets everything through
    options = drawn.options | {"weight": None, "bias": np.full(12, 10, np.float32)}
    assert np.isnan(engine.vjp(dy, x, 3, **options).dx).any()
    drawn.x[0, 1, 1, 1] = np.nan
    assert np.isnan(engine.group_norm(drawn.x, 3, **drawn.options)).any()
    assert np.isnan(engine.vjp(drawn.dy, drawn.x, 3, **drawn.options).dx).any()


# ---- values near the ends of a type ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "std", "eps"),
    [
        ("float32", 1e18, 1e-5),
        ("float32", 1e30, 1e-5),
        ("float32", 3e37, 1e-5),
        ("float32", 1e-20, 0.0),
        ("float32", 1e-20, 1e-12),
        ("float32", 1e-20, 1e-40),
        ("float32", 1e-3, 1e-12),
        ("float16", 1e4, 1e-5),
        ("float16", 1e-3, 1e-12),
        ("bfloat16", 1e36, 1e-5),
        ("bfloat16", 1e-30, 0.0),
        ("float64", 1e100, 1e-5),
        ("float64", 1e-100, 0.0),
    ],
)
@pytest.mark.parametrize(("shape", "groups"), [((2, 12, 9, 11), 3), ((1, 8, 100, 101), 1)], ids=str)
def test_huge_and_tiny_values(
    engine: Engine, layout: str, dtype: str, std: float, eps: float, shape: tuple[int, ...], groups: int
) -> None:
    drawn = draw(Case(shape, groups, dtype, layout, std=std, eps=eps))
    check_forward(engine, drawn)
    (x, g), options = drawn.forward
    got = engine.vjp(drawn.dy, x, g, **options)
    want = reference.group_norm_vjp(drawn.dy, x, g, **options)
    for name in ("dweight", "dbias"):
        w = getattr(want, name)
        rtol = 1e-5 if dtype == "float32" else 1e-4
        np.testing.assert_allclose(getattr(got, name), w, rtol=rtol, atol=rtol * np.abs(w).max())
    largest = np.abs(want.dx).max()
    if 1e-30 < largest < np.finfo(np.float32).max / 2 and dtype in {"float32", "float64"}:
        np.testing.assert_allclose(got.dx, want.dx, rtol=1e-5, atol=1e-5 * largest)


def test_small_noise_on_a_large_mean(engine: Engine, layout: str) -> None:
    """1e4 + 1e-3*noise: the mean of squares less the square of the mean has no correct digit."""
    for dtype, noise in (("float32", 1e-2), ("float64", 1e-3)):
        drawn = draw(Case((2, 12, 15, 17), 3, dtype, layout, std=noise, loc=1e4 / noise))
        check_forward(engine, drawn)
        check_backward(engine, drawn)
