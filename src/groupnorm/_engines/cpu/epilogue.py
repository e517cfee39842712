"""The activations and their slopes on vectors: the end of forward, and the beginning of backward.

Both layouts, forward and backward, call `activate` and `slope` with an Activation; the compiler keeps the one that is
meant. exp is a range reduction and a polynomial in plain arithmetic, because calls into the C library are scalar: 2.6
ns per SiLU of one element against 0.5. Errors, in units in the last place of float32, are in tests/test_epilogue.py.
"""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

from groupnorm._core.problem import ACTIVATIONS
from groupnorm._engines.cpu.compiler import inlined
from groupnorm._engines.cpu.simd import F64, I32, LANES, absolute, bits, fma, select

__all__ = ["ACTIVATION_CODES", "activate", "activation", "exp", "expm1", "slope"]

ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
_NAMES = dict(enumerate(ACTIVATIONS))


class Activation(types.Type):  # type: ignore[misc]
    """Which activation; a type without a value."""

    def __init__(self, label: str) -> None:
        self.label = label
        super().__init__(name=f"Activation({label})")


register_model(Activation)(models.OpaqueModel)


@intrinsic(prefer_literal=True)
def activation(typingctx: Any, code: Any) -> Any:
    """The Activation of a constant code; None for none, so that kernels can leave the step out."""
    label = _NAMES[code.literal_value]
    kind = types.none if label is None else Activation(label)
    return kind(code), lambda context, builder, sig, args: context.get_dummy_value()


# ---- exp, expm1: 2^k * p(r) with x = k*ln2 + r, |r| <= ln2/2
# -----------------------------------------------------------

_LOG2E = 1.4426950408889634
# Adding 1.5 * 2^(mantissa bits) rounds to a whole number and leaves that number in the low bits. ln2 is split so that
# k*HIGH is exact. The Taylor polynomial of exp(r) - 1 - r needs the degree at which r^(n+1)/(n+1)! is below an eighth
# of a rounding.


def exp(v):
    """e to the power of v, in every lane."""


def expm1(v):
    """e to the power of v, minus 1, exact to the last places also near 0."""


@overload(exp)
def _exp(v):
    reduce = _reduction(v.lane)

    def implementation(v):
        p, low, high = reduce(v)
        return ((p + 1.0) * low) * high

    return implementation


@overload(expm1)
def _expm1(v):
    reduce = _reduction(v.lane)

    def implementation(v):
        p, low, high = reduce(v)
        power = low * high
        return select(power > 1e30, ((p + 1.0) * low) * high, fma(p, power, power - 1.0))

    return implementation


@inlined
def _reduce_f32(v):
    v = select(v > 89.0, 89.0, select(v < -104.0, -104.0, v))
    shifted = fma(v, 1.4426950408889634, 12582912.0)
    k = shifted - 12582912.0
    r = fma(k, 2.12194440e-4, fma(k, -0.693359375, v))
    p = fma(r, 1.9841270e-4, 1.3888889e-3)
    p = fma(p, r, 8.3333333e-3)
    p = fma(p, r, 4.1666667e-2)
    p = fma(p, r, 1.6666667e-1)
    p = fma(p, r, 0.5)
    whole = bits(shifted) - 0x4B400000
    half = whole >> 1
    return fma(p * r, r, r), bits((half + 127) << 23), bits((whole - half + 127) << 23)


@inlined
def _reduce_f64(v):
    v = select(v > 710.0, 710.0, select(v < -746.0, -746.0, v))
    shifted = fma(v, 1.4426950408889634, 6755399441055744.0)
    k = shifted - 6755399441055744.0
    r = fma(k, -1.9082149292705877e-10, fma(k, -0.69314718036912382, v))
    p = fma(r, 1.6059043836821613e-10, 2.08767569878681e-09)
    p = fma(p, r, 2.505210838544172e-08)
    p = fma(p, r, 2.755731922398589e-07)
    p = fma(p, r, 2.7557319223985893e-06)
    p = fma(p, r, 2.48015873015873e-05)
    p = fma(p, r, 1.984126984126984e-04)
    p = fma(p, r, 1.3888888888888889e-03)
    p = fma(p, r, 8.333333333333333e-03)
    p = fma(p, r, 4.1666666666666664e-02)
    p = fma(p, r, 1.6666666666666666e-01)
    p = fma(p, r, 0.5)
    whole = bits(shifted) - 0x4338000000000000
    half = whole >> 1
    return fma(p * r, r, r), bits((half + 1023) << 52), bits((whole - half + 1023) << 52)


def _reduction(lane: str) -> Any:
    return {"f32": _reduce_f32, "f64": _reduce_f64}[lane]


# ---- the normal distribution: cumulative(z) and density(z), for gelu
# ---------------------------------------------------


def cumulative(v):
    """P(Z <= v) = erfc(-v/sqrt(2))/2, in every lane."""


@overload(cumulative)
def _cumulative(v):
    return {"f32": _cumulative_f32, "f64": lambda v: 0.5 * _erfc(v * -0.7071067811865476)}[v.lane]


def _cumulative_f32(v):
    # The tail Q(a) = exp(-a^2/2) * t*p(t), t = 1/(1 + a/4): p interpolates Q(a)*exp(a^2/2)/t at ten Chebyshev points of
    # t for a in 0..14 (computed with 40 digits), with a relative error below 1.3e-8.
    a = absolute(v)
    t = 1.0 / fma(a, 0.25, 1.0)
    p = fma(t, 0.01538360334098477, -0.05634546429625247)
    p = fma(p, t, 0.03661525497398492)
    p = fma(p, t, 0.048318083378239375)
    p = fma(p, t, -0.0036779593598377327)
    p = fma(p, t, 0.09537556828021075)
    p = fma(p, t, 0.06901163609135755)
    p = fma(p, t, 0.09615086467439878)
    p = fma(p, t, 0.09941662312542134)
    p = fma(p, t, 0.09975179218780739)
    tail = p * t * exp(a * a * -0.5)
    return select(v > 0.0, 1.0 - tail, tail)


@intrinsic
def _erfc(typingctx: Any, v: Any) -> Any:
    """The C library's erfc, lane by lane: for float64, where accuracy matters more than speed."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        function = builder.module.globals.get("erfc") or ir.Function(
            builder.module, ir.FunctionType(F64, [F64]), "erfc"
        )
        result = args[0]
        for lane in range(LANES):
            value = builder.call(function, [builder.extract_element(args[0], I32(lane))])
            result = builder.insert_element(result, value, I32(lane))
        return result

    return v(v), lower


# ---- activations -----------------------------------------------------------------------------------------------------

_K = 0.7978845608028654  # sqrt(2/pi)


@inlined
def _sigmoid(z):
    return 1.0 / (exp(0.0 - z) + 1.0)


@inlined
def _sigmoid_both(z):
    """sigmoid(z) and sigmoid(-z), each to full precision: 1 - sigmoid(z) would cancel for large z, and slopes multiply
    it by z.
    """
    e = exp(0.0 - z)
    s = 1.0 / (e + 1.0)
    return s, select(z < 0.0, 1.0 - s, e * s)


@inlined
def _finite(z):
    """z within a range at whose ends every slope has reached 0 or 1 exactly, so that infinity * 0 cannot arise."""
    return select(z > 1000.0, 1000.0, select(z < -1000.0, -1000.0, z))


@inlined
def _tanh(z):
    z = select(z > 20.0, 20.0, select(z < -20.0, -20.0, z))  # tanh(20) is 1 in float64
    e = expm1(z + z)
    return e / (e + 2.0)


@inlined
def _gelu_tanh_inner(z):
    return (z * _K) * fma(z * z, 0.044715, 1.0)


@inlined
def _gelu_tanh_slope(z):
    z = _finite(z)
    s, rest = _sigmoid_both(2.0 * _gelu_tanh_inner(z))  # s is (1 + tanh(u))/2
    return fma(z * (s * rest), (2.0 * _K) * fma(z * z, 3 * 0.044715, 1.0), s)


@inlined
def _silu_slope(z):
    z = _finite(z)
    s, rest = _sigmoid_both(z)
    return s * fma(z, rest, 1.0)


@inlined
def _tanh_slope(z):
    t = _tanh(z)
    return fma(t, 0.0 - t, 1.0)


@inlined
def _sigmoid_slope(z):
    s, rest = _sigmoid_both(z)
    return s * rest


@inlined
def _hardswish(z):
    t = z + 3.0
    return z * select(t < 0.0, 0.0, select(t > 6.0, 6.0, t)) * (1 / 6)


@inlined
def _hardswish_slope(z):
    return select(z <= -3.0, 0.0, select(z >= 3.0, 1.0, fma(z, 1 / 3, 0.5)))


_FORMULAS = {  # activation -> (forward, slope)
    "relu": (lambda act, z: select(z < 0.0, 0.0, z), lambda act, z: select(z > 0.0, 1.0, select(z <= 0.0, 0.0, z))),
    "silu": (lambda act, z: z / (exp(0.0 - z) + 1.0), lambda act, z: _silu_slope(z)),
    "gelu": (lambda act, z: z * cumulative(z),
             lambda act, z: fma(z * 0.3989422804014327, exp(z * z * -0.5), cumulative(z))),
    "gelu_tanh": (lambda act, z: z * _sigmoid(2.0 * _gelu_tanh_inner(z)), lambda act, z: _gelu_tanh_slope(z)),
    "sigmoid": (lambda act, z: _sigmoid(z), lambda act, z: _sigmoid_slope(z)),
    "tanh": (lambda act, z: _tanh(z), lambda act, z: _tanh_slope(z)),
    "hardswish": (lambda act, z: _hardswish(z), lambda act, z: _hardswish_slope(z)),
}  # fmt: skip


def activate(act, z):
    """act(z), in every lane."""


def slope(act, z):
    """act'(z), in every lane. Without an activation callers do not ask."""


@overload(activate)
def _activate(act, z):
    return _FORMULAS[act.label][0]


@overload(slope)
def _slope(act, z):
    return _FORMULAS[act.label][1]
