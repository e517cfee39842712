"""The last step of backward, for both layouts: gradients of the parameters from the sums of dz and dz*xhat."""

from functools import cache
from typing import Any

from groupnorm._engines.cpu.compiler import compiled, jitted
from groupnorm._engines.cpu.memory import FLOAT64, NONE, load, load_first, pointer, scratch, store, zeros
from groupnorm._engines.cpu.records import DZ, DZH, call_at, coefficients, plan_at, store_coefficients, sums_at
from groupnorm._engines.cpu.simd import LANES, fma, minimum

__all__ = ["CHANNELS_PER_TASK", "parameters_kernel"]

CHANNELS_PER_TASK = 64  # at most LANES vectors, which a `scratch` holds


@jitted
def _parameters(p, a, task):
    """Equations (10) to (12) for the channels of a task; sums go over samples and parts in their order."""
    sums = pointer(a.sums, FLOAT64)
    dweights, dbiases = scratch(sums), scratch(sums)
    first = task * CHANNELS_PER_TASK
    last = minimum(first + CHANNELS_PER_TASK, p.C)
    for c in range(first, last, LANES):
        store(dweights, c - first, zeros(sums))
        store(dbiases, c - first, zeros(sums))
    for n in range(p.N):
        for c in range(first, last, LANES):  # channels inside: the sums of a sample are neighbours in memory
            lanes = minimum(last - c, LANES)
            s_dz = s_dzh = zeros(sums)
            for part in range(p.parts):
                s_dz += load_first(sums, sums_at(p, n, part, DZ) + c, lanes)
                s_dzh += load_first(sums, sums_at(p, n, part, DZH) + c, lanes)
            if p.scale != NONE or p.shift != NONE:
                index = n * p.C + c
                weight = coefficients(a.weight, p.weight, c, lanes, 1.0)
                bias = coefficients(a.bias, p.bias, c, lanes, 0.0)
                store_coefficients(a.dscale, p.scale, index, fma(weight, s_dzh, bias * s_dz), lanes)
                store_coefficients(a.dshift, p.shift, index, s_dz, lanes)
                factor = coefficients(a.scale, p.scale, index, lanes, 0.0) + 1.0
                s_dz, s_dzh = factor * s_dz, factor * s_dzh
            store(dweights, c - first, load(dweights, c - first) + s_dzh)
            store(dbiases, c - first, load(dbiases, c - first) + s_dz)
    for c in range(first, last, LANES):
        store_coefficients(a.dweight, p.weight, c, load(dweights, c - first), last - c)
        store_coefficients(a.dbias, p.bias, c, load(dbiases, c - first), last - c)


@cache
def parameters_kernel() -> Any:
    """The compiled kernel; one task takes CHANNELS_PER_TASK channels."""

    def kernel(plan, call, task, worker):
        _parameters(plan_at(plan), call_at(call), task)

    return compiled(kernel, "parameters")
