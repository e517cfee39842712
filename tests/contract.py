"""What every engine must keep: the cases, budgets and comparisons of the contract suite (test_contract*.py).

An engine that wants to be held to the contract adds an `Engine` to ENGINES; the suite itself does not change. The
oracle is `groupnorm.reference` in float64 on the same (rounded) inputs. Budgets are the promises of the package, not
observations:

- y: |y - y64| <= 4u*(1 + |mean|/std)*(|weight*xhat| + |bias| + |weight|), u = 2^-24 (2^-53 for float64), where weight
  and bias include scale and shift, plus |residual|; an activation stretches it by its largest slope and adds 4u*|y|;
- 16-bit y: within one unit in the last place of the rounded values of that interval;
- gradients: 2-norm of the error at most twice that of the plain formula in float32 NumPy on exactly centred data. Where
  that formula happens to be nearly exact (few terms, or terms that cancel) two roundings of each term are allowed.
"""

import os
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import groupnorm as gn
from groupnorm import reference
from groupnorm._core.arguments import Options, prepare
from groupnorm._dispatch import choose

Array = Any

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
LAYOUTS = ("NCHW", "NHWC")
layouts = pytest.mark.parametrize(  # a group for each, so that two test processes do not compile the same kernels
    "layout", [pytest.param(layout, marks=pytest.mark.xdist_group(layout)) for layout in LAYOUTS]
)
GRADIENTS = ("dx", "dweight", "dbias", "dscale", "dshift", "dresidual")
STEEPEST = {None: 1.0, "relu": 1.0, "silu": 1.1, "gelu": 1.13, "gelu_tanh": 1.13, "sigmoid": 0.25, "tanh": 1.0,
            "hardswish": 1.5}  # fmt: skip
DRAWS = 6  # of a small case, for its gradients
LARGE_MEAN = 1e3  # standard deviations by which every case of values is also shifted


class Engine:
    """An engine under test: its name, and how arrays get to where it works and back.

    The functions take and give NumPy arrays, and are those of the public API. An engine on another device overrides
    `put` and `get`, and `call` if its public functions are not those of `groupnorm`.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return self.name

    def put(self, array: Array) -> Array:
        return array

    def get(self, array: Array) -> Array:
        return array

    def call(self, function: str, *arguments: Any, **options: Any) -> Any:
        return getattr(gn, function)(*arguments, impl=self.name, **options)

    def _call(self, function: str, *arguments: Any, **options: Any) -> Any:
        def moved(value: Any) -> Any:
            return self.put(value) if isinstance(value, np.ndarray) else value

        options = {name: moved(value) for name, value in options.items()}
        result = self.call(function, *map(moved, arguments), **options)
        if options.get("out") is not None:
            assert (result[0] if isinstance(result, tuple) else result) is options["out"], (
                "out must be what is returned"
            )
        if isinstance(result, tuple):
            return tuple(None if r is None else self.get(r) for r in result)
        return self.get(result)

    def group_norm(self, x: Array, *arguments: Any, **options: Any) -> Any:
        return self._call("group_norm", x, *arguments, **options)

    def vjp(self, dy: Array, x: Array, *arguments: Any, **options: Any) -> gn.Gradients:
        return gn.Gradients(*self._call("group_norm_vjp", dy, x, *arguments, **options))

    def moments(
        self, x: Array, num_groups: int, *, layout: str = "NCHW", mask: Array = None, uneven: bool = False
    ) -> Any:
        """`gn.moments`, done by this engine; the public function takes none, and always uses the fastest."""
        call, given = prepare(Options("moments", num_groups, 0.0, layout, None, uneven), {"x": x, "mask": mask})
        engine, plan = choose(call.problem, self.name, gn.get_num_threads())
        found = np.full((call.problem.N, call.problem.G, 3), np.nan)
        engine.forward(plan, given["x"], None, None, None, None, None, None, given["mask"], None, None, found)
        return gn.Moments(found[..., 0], found[..., 1], found[..., 2])


# GROUPNORM_ENGINES=gpu TRITON_INTERPRET=1 pytest tests/test_contract*.py: the whole suite for the GPU engine, an hour.
ENGINES = [Engine(name) for name in os.environ.get("GROUPNORM_ENGINES", "reference,cpu").split(",")]
CPU = [engine for engine in ENGINES if engine.name == "cpu"]


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call to draw arrays for. `shape` is (N, C, *spatial) in either layout; parameters are dtype names or None;
    `loc` is the mean of x in standard deviations; `mask` marks two thirds of the positions, none of the last sample.
    """

    shape: tuple[int, ...]
    groups: int
    dtype: str = "float32"
    layout: str = "NCHW"
    weight: str | None = "float32"
    bias: str | None = "float32"
    scale: str | None = None
    shift: str | None = None
    residual: bool = False
    mask: bool = False
    uneven: bool = False
    activation: str | None = None
    eps: float = 1e-5
    loc: float = 0.0
    std: float = 1.0

    def but(self, **changes: Any) -> "Case":
        return replace(self, **changes)


@dataclass(frozen=True)
class Drawn:
    """The arrays of a case, and the arguments of a call with them."""

    case: Case
    x: Array
    dy: Array
    options: dict[str, Any]  # everything after num_groups, by name

    @property
    def forward(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self.x, self.case.groups), self.options

    @property
    def axis(self) -> int:
        return 1 if self.case.layout == "NCHW" else self.x.ndim - 1

    def cube(self, array: Array) -> Array:
        """An array of x's shape as (N, C, S) float64."""
        moved = np.moveaxis(np.asarray(array, np.float64), self.axis, 1)
        return moved.reshape(*moved.shape[:2], -1)


def to_layout(array: Array, layout: str) -> Array:
    """(N, C, *spatial) in memory as the layout has it."""
    return np.ascontiguousarray(np.moveaxis(array, 1, -1)) if layout == "NHWC" else array


def draw(case: Case, seed: int = 0) -> Drawn:
    """Arrays for a case: channels of different means and sizes, NaN wherever the mask says that there is nothing."""
    rng = np.random.default_rng([seed, *case.shape, case.groups])
    n, c, *spatial = case.shape
    ones = (1,) * len(spatial)

    def normal(shape: tuple[int, ...], dtype: str | None) -> Array:
        return None if dtype is None else rng.standard_normal(shape).astype(DTYPES[dtype])

    noise = rng.standard_normal(case.shape) * rng.uniform(0.5, 1.5, (1, c, *ones)) + rng.uniform(
        -0.5, 0.5, (1, c, *ones)
    )
    # bfloat16 numbers near 1000 are 4 apart: of noise with a standard deviation of 1 three values would be left
    loc = case.loc / 10 if case.dtype == "bfloat16" else case.loc
    x = to_layout((case.std * (noise + loc)).astype(DTYPES[case.dtype]), case.layout)
    dy = to_layout(normal(case.shape, case.dtype), case.layout)
    options: dict[str, Any] = {
        "weight": normal((c,), case.weight), "bias": normal((c,), case.bias), "scale": normal((n, c), case.scale),
        "shift": normal((n, c), case.shift), "eps": case.eps, "layout": case.layout, "activation": case.activation,
        "uneven": case.uneven,
    }  # fmt: skip
    if case.residual:
        options["residual"] = to_layout(normal(case.shape, case.dtype), case.layout)
    if case.mask:
        mask = rng.random((n, *spatial)) < 0.67
        mask[-1] = False
        options["mask"] = mask
        hole = np.broadcast_to(np.expand_dims(~mask, 1 if case.layout == "NCHW" else -1), x.shape)
        for array in (x, dy, *([options["residual"]] if case.residual else [])):
            array[hole] = np.nan
    return Drawn(case, x, dy, options)


# ---- budgets ---------------------------------------------------------------------------------------------------------


def unit(dtype: str) -> float:
    """Rounding of the arithmetic in which a dtype is computed."""
    return UNIT["float64" if dtype == "float64" else "float32"]


def per_channel(values: Array, case: Case) -> Array:
    """(N, G) values as (N, C, 1)."""
    c, size = case.shape[1], case.shape[1] // case.groups
    return values[:, np.minimum(np.arange(c) // size, case.groups - 1), None]


def forward_budget(drawn: Drawn, y64: Array) -> Array:
    """The largest error that the promise allows in each element of y, before rounding to 16 bits; as (N, C, S)."""
    case, o = drawn.case, drawn.options
    known = {name: o.get(name) for name in ("eps", "layout", "mask", "uneven")}
    xhat, mean, rstd = reference.group_norm(drawn.x, case.groups, **known)
    weight, bias = (
        np.full((1, 1, 1), default) if o[name] is None else np.abs(np.asarray(o[name], np.float64))[None, :, None]
        for name, default in (("weight", 1.0), ("bias", 0.0))
    )
    size = weight * np.abs(drawn.cube(xhat)) + bias + weight
    if o["scale"] is not None:
        size = size * np.abs(1 + np.asarray(o["scale"], np.float64))[:, :, None]
    if o["shift"] is not None:
        size = size + np.abs(np.asarray(o["shift"], np.float64))[:, :, None]
    if o.get("residual") is not None:
        size = size + np.nan_to_num(np.abs(drawn.cube(o["residual"])))
    budget = 4 * unit(case.dtype) * (1 + per_channel(np.abs(mean) * rstd, case)) * size * STEEPEST[case.activation]
    if case.activation is not None:
        budget = budget + 4 * unit(case.dtype) * np.abs(drawn.cube(y64))
    if case.dtype == "float64":
        budget = 2 * budget  # the oracle is rounded just as often
    return budget


def rank(array: Array) -> Array:
    """16-bit floats as whole numbers in their order, one for each value that the type has; -0 and 0 are the same."""
    bits = np.ascontiguousarray(array).view(np.int16).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


def assert_close(y: Array, y64: Array, budget: Array, dtype: str, what: str = "y") -> None:
    """Every element within its budget; 16-bit ones within one unit in the last place beyond it."""
    assert y.dtype == DTYPES[dtype], f"{what} has the type {y.dtype}"
    assert y.shape == y64.shape, f"{what} has the shape {y.shape}"
    assert np.isfinite(np.asarray(y, np.float64)).all(), f"{what} is not finite"
    if UNIT[dtype] > UNIT["float32"]:
        with np.errstate(over="ignore"):
            low, high = (rank((y64 + sign * budget).astype(DTYPES[dtype])) for sign in (-1, 1))
        off = np.maximum(low - rank(y), rank(y) - high)
        assert (off <= 1).all(), f"{what}: {off.max()} units in the last place outside the budget"
    else:
        error = np.abs(np.asarray(y, np.float64) - y64)
        bad = ~(error <= budget)
        assert not bad.any(), (
            f"{what}: {bad.sum()} of {bad.size} elements beyond the budget, "
            f"worst {np.max(error[bad] / np.maximum(budget[bad], 1e-300)):.2f} times"
        )


def plain_vjp(drawn: Drawn, lane: Any) -> tuple[dict[str, Array], dict[str, float]]:
    """The formula as one would write it in NumPy, in `lane` precision on exactly centred data; and, for each gradient,
    the 2-norm of its terms, so that unit*norm is what one rounding of each term makes.
    """
    case, o = drawn.case, drawn.options
    v = drawn.cube(drawn.x)
    n, c, s = v.shape
    m = np.ones((n, 1, s), bool) if o.get("mask") is None else o["mask"].reshape(n, 1, s)

    def column(name: str, default: float) -> Array:
        a = o.get(name)
        if a is None:
            return np.full((1, 1, 1), default, lane)
        return np.asarray(a, lane).reshape((1, c, 1) if a.ndim == 1 else (n, c, 1))

    groups = [slice(g * (c // case.groups), c if g == case.groups - 1 else (g + 1) * (c // case.groups))
              for g in range(case.groups)]  # fmt: skip
    count = [np.maximum(m.sum((1, 2)) * (g.stop - g.start), 1).astype(lane)[:, None, None] for g in groups]
    xhat, rstd = np.zeros((n, c, s), lane), np.zeros((n, c, 1), lane)
    known = {name: o.get(name) for name in ("eps", "layout", "mask", "uneven")}
    mean64 = per_channel(reference.group_norm(drawn.x, case.groups, **known)[1], case)
    centred = np.where(m, v - mean64, 0.0).astype(lane)
    for k, g in zip(count, groups, strict=True):
        d = np.where(m, centred[:, g] - centred[:, g].sum((1, 2), keepdims=True) / k, 0).astype(lane)
        rstd[:, g] = lane(1) / np.sqrt((d * d).sum((1, 2), keepdims=True) / k + lane(case.eps))
        xhat[:, g] = d * rstd[:, g]
    factor = lane(1) + column("scale", 0)
    a = xhat * column("weight", 1) + column("bias", 0)
    z = a * factor + column("shift", 0)
    if o.get("residual") is not None:
        z = z + np.where(m, drawn.cube(o["residual"]), 0).astype(lane)
    slope = reference.ACTIVATIONS[case.activation][1](z).astype(lane)
    dz = np.where(m, drawn.cube(drawn.dy), 0).astype(lane) * slope
    da = dz * factor
    dxhat = da * column("weight", 1)
    dx = np.zeros_like(dxhat)
    for k, g in zip(count, groups, strict=True):
        s1, s2 = (t.sum((1, 2), keepdims=True) / k for t in (dxhat[:, g], dxhat[:, g] * xhat[:, g]))
        dx[:, g] = np.where(m, rstd[:, g] * (dxhat[:, g] - s1 - xhat[:, g] * s2), 0)
    found = {"dx": dx, "dweight": (da * xhat).sum((0, 2)), "dbias": da.sum((0, 2)), "dscale": (dz * a).sum(2),
             "dshift": dz.sum(2), "dresidual": dz}  # fmt: skip
    terms = {"dx": rstd * dxhat, "dweight": da * xhat, "dbias": da, "dscale": dz * a, "dshift": dz, "dresidual": dz}
    return found, {name: float(np.linalg.norm(t.astype(np.float64))) for name, t in terms.items()}


# ---- the comparisons -------------------------------------------------------------------------------------------------


def check_forward(engine: Engine, drawn: Drawn, **more: Any) -> Array:
    """y, mean and rstd of the engine keep the promise; returns y."""
    case = drawn.case
    (x, groups), options = drawn.forward
    y, mean, rstd = engine.group_norm(x, groups, **options, **more, return_stats=True)
    y64, mean64, rstd64 = reference.group_norm(x, groups, **options)
    assert_close(drawn_cube(drawn, y), drawn.cube(y64), forward_budget(drawn, y64), case.dtype)
    stats = "float64" if case.dtype == "float64" else "float32"
    u = UNIT[stats]
    std = 1 / rstd64
    assert_close(mean, mean64, 2 * u * np.abs(mean64) + 16 * u * std, stats, "mean")
    assert_close(
        rstd, rstd64, 16 * u * rstd64 * (1 + (np.abs(mean64) * rstd64 if stats == "float64" else 0)), stats, "rstd"
    )
    if "mask" in options:
        hole = np.broadcast_to(np.expand_dims(~options["mask"], drawn.axis), y.shape)
        assert (y[hole] == 0).all(), "y must be 0 where the mask is False"
    return y


def drawn_cube(drawn: Drawn, array: Array) -> Array:
    """An array of x's shape as (N, C, S), in its own type."""
    moved = np.moveaxis(array, drawn.axis, 1)
    return moved.reshape(*moved.shape[:2], -1)


def check_backward(engine: Engine, *draws: Drawn, **more: Any) -> None:
    """Every gradient of the engine keeps the promise, over all draws of one case together: of a few numbers, the error
    of one draw may happen to be near zero, the engine's or that of the plain formula.
    """
    case = draws[0].case
    lane = np.float64 if case.dtype == "float64" else np.float32
    errors: dict[str, list[tuple[float, float, float]]] = {}
    for drawn in draws:
        (x, groups), options = drawn.forward
        got = engine.vjp(drawn.dy, x, groups, **options, **more)
        want = reference.group_norm_vjp(drawn.dy, x, groups, **options)
        plain, terms = plain_vjp(drawn, lane)
        source = {
            "dx": x,
            **{f"d{name}": options.get(name) for name in ("weight", "bias", "scale", "shift", "residual")},
        }
        for name in GRADIENTS:
            g, w = getattr(got, name), getattr(want, name)
            assert (g is None) == (source[name] is None), f"{name} belongs to an argument"
            if g is None:
                continue
            assert g.shape == source[name].shape, f"{name} has the shape {g.shape}"
            assert g.dtype == source[name].dtype, f"{name} has the type {g.dtype}"
            if "mask" in options and name in {"dx", "dresidual"}:
                hole = np.broadcast_to(np.expand_dims(~options["mask"], drawn.axis), g.shape)
                assert (g[hole] == 0).all(), f"{name} must be 0 where the mask is False"
            g, w = (drawn.cube(a) if name in {"dx", "dresidual"} else np.asarray(a, np.float64) for a in (g, w))
            p = np.asarray(plain[name].astype(DTYPES[source[name].dtype.name]), np.float64)
            u = max(unit(case.dtype), UNIT[source[name].dtype.name])
            if case.dtype == "float64":  # the oracle is rounded just as often, and its mean too
                u *= 4 * (1 + abs(case.loc))
            elif "mean" in more:  # rounded to float32 before it was given
                u *= 1 + abs(case.loc)
            size = float(np.linalg.norm(w)) or 1.0
            found = np.array([np.linalg.norm(g - w), np.linalg.norm(p - w), u * terms[name]]) / size
            errors.setdefault(name, []).append(tuple(found))
    for name, rows in errors.items():
        error, reached, rounding = np.sqrt(np.mean(np.square(rows), 0))
        allowed = max(2 * reached, 2 * rounding)
        assert error <= allowed, (
            f"{name}: relative error {error:.3g}, allowed {allowed:.3g}, plain formula {reached:.3g}"
        )


def check(engine: Engine, case: Case) -> None:
    """Forward and backward of a case."""
    draws = [draw(case, seed) for seed in range(DRAWS if np.prod(case.shape) < 5000 else 1)]
    check_forward(engine, draws[0])
    check_backward(engine, *draws)
