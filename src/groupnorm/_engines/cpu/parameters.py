"""The last step of backward, for both layouts: gradients of the parameters from the sums of dz and dz*xhat."""

from functools import cache
from typing import Any

from groupnorm._engines.cpu.compiler import compiled, jitted
from groupnorm._engines.cpu.memory import FLOAT64, load_first, pointer, zeros
from groupnorm._engines.cpu.records import DZ, DZH, call_at, coefficients, plan_at, store_coefficients, sums_at
from groupnorm._engines.cpu.simd import LANES, fma, minimum

__all__ = ["CHANNELS_PER_TASK", "parameters_kernel"]

CHANNELS_PER_TASK = 64


@jitted
def _parameters(p, a, task):
    """Equations (10) to (12) for the channels of a task; sums go over samples and parts in their order."""
    sums = pointer(a.sums, FLOAT64)
    last = minimum((task + 1) * CHANNELS_PER_TASK, p.C)
    for c in range(task * CHANNELS_PER_TASK, last, LANES):
        lanes = minimum(last - c, LANES)
        weight, bias = coefficients(a.weight, p.weight, c, lanes, 1.0), coefficients(a.bias, p.bias, c, lanes, 0.0)
        dweight = dbias = zeros(sums)
        for n in range(p.N):
            s_dz = s_dzh = zeros(sums)
            for part in range(p.parts):
                s_dz += load_first(sums, sums_at(p, n, part, DZ) + c, lanes)
                s_dzh += load_first(sums, sums_at(p, n, part, DZH) + c, lanes)
            index = n * p.C + c
            factor = coefficients(a.scale, p.scale, index, lanes, 0.0) + 1.0
            dbias = fma(factor, s_dz, dbias)
            dweight = fma(factor, s_dzh, dweight)
            store_coefficients(a.dscale, p.scale, index, fma(weight, s_dzh, bias * s_dz), lanes)
            store_coefficients(a.dshift, p.shift, index, s_dz, lanes)
        store_coefficients(a.dweight, p.weight, c, dweight, lanes)
        store_coefficients(a.dbias, p.bias, c, dbias, lanes)


@cache
def parameters_kernel() -> Any:
    """The compiled kernel; one task takes CHANNELS_PER_TASK channels."""

    def kernel(plan, call, task):
        _parameters(plan_at(plan), call_at(call), task)

    return compiled(kernel, "parameters")
