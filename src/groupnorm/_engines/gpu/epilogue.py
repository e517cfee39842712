"""What follows xhat in a kernel: gain and offset of each channel, the residual, the activation and its slope.

Without scale, shift and residual z = xhat*weight + bias; with them z = (xhat*weight + bias)*(1 + scale) + shift +
residual, y = act(z): equations (6) to (8) of `groupnorm.reference`. All of it is linear in xhat but the activation, so
a channel has one gain and one offset: z = xhat*gain + offset.
"""

import triton
import triton.language as tl

__all__ = ["activate", "gain_and_offset", "scale_factor", "slope"]

_K = tl.constexpr(0.7978845608028654)  # sqrt(2/pi)
_ROOT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1/sqrt(2*pi)


@triton.jit
def scale_factor(SCALE, n, channel, real, C: tl.constexpr, ACC: tl.constexpr):
    """1 + scale of sample n's channels; without scale 1."""
    if SCALE is not None:
        return 1.0 + tl.load(SCALE + tl.cast(n, tl.int64) * C + channel, mask=real, other=0.0).to(ACC)
    else:
        return tl.full(channel.shape, 1.0, ACC)


@triton.jit
def gain_and_offset(WEIGHT, BIAS, SCALE, SHIFT, n, channel, real, C: tl.constexpr, ACC: tl.constexpr):
    """What z is of xhat in each channel: z = xhat*gain + offset. `channel` is a block of any shape, `real` says which
    of its channels exist.
    """
    gain = tl.full(channel.shape, 1.0, ACC)
    offset = tl.full(channel.shape, 0.0, ACC)
    if WEIGHT is not None:
        gain = tl.load(WEIGHT + channel, mask=real, other=0.0).to(ACC)
    if BIAS is not None:
        offset = tl.load(BIAS + channel, mask=real, other=0.0).to(ACC)
    if SCALE is not None:
        factor = scale_factor(SCALE, n, channel, real, C, ACC)
        gain = gain * factor
        offset = offset * factor
    if SHIFT is not None:
        offset = offset + tl.load(SHIFT + tl.cast(n, tl.int64) * C + channel, mask=real, other=0.0).to(ACC)
    return gain, offset


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z). NaN stays NaN."""
    if ACTIVATION is None:
        return z
    elif ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "silu":
        s, _ = _sigmoid_both(z)
        return z * s
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * _ROOT_HALF))
    elif ACTIVATION == "gelu_tanh":
        s, _ = _sigmoid_both(2.0 * _gelu_tanh_inner(z))
        return z * s
    elif ACTIVATION == "sigmoid":
        s, _ = _sigmoid_both(z)
        return s
    elif ACTIVATION == "tanh":
        return _tanh(z)
    else:
        tl.static_assert(ACTIVATION == "hardswish")
        t = z + 3.0
        return z * tl.where(t < 0, 0.0, tl.where(t > 6.0, 6.0, t)) * (1.0 / 6.0)


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """act'(z); without an activation callers do not ask."""
    if ACTIVATION == "relu":
        return tl.where(z > 0, 1.0, tl.where(z <= 0, 0.0, z))
    elif ACTIVATION == "silu":
        s, rest = _sigmoid_both(z)
        return s * (1.0 + z * rest)
    elif ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(z * _ROOT_HALF)) + z * _DENSITY * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        s, rest = _sigmoid_both(2.0 * _gelu_tanh_inner(z))
        return s + z * s * rest * (2.0 * _K) * (1.0 + 3 * 0.044715 * z * z)
    elif ACTIVATION == "sigmoid":
        s, rest = _sigmoid_both(z)
        return s * rest
    elif ACTIVATION == "tanh":
        t = _tanh(z)
        return 1.0 - t * t
    else:
        tl.static_assert(ACTIVATION == "hardswish")
        return tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, 1.0, z * (1.0 / 3.0) + 0.5))


@triton.jit
def _gelu_tanh_inner(z):
    return z * (1.0 + 0.044715 * z * z) * _K


@triton.jit
def _sigmoid_both(z):
    """sigmoid(z) and 1 - sigmoid(z), each with all its digits: taken from 1, the small one would have none left."""
    e = _decay(z)
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(z < 0, small, large), tl.where(z < 0, large, small)


@triton.jit
def _decay(z):
    """exp(-|z|). In float32 not by tl.exp, whose one instruction loses |z| roundings; beyond 87 what is left of it."""
    if z.dtype == tl.float64:
        return tl.exp(-tl.abs(z))
    else:
        t = -tl.abs(z)
        t = tl.where(t < -87.0, -87.0, t)
        k, r = _reduced(t)
        power = ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
        return power * tl.exp2(r * 1.4426950408889634)


@triton.jit
def _reduced(v):
    """k and r with v = k*ln(2) + r, k whole and |r| <= ln(2)/2. ln(2) is in two parts: k times the first is exact."""
    k = tl.floor(v * 1.4426950408889634 + 0.5)
    return k, (v - k * 0.693145751953125) - k * 1.42860682030941723212e-6


@triton.jit
def _tanh(z):
    """e/(e + 2) with e = exp(2z) - 1: exact to rounding near 0, where 2*sigmoid(2z) - 1 loses every digit. Not
    libdevice's, which Triton's interpreter lacks.
    """
    z = tl.where(z > 20.0, 20.0, tl.where(z < -20.0, -20.0, z))  # tanh(20) is 1 in float64
    e = _expm1(z + z)
    return e / (e + 2.0)


@triton.jit
def _expm1(v):
    """exp(v) - 1 = 2^k * (exp(r) - 1) + (2^k - 1), exp(r) - 1 by its Taylor series."""
    TERMS: tl.constexpr = 14 if v.dtype == tl.float64 else 8  # the first one left out is below a rounding
    k, r = _reduced(v)
    p = tl.full(v.shape, 1.0, v.dtype)
    for i in tl.static_range(TERMS, 1, -1):
        p = 1.0 + p * r * (1.0 / i)
    power = tl.exp2(k)
    return power * (p * r) + (power - 1.0)
