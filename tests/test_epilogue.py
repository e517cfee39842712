"""Errors of the activations and their slopes as the CPU engine computes them, sixteen lanes at a time.

float32: every 257th bit pattern of all finite values (16.7 million), every one with `-m slow`, against SciPy in
float64. A bound is a number of units in the last place of the result, and an absolute one for where a formula's terms
cancel: |error| <= ulps*ulp(want) + units*2^-24. Twice that for float64, as SciPy's own error is in it.
"""

from functools import cache
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")
special = pytest.importorskip("scipy.special")

import groupnorm as gn  # noqa: E402
from groupnorm._engines.cpu.compiler import compiled  # noqa: E402
from groupnorm._engines.cpu.epilogue import (  # noqa: E402
    ACTIVATION_CODES,
    activate,
    activation,
    slope,
)
from groupnorm._engines.cpu.exponentials import _decay_coarse, _decay_f32, decay, expm1  # noqa: E402
from groupnorm._engines.cpu.memory import BF16, F16, FLOAT32, FLOAT64, load, pointer, store  # noqa: E402
from groupnorm._engines.cpu.simd import LANES, absolute  # noqa: E402

Array = Any
K = np.sqrt(2 / np.pi)
ELEMENT = {np.float32: FLOAT32, np.float64: FLOAT64}


def sigmoid(z: Array) -> Array:
    return special.expit(z)


def tanh_slope(z: Array) -> Array:
    with np.errstate(over="ignore"):
        return 1 / np.cosh(z) ** 2


def gelu_tanh_parts(z: Array) -> tuple[Array, Array]:
    with np.errstate(over="ignore"):
        u = 2 * K * (z + 0.044715 * z**3)
        return sigmoid(u), sigmoid(-u) * 2 * K * (1 + 3 * 0.044715 * z * z)


def times(z: Array, small: Array) -> Array:
    """z*small, where nothing is left of z if small is 0."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(small == 0, 0.0, z * small)


def gelu_tanh_slope(z: Array) -> Array:
    s, rest = gelu_tanh_parts(z)
    with np.errstate(invalid="ignore"):
        return s + times(z, np.where(s == 0, 0.0, s * np.nan_to_num(rest)))


EXACT = {  # name -> the function in float64
    "decay": lambda z: np.exp(-np.abs(z)),
    "expm1": np.expm1,
    "relu": lambda z: np.maximum(z, 0),
    "silu": lambda z: times(z, sigmoid(z)),
    "gelu": lambda z: times(z, special.ndtr(z)),
    "gelu_tanh": lambda z: times(z, gelu_tanh_parts(z)[0]),
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "hardswish": lambda z: z * np.clip(z + 3, 0, 6) / 6,
    "relu slope": lambda z: (z > 0).astype(z.dtype),
    "silu slope": lambda z: sigmoid(z) + times(z, sigmoid(z) * sigmoid(-z)),
    "gelu slope": lambda z: special.ndtr(z) + times(z, np.exp(-np.minimum(z * z, 1e4) / 2) / np.sqrt(2 * np.pi)),
    "gelu_tanh slope": gelu_tanh_slope,
    "sigmoid slope": lambda z: sigmoid(z) * sigmoid(-z),
    "tanh slope": tanh_slope,
    "hardswish slope": lambda z: np.where(z <= -3, 0.0, np.where(z >= 3, 1.0, (2 * z + 3) / 6)),
}
BOUNDS = {  # name -> ulps of the result, and absolute units of 2^-24 (2^-53); measured 2026-11, rounded up
    "decay": (1.2, 0.0),
    "expm1": (1.7, 0.0),
    "relu": (0.0, 0.0),
    "silu": (3.1, 0.0),
    "gelu": (3.0, 0.6),
    "gelu_tanh": (3.0, 0.6),
    "sigmoid": (2.5, 0.0),
    "tanh": (2.6, 0.0),
    "hardswish": (2.5, 0.0),
    "relu slope": (0.0, 0.0),
    "silu slope": (3.0, 3.0),
    "gelu slope": (2.0, 2.5),
    "gelu_tanh slope": (3.0, 3.0),
    "sigmoid slope": (3.0, 0.5),
    "tanh slope": (0.0, 5.5),
    "hardswish slope": (1.0, 0.5),
}
# Results below this may be 0: an exponential in them is below the smallest normal number, and z is 87 times that.
FLUSHED = {np.float32: 88 * 2.0**-126, np.float64: 1e-300}
LIMITS = {  # what a function is at -infinity and at +infinity
    "decay": (0, 0), "expm1": (-1, np.inf), "relu": (0, np.inf), "silu": (0, np.inf), "gelu": (0, np.inf),
    "gelu_tanh": (0, np.inf), "sigmoid": (0, 1), "tanh": (-1, 1), "hardswish": (0, np.inf), "relu slope": (0, 1),
    "silu slope": (0, 1), "gelu slope": (0, 1), "gelu_tanh slope": (0, 1), "sigmoid slope": (0, 0),
    "tanh slope": (0, 0), "hardswish slope": (0, 1),
}  # fmt: skip


@cache
def kernel(name: str, dtype: Any, results: int) -> Any:
    """A C function (address of x, address of y, vectors) that applies one of EXACT as it is done for elements of the
    code `results`.
    """
    element = ELEMENT[dtype]
    code = ACTIVATION_CODES.get(name.removesuffix(" slope"), 1)

    if name == "decay":

        def apply(x, y, count):  # type: ignore[no-untyped-def]
            px, py = pointer(x, element), pointer(y, element)
            for i in range(count):
                store(py, i * LANES, decay(activation(code, results), absolute(load(px, i * LANES))))

    elif name == "expm1":

        def apply(x, y, count):  # type: ignore[no-untyped-def]
            px, py = pointer(x, element), pointer(y, element)
            for i in range(count):
                store(py, i * LANES, expm1(load(px, i * LANES)))

    elif name.endswith("slope"):

        def apply(x, y, count):  # type: ignore[no-untyped-def]
            px, py = pointer(x, element), pointer(y, element)
            for i in range(count):
                store(py, i * LANES, slope(activation(code, results), load(px, i * LANES)))

    else:

        def apply(x, y, count):  # type: ignore[no-untyped-def]
            px, py = pointer(x, element), pointer(y, element)
            for i in range(count):
                store(py, i * LANES, activate(activation(code, results), load(px, i * LANES)))

    return compiled(apply, f"test_epilogue_{name.replace(' ', '_')}_{element}_{results}", 3).ctypes


def computed(name: str, z: Array, results: int | None = None) -> Array:
    """The function of z, by the engine's vectors."""
    room = np.zeros(-(-z.size // LANES) * LANES, z.dtype)
    room[: z.size] = z
    y = np.full_like(room, np.nan)
    kernel(name, z.dtype.type, results or ELEMENT[z.dtype.type])(room.ctypes.data, y.ctypes.data, room.size // LANES)
    return y[: z.size]


def patterns(start: int, stride: int) -> Array:
    """Finite float32 numbers of every stride-th bit pattern."""
    z = np.arange(start, 1 << 32, stride, dtype=np.uint64).astype(np.uint32).view(np.float32)
    return z[np.isfinite(z)]


def errors(name: str, z: Array) -> tuple[Array, Array]:
    """Error and ulp of the exact value for each z, where that is finite."""
    got = computed(name, z)
    with np.errstate(over="ignore", under="ignore"):
        want = EXACT[name](z.astype(np.float64))
        rounded = want.astype(z.dtype)
    assert not np.isnan(got).any(), f"{name} of {z[np.isnan(got)][:3]} is NaN"
    beyond = np.isinf(rounded)
    edge = np.finfo(z.dtype).max * (1 - 4 * np.finfo(z.dtype).eps)
    assert (np.abs(got[beyond]) >= edge).all(), f"{name} must be infinite, or nearly, at {z[beyond][:3]}"
    with np.errstate(over="ignore"):  # of the largest number it is infinite
        ulp = np.spacing(np.maximum(np.abs(rounded), np.finfo(z.dtype).tiny)).astype(np.float64)
    keep = ~beyond & np.isfinite(got)
    return np.abs(got.astype(np.float64)[keep] - want[keep]), ulp[keep]


def assert_bound(name: str, z: Array, factor: float = 1.0) -> None:
    ulps, units = (factor * bound for bound in BOUNDS[name])
    unit = float(np.finfo(z.dtype).eps) / 2
    error, ulp = errors(name, z)
    excess = error - ulps * ulp - units * unit - FLUSHED[z.dtype.type]
    worst = excess.argmax() if excess.size else 0
    where = f"{ulps} ulp + {units} units by {excess[worst] / ulp[worst]:.3g} ulp = {excess[worst] / unit:.3g} units"
    assert excess[worst] <= 0, f"{name}: {(excess > 0).sum()} values beyond {where}"


@pytest.mark.parametrize("name", EXACT)
def test_every_257th_float32(name: str) -> None:
    assert_bound(name, patterns(3, 257))


@pytest.mark.slow
@pytest.mark.skipif("not config.getoption('-m')", reason="four billion values each; ask for it with -m slow")
@pytest.mark.parametrize("name", EXACT)
def test_every_float32(name: str) -> None:
    for start in range(257):
        assert_bound(name, patterns(start, 257))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("width", [0.1, 3.0, 40.0, 300.0])
def test_where_the_data_is(name: str, width: float) -> None:
    """Densely where normalized values are."""
    assert_bound(name, np.linspace(-width, width, 1_000_003).astype(np.float32))


@pytest.mark.parametrize("name", EXACT)
def test_float64(name: str) -> None:
    """Samples over all sizes; SciPy's own error is allowed for."""
    rng = np.random.default_rng(0)
    z = np.concatenate([rng.uniform(-w, w, 20_000) for w in (1e-8, 0.1, 3, 40, 700)] + [rng.standard_normal(20_000)])
    assert_bound(name, z, 2.0)


@pytest.mark.parametrize(("results", "error"), [(F16, 2.0**-15), (BF16, 2.0**-12)])
@pytest.mark.parametrize("name", [name for name in EXACT if name != "expm1"])
def test_results_of_16_bits(name: str, results: int, error: float) -> None:
    """Before they are rounded to 16 bits they are off by a twentieth of a unit in the last place: 2^-15 relative for
    float16, 2^-12 for bfloat16, and a quarter of that absolute where terms cancel.
    """
    z = np.concatenate([np.linspace(-w, w, 300_001) for w in (3.0, 40.0)]).astype(np.float32)
    got, want = computed(name, z, results).astype(np.float64), EXACT[name](z.astype(np.float64))
    off = np.abs(got - want) - FLUSHED[np.float32]
    absolute_part = error / 4 if name.endswith("slope") or name == "gelu" else 0.0
    assert (off <= error * np.abs(want) + absolute_part).all()


@pytest.mark.parametrize("results", [F16, BF16])
def test_16_bits_beyond_the_range(results: int) -> None:
    """Every 4001st bit pattern of the activations built on a sigmoid: finite, and 0 far to the left."""
    z = patterns(7, 4001)
    for name in ("silu", "gelu_tanh", "sigmoid"):
        got, want = computed(name, z, results).astype(np.float64), EXACT[name](z.astype(np.float64))
        assert np.isfinite(got).all()
        assert (np.abs(got - want) <= 2.0**-12 * np.abs(want) + FLUSHED[np.float32]).all()


def test_exponential_of_processors_without_avx512() -> None:
    """Compiled here too, whatever this processor has: within decay's bound, and within that of 16-bit results."""

    def apply(x, y, count):  # type: ignore[no-untyped-def]
        px, py = pointer(x, FLOAT32), pointer(y, FLOAT32)
        for i in range(count):
            v = absolute(load(px, i * LANES))
            store(py, 2 * i * LANES, _decay_f32(v))
            store(py, (2 * i + 1) * LANES, _decay_coarse(v))

    z = patterns(5, 4097)
    z = np.concatenate([z[: z.size // LANES * LANES], np.linspace(0, 90, 160_000, dtype=np.float32)])
    y = np.zeros(2 * z.size, np.float32)
    compiled(apply, "test_exponential_without_avx512", 3).ctypes(z.ctypes.data, y.ctypes.data, z.size // LANES)
    fine, coarse = (part.ravel().astype(np.float64) for part in np.split(y.reshape(-1, 2, LANES), 2, axis=1))
    want = EXACT["decay"](z.astype(np.float64))
    ulp = np.spacing(np.maximum(want.astype(np.float32), np.finfo(np.float32).tiny))
    assert (np.abs(fine - want) <= BOUNDS["decay"][0] * ulp + FLUSHED[np.float32]).all()
    assert (np.abs(coarse - want) <= 2.0**-15 * want + FLUSHED[np.float32]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", EXACT)
def test_infinity_and_nan(name: str, dtype: Any) -> None:
    """NaN stays NaN. At infinity the limit, or NaN where a product of the formula has none (0*infinity), but never
    another number."""
    got = computed(name, np.array([np.nan, -np.inf, np.inf, -np.nan], dtype))
    assert np.isnan(got[[0, 3]]).all()
    for value, limit in zip(got[1:3], LIMITS[name], strict=True):
        assert value == limit or np.isnan(value) or abs(value) < 1e-30 > limit >= 0, f"{value} instead of {limit}"


@pytest.mark.parametrize("name", ["decay", "expm1", "sigmoid", "tanh"])
def test_infinity_where_no_product_is_in_the_way(name: str) -> None:
    got = computed(name, np.array([-np.inf, np.inf], np.float32))
    assert tuple(got) == LIMITS[name]


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu_tanh", "hardswish"])
def test_infinity_goes_through(activation: str) -> None:
    """Where 0*infinity does not come up: what overflowed stays visible."""
    x = np.random.default_rng(0).standard_normal((1, 4, 50)).astype(np.float32)
    residual = np.zeros_like(x)
    residual[0, 1, 3] = np.inf
    assert gn.group_norm(x, 2, activation=activation, residual=residual)[0, 1, 3] == np.inf


def test_exact_places() -> None:
    zero = np.array([0.0, -0.0], np.float32)
    for name in ("relu", "silu", "gelu", "gelu_tanh", "tanh", "hardswish", "expm1"):
        assert (computed(name, zero) == 0).all(), name
    assert (computed("decay", zero) == 1).all()
    assert (computed("sigmoid", zero) == 0.5).all()
    assert tuple(computed("hardswish", np.array([-3.0, -4.0, 3.0, 7.0], np.float32))) == (0, 0, 3, 7)
    assert (np.abs(computed("tanh", patterns(1, 4097))) <= 1).all()
    inside = computed("sigmoid", patterns(1, 4097))
    assert ((inside >= 0) & (inside <= 1)).all()
