"""Exponentials in every lane: a range reduction and a polynomial in plain arithmetic, because calls into the C library
are scalar: 2.6 ns per SiLU of one element against 0.2.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload

from groupnorm._engines.cpu.compiler import inlined
from groupnorm._engines.cpu.simd import (
    I32,
    LANES,
    absolute,
    bits,
    call_intrinsic,
    fma,
    has_feature,
    held,
    opaque,
    quotient,
    reciprocal_estimate,
    select,
    vector_ir,
)

__all__ = ["decay", "expm1", "times_sigmoid"]


# ---- instructions of AVX-512 -----------------------------------------------------------------------------------------


def _has(feature: str) -> bool:
    return has_feature(cpu_target.target_context, feature)


def _has_scaling() -> bool:
    """Whether there are instructions that split a number at the point and that multiply by a power of two."""
    return _has("avx512dq")


def _has_tables() -> bool:
    """Whether one instruction looks up sixteen lanes in a `table`."""
    return _has("avx512f")


def _table(numbers: Any) -> Any:
    """A function of int32 lanes for kernels: in each lane the one of these sixteen numbers that its low four bits count
    to. Only where `_has_tables()`.
    """

    def typing(typingctx: Any, v: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            held_numbers = opaque(builder, ir.Constant(vector_ir("i32"), [int(number) for number in numbers]))
            return call_intrinsic(builder, "llvm.x86.avx512.permvar.si.512", held_numbers.type, held_numbers, args[0])

        return v(v), lower

    return intrinsic(typing)


def _with_rounding(builder: Any, name: str, like: Any, *arguments: Any) -> Any:
    everywhere = (ir.Constant(like, None), ir.Constant(ir.IntType(LANES), -1), I32(4))
    return call_intrinsic(builder, f"llvm.x86.avx512.mask.{name}.ps.512", like, *arguments, *everywhere)


@intrinsic
def _behind_point(typingctx: Any, v: Any) -> Any:
    """v minus the largest whole number that is not above it; 0 for infinite v. Only where `_has_scaling()`."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _with_rounding(builder, "reduce", args[0].type, args[0], I32(1))

    return v(v), lower


@intrinsic
def _scaled(typingctx: Any, v: Any, t: Any) -> Any:
    """v*2^k, k being the largest whole number not above t, also where that is 0 or infinite. Only where
    `_has_scaling()`.
    """

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _with_rounding(builder, "scalef", args[0].type, *args)

    return v(v, t), lower


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
_power_bits = _table(_ROUNDED.view(np.int32) + (np.arange(16) << 19))  # and what `_looked_up` takes off
_power_rest = _table((_EXACT / _ROUNDED - 1).astype(np.float32).view(np.int32))


def decay(act, a):
    """e^-a for a >= 0, in every lane; 0 where that is below the smallest normal number."""


def expm1(v):
    """e to the power of v, minus 1, exact to the last places also near 0."""


@overload(decay)
def _decay(act, a):
    if a.lane == "f64":
        return lambda act, a: _decay_f64(a)
    if _has_tables():
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


# ---- n*sigmoid(v) ----------------------------------------------------------------------------------------------------

# For results of 16 bits, where there is AVX-512, n/(1 + e^-v): with t = -v*log2(e), e^-v = 2^t is a polynomial of what
# lies behind t's point, times 2 to the power of the rest, and nothing has to be kept in range. float16: degree 4
# (minimax, off by 2^-18.5) and `quotient`. bfloat16: degree 3 (2^-13.7) and the estimate of 1/d (2^-14), together a
# twentieth of a unit in the last place: SiLU of 16 in the L1 cache of a Cascade Lake takes 7.9 ns, `safe` 10.9.


def times_sigmoid(act, n, v):
    """n*sigmoid(v), in every lane."""


@overload(times_sigmoid)
def _times_sigmoid(act, n, v):
    def safe(act, n, v):  # from e = e^-|v| in the safe range 1 <= 1 + e <= 2: 1/(1 + e), or e/(1 + e)
        e = decay(act, absolute(v))
        return quotient(select(v < 0.0, n * e, n), e + held(e, 1.0))

    def eleven_digits(act, n, v):
        return quotient(n, _power_11(v * held(v, -_LOG2_E)) + held(v, 1.0))

    def eight_digits(act, n, v):
        return n * reciprocal_estimate(_power_8(v * held(v, -_LOG2_E)) + held(v, 1.0))

    if not (act.coarse and _has_scaling()):
        return safe
    return eight_digits if act.digits <= 8 else eleven_digits


@inlined
def _power_11(t):
    f = _behind_point(t)
    p = fma(f, held(t, 0.013534100697204388), held(t, 0.05201162798573765))
    p = fma(p, f, held(t, 0.24144264179406094))
    p = fma(p, f, held(t, 0.6930038549249969))
    return _scaled(fma(p, f, held(t, 1.0000025915334367)), t)


@inlined
def _power_8(t):
    f = _behind_point(t)
    p = fma(f, held(t, 0.07802442753563445), held(t, 0.2260672952293101))
    p = fma(p, f, held(t, 0.6958334974442837))
    return _scaled(fma(p, f, held(t, 0.9999252201580614)), t)
