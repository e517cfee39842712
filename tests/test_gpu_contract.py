"""The contract for the GPU engine, in Triton's interpreter: every phase of every regime, on small cases.

A GPU with four multiprocessors and little memory stands in, so that small cases are large for it. What the interpreter
cannot show (barriers, real roundings of 16 bits, races) is for tests on a GPU: `make test-gpu`.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import contract
import groupnorm as gn
from contract import Case, Engine, check, draw
from groupnorm import reference
from groupnorm._core.problem import ACTIVATIONS

pytest.importorskip("triton", minversion="3.9")  # earlier interpreters do not work with NumPy 2.4

from groupnorm._engines import gpu
from groupnorm._engines.gpu.compiler import INTERPRETED
from groupnorm._engines.gpu.device import Device, Limits
from groupnorm._engines.gpu.plan import REGIMES, make_plan
from interpreted import round_as_gpus_do

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 from the start"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # NumPy's, of lanes that are masked away
]

SMALL = Device(
    0, "a small GPU", 90, 4, 1 << 16,
    limits=Limits(held=1 << 13, held_backward=1 << 13, part=512, part_backward=512, together=256),
)  # fmt: skip


# Clustered is resident for the interpreter, which knows no multiprocessors.
@pytest.fixture(params=[name for name in REGIMES if name != "clustered"])
def regime(request: Any, monkeypatch: Any) -> Iterator[str]:
    """All plans for y and dx are in this regime."""
    round_as_gpus_do(monkeypatch)
    used = []

    def plan(problem: Any, num_threads: int) -> Any:
        forced = request.param if problem.task in ("forward", "backward") and problem.dx else None
        made = make_plan(problem, SMALL, forced)
        used.append(made.regime)
        return made

    monkeypatch.setattr(gpu, "plan", plan)
    gn.numpy._calls.clear()
    yield request.param
    gn.numpy._calls.clear()
    assert request.param in used


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: Any) -> None:
    """The interpreter is slow: half the draws for gradients of small cases."""
    monkeypatch.setattr(contract, "DRAWS", 3)


ENGINE = Engine("gpu")


@pytest.mark.parametrize("case", [
    Case((3, 8, 5, 6), 4),
    Case((3, 8, 5, 6), 4, layout="NHWC"),
    Case((2, 20, 9, 7), 4, loc=1e3),  # D = 5
    Case((2, 20, 9, 7), 4, layout="NHWC", loc=1e3),
    Case((1, 6, 700), 2, dtype="bfloat16", activation="silu"),
    Case((2, 12, 40), 3, dtype="bfloat16", layout="NHWC", activation="silu", weight="bfloat16", bias="bfloat16"),
    Case((2, 6, 8, 8), 6, dtype="float16"),  # a group is a channel
    Case((2, 12, 8, 8), 1, dtype="float16", layout="NHWC", weight=None, bias=None),
    Case((2, 12, 33), 4, dtype="float64", activation="tanh", loc=1e3),
    Case((2, 12, 33), 4, dtype="float64", layout="NHWC", activation="gelu"),
], ids=str)  # fmt: skip
def test_values(regime: str, case: Case) -> None:
    check(ENGINE, case)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_all_options(regime: str, layout: str) -> None:
    check(ENGINE, Case((3, 12, 9, 7), 3, layout=layout, scale="float32", shift="float32", residual=True, mask=True,
                    activation="silu", loc=10))  # fmt: skip


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name is not None])
def test_activations(activation: str) -> None:
    for layout in ("NCHW", "NHWC"):
        check(ENGINE, Case((2, 16, 7, 9), 4, layout=layout, activation=activation))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", [(2, 6, 1), (1, 1, 5), (2, 4, 1, 1), (1, 8, 2, 3)], ids=str)
def test_tiny(layout: str, shape: tuple[int, ...]) -> None:
    for groups in {1, shape[1]}:
        check(ENGINE, Case(shape, groups, layout=layout))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_constant_group_gives_the_bias(regime: str, layout: str) -> None:
    drawn = draw(Case((2, 12, 11, 13), 4, layout=layout, bias="float32"))
    drawn.x[...] = 1234.567
    y = ENGINE.group_norm(drawn.x, 4, **drawn.options)
    bias = drawn.options["bias"]
    assert np.array_equal(np.moveaxis(y, drawn.axis, -1), np.broadcast_to(bias, (2, 11, 13, 12)))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_constant_group_is_exactly_zero(regime: str, layout: str) -> None:
    """Also where 1/count times count is not 1: the sum of 41 equal numbers times 1/41."""
    for value in (2031616.0, 0.1, -3e7):
        x = np.full((1, 2, 41) if layout == "NCHW" else (1, 41, 2), value, np.float32)
        for groups in (1, 2):
            assert not ENGINE.group_norm(x, groups, layout="NCL" if layout == "NCHW" else "NLC").any()


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("name", ["weight", "scale"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_parameter_stays_in_its_group(regime: str, layout: str, name: str, value: float) -> None:
    """Rows of a tile beyond a group are another group's, whose parameters must not enter."""
    drawn = draw(Case((2, 20, 8, 8), 2, layout=layout, scale="float32", shift="float32"))
    want = ENGINE.vjp(drawn.dy, drawn.x, 2, **drawn.options).dx
    drawn.options[name][..., 10] = value
    with np.errstate(invalid="ignore"):
        got = ENGINE.vjp(drawn.dy, drawn.x, 2, **drawn.options).dx
    first = np.moveaxis(got, drawn.axis, 0)[:10]
    assert np.array_equal(first, np.moveaxis(want, drawn.axis, 0)[:10])


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("mask", [False, True])
def test_gradients_from_a_rounded_mean(regime: str, layout: str, mask: bool) -> None:
    """The mean that a caller gives is off by up to 2^-24 of itself, 1000 standard deviations here."""
    drawn = draw(Case((2, 20, 8, 16), 2, layout=layout, scale="float32", shift="float32", mask=mask, loc=1e3))
    _, mean, rstd = ENGINE.group_norm(drawn.x, 2, **drawn.options, return_stats=True)
    given = ENGINE.vjp(drawn.dy, drawn.x, 2, **drawn.options, mean=mean, rstd=rstd)
    want = reference.group_norm_vjp(drawn.dy, drawn.x, 2, **drawn.options)
    for name in ("dx", "dweight", "dbias", "dscale", "dshift"):
        exact = getattr(want, name)
        assert np.linalg.norm(getattr(given, name) - exact) <= 3e-6 * np.linalg.norm(exact), name


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_mean_of_something_else_is_obeyed(regime: str, layout: str) -> None:
    drawn = draw(Case((2, 20, 8, 16), 2, layout=layout))
    mean, rstd = np.full((2, 2), 0.5, np.float32), np.full((2, 2), 2.0, np.float32)
    given = ENGINE.vjp(drawn.dy, drawn.x, 2, **drawn.options, mean=mean, rstd=rstd)
    want = reference.group_norm_vjp(drawn.dy, drawn.x, 2, **drawn.options, mean=mean, rstd=rstd)
    for name in ("dx", "dweight", "dbias"):
        exact = getattr(want, name)
        assert np.linalg.norm(getattr(given, name) - exact) <= 3e-6 * np.linalg.norm(exact), name


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_statistics_that_are_wanted_do_not_change_y(regime: str, layout: str) -> None:
    """A mean is two numbers, of which the caller gets the first; y is made from both."""
    drawn = draw(Case((2, 6, 11, 13), 2, layout=layout, activation="silu", loc=1e3))
    y, _, _ = ENGINE.group_norm(drawn.x, 2, **drawn.options, return_stats=True)
    assert np.array_equal(ENGINE.group_norm(drawn.x, 2, **drawn.options), y)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_bits_of_a_sample_do_not_depend_on_its_batch(regime: str, layout: str) -> None:
    drawn = draw(Case((2, 6, 11, 13), 2, layout=layout, activation="silu"))
    options = drawn.options
    together = ENGINE.vjp(drawn.dy, drawn.x, 2, **options)
    y = ENGINE.group_norm(drawn.x, 2, **options)
    for n in range(2):
        one = slice(n, n + 1)
        assert np.array_equal(ENGINE.group_norm(drawn.x[one].copy(), 2, **options), y[one])
        alone = ENGINE.vjp(drawn.dy[one].copy(), drawn.x[one].copy(), 2, **options)
        assert np.array_equal(alone.dx, together.dx[one])


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_nan_stays_in_its_group(regime: str, layout: str) -> None:
    drawn = draw(Case((2, 12, 11, 13), 4, layout=layout))
    x = np.moveaxis(drawn.x, drawn.axis, 1)
    x[1, 4, 5, 6] = np.nan
    x[0, 9, 2, 3] = np.inf
    with np.errstate(invalid="ignore"):
        y, mean, _ = ENGINE.group_norm(drawn.x, 4, **drawn.options, return_stats=True)
    bad = ~np.isfinite(np.moveaxis(y, drawn.axis, 1)).all((2, 3)).reshape(2, 4, 3)
    assert bad.all(2).sum() == 2
    assert bad[1, 1].all()
    assert bad[0, 3].all()
    assert np.isfinite(mean).sum() == 6


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_barrier_of_one_program(monkeypatch: Any, layout: str) -> None:
    """The interpreter returns from a barrier that has nobody to wait for; three slabs one after the other use it."""
    monkeypatch.setattr(gpu, "plan", lambda problem, threads: make_plan(
        problem, replace(SMALL, multiprocessors=1), "split" if problem.task != "moments" else None))  # fmt: skip
    gn.numpy._calls.clear()
    check(ENGINE, Case((3, 4, 5, 6), 4 if layout == "NCHW" else 1, layout=layout))
    gn.numpy._calls.clear()


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("mask", [False, True])
def test_moments(monkeypatch: Any, layout: str, mask: bool) -> None:
    monkeypatch.setattr(gpu, "plan", lambda problem, threads: make_plan(problem, SMALL))
    for shape in ((2, 12, 5, 7), (1, 12, 50, 70)):
        drawn = draw(Case(shape, 4, layout=layout, mask=mask, loc=1e3))
        given = drawn.options.get("mask")
        found = ENGINE.moments(drawn.x, 4, layout=layout, mask=given)
        count, mean, m2 = reference.moments(drawn.x, 4, layout=layout, mask=given)
        assert np.array_equal(found.count, count)
        assert np.allclose(found.mean, mean, rtol=1e-9, atol=0)
        assert np.allclose(found.m2, m2, rtol=1e-5)


def test_no_elements() -> None:
    x = np.zeros((0, 4, 3), np.float32)
    y, mean, rstd = ENGINE.group_norm(x, 2, return_stats=True)
    assert y.shape == x.shape
    assert mean.shape == rstd.shape == (0, 2)
    grads = ENGINE.vjp(np.zeros((2, 4, 0), np.float32), np.zeros((2, 4, 0), np.float32), 2, np.ones(4, np.float32))
    assert np.array_equal(grads.dweight, np.zeros(4))


def test_refused_with_the_reason() -> None:
    with pytest.raises(gn.EngineError, match="groups must be of one size"):
        gn.group_norm(np.zeros((1, 5, 4), np.float32), 2, uneven=True, impl="gpu")
    with pytest.raises(gn.EngineError, match="dense"):
        gn.group_norm(np.zeros((2, 8, 6), np.float32)[:, ::2], 2, impl="gpu")
