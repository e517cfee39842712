"""JAX: the operator written with jax.numpy, compiled by XLA. Statistics in float32, as Flax does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from groupnorm.bench.ready import Ready, Unsupported
from groupnorm.bench.work import Work

__all__ = ["prepare"]

_ACTIVATIONS = {
    None: lambda z: z,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda z: jax.nn.gelu(z, approximate=False),
    "gelu_tanh": lambda z: jax.nn.gelu(z, approximate=True),
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "hardswish": jax.nn.hard_swish,
}


def prepare(work: Work) -> Ready:
    """A jitted function; backward is the jitted pullback, with the residuals of a forward that ran before."""
    if work.dtype == "float64":
        raise Unsupported("JAX has no float64 unless the whole process is switched to it")
    groups, eps, axis, act = work.case.num_groups, work.case.eps, work.axis, _ACTIVATIONS[work.activation]

    def function(x: Any, weight: Any, bias: Any) -> Any:
        n, c = work.case.shape[:2]
        shape = (n, groups, c // groups, -1) if axis == 1 else (n, -1, groups, c // groups)
        over = (2, 3) if axis == 1 else (1, 3)
        v = x.astype(jnp.float32).reshape(shape)
        centred = v - v.mean(over, keepdims=True)
        xhat = (centred * jax.lax.rsqrt((centred**2).mean(over, keepdims=True) + eps)).reshape(x.shape)
        along = (1, c) + (1,) * (x.ndim - 2) if axis == 1 else (c,)
        return act(xhat * weight.reshape(along) + bias.reshape(along)).astype(x.dtype)

    inputs = tuple(jnp.asarray(a) for a in (work.x, work.weight, work.bias))
    if work.direction == "forward":
        compiled = jax.jit(function)
        return Ready(lambda: jax.block_until_ready(compiled(*inputs)), lambda y: (np.asarray(y),))
    _, pullback = jax.vjp(function, *inputs)
    apply, dy = jax.jit(lambda f, d: f(d)), jnp.asarray(work.dy)
    return Ready(lambda: jax.block_until_ready(apply(pullback, dy)), lambda found: tuple(np.asarray(a) for a in found))
