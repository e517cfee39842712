"""The activations and their slopes on vectors: the end of forward, and the beginning of backward.

Both layouts, forward and backward, call `activate` and `slope` with an Activation; the compiler keeps the one that is
meant. Exponentials are a range reduction and a polynomial in plain arithmetic, because calls into the C library are
scalar: 2.6 ns per SiLU of one element against 0.2. What is rounded to 16 bits takes a shorter polynomial. Errors, in
units in the last place, are in tests/test_epilogue.py.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

from groupnorm._core.problem import ACTIVATIONS
from groupnorm._engines.cpu.compiler import inlined
from groupnorm._engines.cpu.memory import BF16, F16
from groupnorm._engines.cpu.simd import (
    F64,
    I32,
    LANES,
    absolute,
    bits,
    fma,
    has_tables,
    held,
    quotient,
    reciprocal,
    select,
    splat,
    table,
)

__all__ = ["ACTIVATION_CODES", "activate", "activation", "decay", "expm1", "slope"]

ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
_NAMES = dict(enumerate(ACTIVATIONS))


class Activation(types.Type):  # type: ignore[misc]
    """Which activation, and whether its results are `coarse`, to be rounded to 16 bits; a type without a value."""

    def __init__(self, label: str, coarse: bool) -> None:
        self.label, self.coarse = label, coarse
        super().__init__(name=f"Activation({label}, {coarse})")


register_model(Activation)(models.OpaqueModel)


@intrinsic(prefer_literal=True)
def activation(typingctx: Any, code: Any, element: Any) -> Any:
    """The Activation of a constant code, for results of a constant element code; None for none, so that kernels can
    leave the step out. Backward asks for FLOAT32 always: its slopes enter gradients of that type.
    """
    label = _NAMES[code.literal_value]
    kind = types.none if label is None else Activation(label, element.literal_value in (F16, BF16))
    return kind(code, element), lambda context, builder, sig, args: context.get_dummy_value()


# ---- e^-a for a >= 0, and expm1 --------------------------------------------------------------------------------------

# float32: e^-a = 2^-t with t = a*log2(e), split in two. Adding 1.5 * 2^(23 - n) rounds t to k in steps of 2^-n and
# leaves k in the low bits, from where it is shifted into the exponent; g = k - t is what remains. Without AVX-512 n is
# 0, and the polynomials of 2^g are minimax with p(0) = 1, off by 2^-26 (degree 6) and 2^-18.4 (degree 4, for 16-bit
# results). With it n is 4: the power of the four bits behind the point comes from a table in a register, what rounding
# has taken from it from another, and 2^g from polynomials of degree 3 and 2, off by 2^-29 and 2^-21.
# float64 and expm1: e^v = 2^k * e^r with ln2 split so that k*HIGH is exact, and the Taylor polynomial of e^r - 1 - r of
# the degree at which r^(n+1)/(n+1)! is below an eighth of a rounding.

_LOG2_E, _LOG2_E_REST = 1.44269502162933349609375, 1.925963033500e-08
_EXACT = 2.0 ** (-np.arange(16) / 16)
_ROUNDED = _EXACT.astype(np.float32)
_power_bits = table(_ROUNDED.view(np.int32) + (np.arange(16) << 19))  # and what `_looked_up` takes off
_power_rest = table((_EXACT / _ROUNDED - 1).astype(np.float32).view(np.int32))


def decay(act, a):
    """e^-a for a >= 0, in every lane; 0 where that is below the smallest normal number."""


def expm1(v):
    """e to the power of v, minus 1, exact to the last places also near 0."""


@overload(decay)
def _decay(act, a):
    if a.lane == "f64":
        return lambda act, a: _decay_f64(a)
    if has_tables():
        return (lambda act, a: _decay_table_coarse(a)) if act.coarse else (lambda act, a: _decay_table(a))
    return (lambda act, a: _decay_coarse(a)) if act.coarse else (lambda act, a: _decay_f32(a))


@inlined
def _decay_table(a):
    shifted = fma(a, held(a, _LOG2_E), held(a, 786432.0))
    g = fma(a, held(a, -_LOG2_E_REST), fma(a, held(a, -_LOG2_E), shifted - held(a, 786432.0)))
    p = fma(g, held(a, 0.05550519376993179), held(a, 0.2402343451976776))
    p = fma(p, g, held(a, 0.6931471824645996))
    return _looked_up(a, shifted, fma(p, g, bits(_power_rest(bits(shifted)))))


@inlined
def _decay_table_coarse(a):
    shifted = fma(a, held(a, _LOG2_E), held(a, 786432.0))
    g = fma(a, held(a, -_LOG2_E), shifted - held(a, 786432.0))
    return _looked_up(a, shifted, fma(g, held(a, 0.24023355543613434), held(a, 0.6931878328323364)) * g)


@inlined
def _looked_up(a, shifted, p):
    """1 + p divided by 2 to the power of the sixteenths in the low bits of `shifted`; 0 where that is no normal
    number.
    """
    k = bits(shifted)
    power = bits(_power_bits(k) - (k << 19))
    return select(a > held(a, 87.3365), 0.0, fma(power, p, power))


@inlined
def _decay_f32(a):
    shifted = fma(a, _LOG2_E, 12582912.0)
    k = shifted - 12582912.0
    g = fma(a, -_LOG2_E_REST, fma(a, -_LOG2_E, k))
    p = fma(g, 0.00015353361959569156, 0.0013398875016719103)
    p = fma(p, g, 0.00961843691766262)
    p = fma(p, g, 0.055503323674201965)
    p = fma(p, g, 0.24022647738456726)
    p = fma(p, g, 0.6931471824645996)
    return _decayed(a, shifted, fma(p, g, 1.0))


@inlined
def _decay_coarse(a):
    shifted = fma(a, _LOG2_E, 12582912.0)
    k = shifted - 12582912.0
    g = fma(a, -_LOG2_E, k)
    p = fma(g, 0.009582852944731712, 0.055906426161527634)
    p = fma(p, g, 0.24024099111557007)
    p = fma(p, g, 0.6931241750717163)
    return _decayed(a, shifted, fma(p, g, 1.0))


@inlined
def _decayed(a, shifted, p):
    """p divided by 2 to the power that lies in the low bits of `shifted`; 0 where that is no normal number."""
    return select(a > 87.3365, 0.0, bits(bits(p) - (bits(shifted) << 23)))


@inlined
def _decay_f64(a):
    p, low, high = _reduce_f64(0.0 - a)
    return ((p + 1.0) * low) * high


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


# ---- the normal distribution, for gelu -------------------------------------------------------------------------------


def cumulative(act, v):
    """P(Z <= v) = erfc(-v/sqrt(2))/2, in every lane."""


@overload(cumulative)
def _cumulative(act, v):
    return {"f32": _cumulative_f32, "f64": lambda act, v: 0.5 * _erfc(v * -0.7071067811865476)}[v.lane]


def _cumulative_f32(act, v):
    # The tail Q(a) = exp(-a^2/2) * t*p(t), t = 1/(1 + a/4): p interpolates Q(a)*exp(a^2/2)/t at ten Chebyshev points of
    # t for a in 0..14 (computed with 40 digits), with a relative error below 1.3e-8.
    a = absolute(v)
    t = quotient(1.0, fma(a, 0.25, 1.0))
    p = fma(t, 0.01538360334098477, -0.05634546429625247)
    p = fma(p, t, 0.03661525497398492)
    p = fma(p, t, 0.048318083378239375)
    p = fma(p, t, -0.0036779593598377327)
    p = fma(p, t, 0.09537556828021075)
    p = fma(p, t, 0.06901163609135755)
    p = fma(p, t, 0.09615086467439878)
    p = fma(p, t, 0.09941662312542134)
    p = fma(p, t, 0.09975179218780739)
    tail = p * t * decay(act, a * a * 0.5)
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
def _times_sigmoid(act, factor, z):
    """factor*sigmoid(z). From e = e^-|z| it is found in the safe range 1 <= 1 + e <= 2: 1/(1 + e), or e/(1 + e)."""
    e = decay(act, absolute(z))
    return quotient(select(z < 0.0, factor * e, factor), e + held(e, 1.0))


@inlined
def _sigmoid_both(act, z):
    """sigmoid(z) and sigmoid(-z), each to full precision: 1 - sigmoid(z) would cancel for large z, and slopes multiply
    it by z.
    """
    e = decay(act, absolute(z))
    large = reciprocal(e + 1.0)
    small = e * large
    return select(z < 0.0, small, large), select(z < 0.0, large, small)


@inlined
def _or_nan(z, result):
    """The result, and NaN for NaN, which may get lost in the bits of an exponential."""
    return select(absolute(z) >= 0.0, result, z)


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
    """2*sqrt(2/pi)*(z + 0.044715*z^3): gelu_tanh(z) is z times the sigmoid of it."""
    return z * fma(z * z, (2.0 * _K) * 0.044715, 2.0 * _K)


def _gelu_tanh_slope(act, z):
    z = _finite(z)
    s, rest = _sigmoid_both(act, _gelu_tanh_inner(z))  # s is (1 + tanh(u))/2
    return fma(z * (s * rest), fma(z * z, (2.0 * _K) * (3 * 0.044715), 2.0 * _K), s)


def _silu_slope(act, z):
    s, rest = _sigmoid_both(act, z)
    return s * fma(z, rest, 1.0)


@inlined
def _tanh_slope(z):
    t = _tanh(z)
    return fma(t, 0.0 - t, 1.0)


def _sigmoid_slope(act, z):
    s, rest = _sigmoid_both(act, z)
    return _or_nan(z, s * rest)


@inlined
def _hardswish(z):
    t = z + 3.0
    return z * select(t < 0.0, 0.0, select(t > 6.0, 6.0, t)) * (1 / 6)


@inlined
def _hardswish_slope(z):
    return select(z <= -3.0, 0.0, select(z >= 3.0, 1.0, fma(z, 1 / 3, 0.5)))


_FORMULAS = {  # activation -> (forward, slope)
    "relu": (lambda act, z: select(z < 0.0, 0.0, z), lambda act, z: select(z > 0.0, 1.0, select(z <= 0.0, 0.0, z))),
    "silu": (lambda act, z: _times_sigmoid(act, z, z), _silu_slope),
    "gelu": (lambda act, z: z * cumulative(act, z),
             lambda act, z: fma(z * 0.3989422804014327, decay(act, z * z * 0.5), cumulative(act, z))),
    "gelu_tanh": (lambda act, z: _times_sigmoid(act, z, _gelu_tanh_inner(z)), _gelu_tanh_slope),
    "sigmoid": (lambda act, z: _or_nan(z, _times_sigmoid(act, splat(z, 1.0), z)), _sigmoid_slope),
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
