"""The activations and their slopes on vectors: the end of forward, and the beginning of backward.

Both layouts, forward and backward, call `activate` and `slope` with an Activation; the compiler keeps the one that is
meant. What is rounded to 16 bits takes a shorter way. Errors, in units in the last place, are in
tests/test_epilogue.py.
"""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

from groupnorm._core.problem import ACTIVATIONS
from groupnorm._engines.cpu.compiler import inlined
from groupnorm._engines.cpu.exponentials import decay, expm1, times_sigmoid
from groupnorm._engines.cpu.memory import BF16, F16
from groupnorm._engines.cpu.simd import F64, I32, LANES, absolute, fma, quotient, reciprocal, select, splat

__all__ = ["ACTIVATION_CODES", "activate", "activation", "slope"]

ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
_NAMES = dict(enumerate(ACTIVATIONS))
_DIGITS = {BF16: 8, F16: 11}


class Activation(types.Type):  # type: ignore[misc]
    """Which activation, and the digits (of two) of its results, those of 16 bits being `coarse`; a type without a
    value.
    """

    def __init__(self, label: str, digits: int) -> None:
        self.label, self.digits, self.coarse = label, digits, digits < 24
        super().__init__(name=f"Activation({label}, {digits})")


register_model(Activation)(models.OpaqueModel)


@intrinsic(prefer_literal=True)
def activation(typingctx: Any, code: Any, element: Any) -> Any:
    """The Activation of a constant code, for results of a constant element code; None for none, so that kernels can
    leave the step out. Backward asks for FLOAT32 always: its slopes enter gradients of that type.
    """
    label = _NAMES[code.literal_value]
    kind = types.none if label is None else Activation(label, _DIGITS.get(element.literal_value, 24))
    return kind(code, element), lambda context, builder, sig, args: context.get_dummy_value()


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
    "silu": (lambda act, z: times_sigmoid(act, z, z), _silu_slope),
    "gelu": (lambda act, z: z * cumulative(act, z),
             lambda act, z: fma(z * 0.3989422804014327, decay(act, z * z * 0.5), cumulative(act, z))),
    "gelu_tanh": (lambda act, z: times_sigmoid(act, z, _gelu_tanh_inner(z)), _gelu_tanh_slope),
    "sigmoid": (lambda act, z: _or_nan(z, times_sigmoid(act, splat(z, 1.0), z)), _sigmoid_slope),
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
