"""The contract of an engine, part 2: where arrays lie. Any strides, byte orders and alignments; out= and in place."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import groupnorm as gn
from contract import ENGINES, Case, Engine, check_backward, check_forward, draw, layouts, to_layout
from groupnorm import reference

pytestmark = pytest.mark.parametrize("engine", ENGINES, ids=str)
Array = Any
SHAPE = (4, 12, 6, 10)
SMALL = (4, 12, 2, 3)  # groups of few elements go other ways
shapes = pytest.mark.parametrize("shape", [SHAPE, SMALL], ids=str)


def unaligned(a: Array) -> Array:
    """The same values one byte off the alignment of their type."""
    room = np.empty(a.nbytes + 1, np.uint8)
    view = np.ndarray(a.shape, a.dtype, buffer=room, offset=1)
    view[...] = a
    return view


def inside(a: Array, *where: slice) -> Array:
    """The same values as a window of a larger array, which holds NaN around them."""
    larger = np.full(tuple(size + 3 if i < len(where) else size for i, size in enumerate(a.shape)), np.nan, a.dtype)
    window = larger[tuple(where)]
    window[...] = a
    return window


VIEWS: dict[str, Callable[[Array], Array]] = {
    "fortran order": np.asfortranarray,
    "channels last in memory": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1),
    "channels first in memory": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, -1, 1)), 1, -1),
    "slice of axis 1": lambda a: inside(a, slice(None, -3), slice(2, -1)),
    "every second sample": lambda a: np.repeat(a, 2, 0)[::2],
    "crop": lambda a: inside(a, slice(None, -3), slice(None, -3), slice(1, -2), slice(2, -1)),
    "crop of rows": lambda a: inside(a, slice(None, -3), slice(None, -3), slice(1, -2)),
    "transposed": lambda a: a.swapaxes(2, 3).copy().swapaxes(2, 3),
    "transposed middle": lambda a: a.swapaxes(1, 2).copy().swapaxes(1, 2),
    "reversed": lambda a: a[:, ::-1, ::-1].copy()[:, ::-1, ::-1],
    "reversed samples": lambda a: a[::-1].copy()[::-1],
    "every third column": lambda a: np.repeat(a, 3, 3)[..., ::3],
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "unaligned": unaligned,
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
}


@layouts
@shapes
@pytest.mark.parametrize("view", VIEWS)
def test_strides(engine: Engine, layout: str, view: str, shape: tuple[int, ...]) -> None:
    """The same values give the same results however they lie in memory, and x and dy need not lie alike."""
    drawn = draw(Case(shape, 3, layout=layout))
    make = VIEWS[view]
    seen = make(drawn.x)
    assert np.array_equal(seen, drawn.x)
    before = seen.copy()
    options = drawn.options
    y, mean, rstd = engine.group_norm(seen, 3, **options, return_stats=True)
    same = {"dtype": drawn.x.dtype.newbyteorder("=")}
    assert (y.shape, y.dtype) == (drawn.x.shape, same["dtype"])
    want, want_mean, want_rstd = reference.group_norm(drawn.x, 3, **options)
    np.testing.assert_allclose(y, want, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(mean, want_mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(rstd, want_rstd, rtol=1e-6)
    gradient = reference.group_norm_vjp(drawn.dy, drawn.x, 3, **options)
    for dy, x in ((make(drawn.dy), seen), (drawn.dy, seen), (make(drawn.dy), drawn.x)):
        got = engine.vjp(dy, x, 3, **options)
        np.testing.assert_allclose(got.dx, gradient.dx, rtol=1e-5, atol=3e-6)
        np.testing.assert_allclose(got.dweight, gradient.dweight, rtol=1e-5, atol=2e-5)
    assert np.array_equal(seen, before), "an input was written to"


@layouts
@pytest.mark.parametrize("view", ["fortran order", "crop", "transposed", "big-endian", "reversed"])
def test_strides_of_the_other_arrays(engine: Engine, layout: str, view: str) -> None:
    case = Case(SHAPE, 3, layout=layout, scale="float32", shift="float32", residual=True)
    drawn = draw(case)
    make = VIEWS[view]
    options = dict(drawn.options)
    want = engine.group_norm(drawn.x, 3, **options)
    gradient = engine.vjp(drawn.dy, drawn.x, 3, **options)
    options["residual"] = make(options["residual"])
    for name in ("scale", "shift"):
        options[name] = np.asfortranarray(options[name]).astype(options[name].dtype.newbyteorder(">"))
    options["weight"] = np.repeat(options["weight"], 2)[::2]
    options["bias"] = options["bias"][::-1].copy()[::-1]
    got = engine.group_norm(drawn.x, 3, **options)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    for g, w in zip(engine.vjp(drawn.dy, drawn.x, 3, **options), gradient, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-6, atol=1e-5)


@layouts
@shapes
def test_mask_of_any_strides(engine: Engine, layout: str, shape: tuple[int, ...]) -> None:
    drawn = draw(Case(shape, 3, layout=layout, mask=True))
    want = engine.group_norm(drawn.x, 3, **drawn.options)
    for make in (np.asfortranarray, lambda m: m[:, ::-1].copy()[:, ::-1], lambda m: np.repeat(m, 2, 2)[..., ::2]):
        options = drawn.options | {"mask": make(drawn.options["mask"])}
        assert np.array_equal(engine.group_norm(drawn.x, 3, **options), want)
        seen = drawn.x.swapaxes(1, 2).copy().swapaxes(1, 2)  # positions no longer lie in the order of the mask
        np.testing.assert_allclose(engine.group_norm(seen, 3, **options), want, rtol=1e-5, atol=1e-6)


@layouts
@shapes
@pytest.mark.parametrize("axes", [(0,), (1,), (2, 3), (0, 1, 2, 3)], ids=str)
def test_broadcast_input(engine: Engine, layout: str, axes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Steps of zero: one element in memory stands for many."""
    case = Case(shape, 3, layout=layout)
    drawn = draw(case)
    small = drawn.x[tuple(slice(0, 1) if i in axes else slice(None) for i in range(4))]
    x = np.broadcast_to(small, drawn.x.shape)
    dy = np.broadcast_to(drawn.dy[:1], drawn.x.shape)
    want = reference.group_norm(x, 3, **drawn.options)[0]
    np.testing.assert_allclose(engine.group_norm(x, 3, **drawn.options), want, rtol=1e-5, atol=1e-5)
    gradient = reference.group_norm_vjp(dy, x, 3, **drawn.options)
    got = engine.vjp(dy, x, 3, **drawn.options)
    np.testing.assert_allclose(got.dbias, gradient.dbias, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        got.dx, gradient.dx, rtol=1e-5, atol=2e-6 * np.abs(gradient.dx).max() + 2e-3 * (len(axes) > 2)
    )


@layouts
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_crop_of_other_types(engine: Engine, layout: str, dtype: str) -> None:
    """The same budget for a view as for an array of its own."""
    drawn = draw(Case(SHAPE, 3, dtype, layout))
    seen = type(drawn)(drawn.case, VIEWS["crop"](drawn.x), VIEWS["slice of axis 1"](drawn.dy), drawn.options)
    check_forward(engine, seen)
    check_backward(engine, seen)


def test_output_lies_as_the_input_does(engine: Engine) -> None:
    x = draw(Case(SHAPE, 3)).x
    last = VIEWS["channels last in memory"](x)
    assert engine.group_norm(x, 3).flags.c_contiguous
    assert engine.group_norm(last, 3).strides == last.strides
    assert engine.vjp(last, last, 3).dx.strides == last.strides


# ---- out and in place ------------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize(
    "view", ["fortran order", "crop", "reversed", "channels last in memory", "unaligned", "transposed"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_out(engine: Engine, layout: str, dtype: str, view: str) -> None:
    """`out` is filled entirely, and nothing around it."""
    drawn = draw(Case(SHAPE, 3, dtype, layout))
    if view == "reversed" and dtype == "bfloat16":
        pytest.skip("enough with float32")
    want = engine.group_norm(drawn.x, 3, **drawn.options)
    out = VIEWS[view](np.full_like(drawn.x, np.nan))
    base = out if out.base is None else out.base
    base = base.view(out.dtype) if base.dtype == np.uint8 and view != "unaligned" else base
    nothing = np.isnan(np.asarray(base, np.float64)).sum() - out.size if view == "crop" else None
    check_forward(engine, drawn, out=out)
    assert np.array_equal(np.asarray(out, np.float64), np.asarray(want, np.float64))
    if nothing is not None:
        assert np.isnan(np.asarray(base, np.float64)).sum() == nothing, "something beside out was written"


@layouts
@pytest.mark.parametrize("shape", [SHAPE, (1, 4, 300, 301), (3, 7, 5), (4, 64, 150, 110)], ids=str)
def test_in_place(engine: Engine, layout: str, shape: tuple[int, ...]) -> None:
    if engine.name == "reference" and np.prod(shape) > 1e6:
        pytest.skip("slow")
    drawn = draw(Case(shape, 1 if shape[1] % 2 else 2, layout=layout))
    (_, groups), options = drawn.forward
    want = engine.group_norm(drawn.x, groups, **options)
    x = drawn.x.copy()
    assert np.array_equal(engine.group_norm(x, groups, **options, out=x), want)


@layouts
def test_in_place_on_a_view(engine: Engine, layout: str) -> None:
    drawn = draw(Case(SHAPE, 3, layout=layout))
    want = engine.group_norm(drawn.x, 3, **drawn.options)
    for view in ("crop", "reversed", "transposed", "slice of axis 1"):
        x = VIEWS[view](drawn.x)
        got = engine.group_norm(x, 3, **drawn.options, out=x)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@layouts
def test_out_is_the_residual(engine: Engine, layout: str) -> None:
    drawn = draw(Case(SHAPE, 3, layout=layout, residual=True))
    want = engine.group_norm(drawn.x, 3, **drawn.options)
    residual = drawn.options["residual"].copy()
    options = drawn.options | {"residual": residual}
    assert np.array_equal(engine.group_norm(drawn.x, 3, **options, out=residual), want)


@layouts
def test_out_overlaps_an_input(engine: Engine, layout: str) -> None:
    """Memory shared in any other way than element by element must not show in the result."""
    drawn = draw(Case((4, 12, 6, 10), 3, layout=layout))
    for step, ahead in ((1, True), (1, False), (2, True)):
        room = np.zeros((4 + step, *drawn.x.shape[1:]), np.float32)
        x, out = (room[:-step], room[step:]) if ahead else (room[step:], room[:-step])
        x[...] = drawn.x
        want = engine.group_norm(drawn.x, 3, **drawn.options)
        np.testing.assert_allclose(engine.group_norm(x, 3, **drawn.options, out=out), want, rtol=1e-6, atol=1e-6)
    square = to_layout(draw(Case((2, 4, 9, 9), 2)).x, layout)
    axes = (0, 1, 3, 2) if layout == "NCHW" else (0, 2, 1, 3)
    want = engine.group_norm(square.copy(), 2, layout=layout)
    turned = square.transpose(axes)
    np.testing.assert_allclose(engine.group_norm(square, 2, layout=layout, out=turned), want, rtol=1e-6, atol=1e-6)


@layouts
@pytest.mark.parametrize("apart", [True, False])
def test_out_is_another_part_of_an_inputs_buffer(engine: Engine, layout: str, apart: bool) -> None:
    """Half of a buffer into the other half, or into one that reaches into it: out's strides are not those of an array
    of its own, and what is beside it must stay.
    """
    axis = 1 if layout == "NCHW" else -1
    room = draw(Case((3, 64, 6, 10), 4, layout=layout)).x
    channels = np.moveaxis(room, axis, 0)
    at = 32 if apart else 16
    first, second = (np.moveaxis(part, 0, axis) for part in (channels[: 64 - at], channels[at:]))
    kept = channels[:at].copy()
    want = engine.group_norm(first.copy(), 4, layout=layout)
    assert engine.group_norm(first, 4, layout=layout, out=second) is second
    np.testing.assert_allclose(second, want, rtol=1e-6, atol=1e-6)
    assert np.array_equal(channels[:at], kept)
    if engine.name == "cpu":
        m = gn.moments(first.copy(), 4, layout=layout)
        want = gn.normalize(first.copy(), m, layout=layout)
        assert gn.normalize(first, m, layout=layout, out=second) is second
        np.testing.assert_allclose(second, want, rtol=1e-6, atol=1e-6)


def test_out_overlaps_a_parameter(engine: Engine) -> None:
    drawn = draw(Case((2, 32, 6, 5), 4, layout="NHWC"))
    bias = drawn.x[0, 0, 0]
    want = engine.group_norm(drawn.x.copy(), 4, bias=bias.copy(), layout="NHWC")
    got = engine.group_norm(drawn.x, 4, bias=bias, layout="NHWC", out=drawn.x)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@layouts
def test_out_with_statistics_and_mask(engine: Engine, layout: str) -> None:
    drawn = draw(Case(SHAPE, 3, layout=layout, mask=True, residual=True))
    check_forward(engine, drawn, out=np.full_like(drawn.x, np.nan))


@layouts
@pytest.mark.parametrize("spatial", [(5, 5), (5, 7), (1, 7)], ids=str)
def test_mask_and_an_out_that_no_kernel_fills(engine: Engine, layout: str, spatial: tuple[int, int]) -> None:
    """x's positions in another order in memory, or an axis of length 1: the mask is the caller's all the same."""
    drawn = draw(Case((2, 8, *spatial), 4, layout=layout, mask=True))
    a, b = (2, 3) if layout == "NCHW" else (1, 2)
    drawn = replace(drawn, x=drawn.x.swapaxes(a, b).copy().swapaxes(a, b))
    want = engine.group_norm(drawn.x, 4, **drawn.options)
    out = np.full((*drawn.x.shape, 2), np.nan, np.float32)[..., 0]
    assert np.array_equal(engine.group_norm(drawn.x, 4, **drawn.options, out=out), want)
    check_forward(engine, drawn)


def test_out_that_stands_for_many_is_refused(engine: Engine) -> None:
    x = draw(Case((2, 8, 5, 7), 4)).x
    out = np.lib.stride_tricks.as_strided(np.empty_like(x), x.shape, (0, *x.strides[1:]))
    with pytest.raises(gn.ShapeError, match="memory of its own"):
        engine.group_norm(x, 4, out=out)


def test_normalize_into_out(engine: Engine) -> None:
    if engine.name != "cpu":
        pytest.skip("normalize takes no engine")
    x = draw(Case(SHAPE, 3)).x
    m = gn.moments(x, 3)
    out = np.full_like(x, np.nan)
    assert gn.normalize(x, m, out=out) is out
    np.testing.assert_allclose(out, gn.group_norm(x, 3), rtol=1e-6, atol=1e-6)
    assert gn.normalize(x, m, out=x) is x
    np.testing.assert_allclose(x, out, rtol=1e-6, atol=1e-6)


def test_lists_and_scalars_of_other_libraries(engine: Engine) -> None:
    """What NumPy reads as an array is one."""
    x = draw(Case((2, 4, 3), 2)).x
    want = engine.group_norm(x.astype(np.float64), 2)
    assert np.array_equal(engine.group_norm(x.astype(np.float64).tolist(), 2), want)
    assert engine.group_norm(x.astype(ml_dtypes.bfloat16), np.int64(2)).dtype == ml_dtypes.bfloat16
