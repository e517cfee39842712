"""The last step of backward, for both layouts: gradients of the parameters from the sums of dz and dz*xhat."""

from functools import cache
from typing import Any

from groupnorm._engines.cpu.compiler import compiled, jitted
from groupnorm._engines.cpu.memory import FLOAT64, load_one, pointer
from groupnorm._engines.cpu.records import call_at, coefficient, plan_at, store_coefficient

__all__ = ["CHANNELS_PER_TASK", "parameters_kernel"]

CHANNELS_PER_TASK = 64


@jitted
def _parameters(p, a, task):
    """Equations (10) to (12) for the channels of a task; sums go over samples and parts in their order."""
    sums = pointer(a.sums, FLOAT64)
    for c in range(task * CHANNELS_PER_TASK, min((task + 1) * CHANNELS_PER_TASK, p.C)):
        weight, bias = coefficient(a.weight, p.weight, c, 1.0), coefficient(a.bias, p.bias, c, 0.0)
        dweight = dbias = 0.0
        for n in range(p.N):
            s_dz = s_dzh = 0.0
            for part in range(p.parts):
                at = n * p.sum_n + c * p.sum_c + part * p.sum_part
                s_dz += load_one(sums, at)
                s_dzh += load_one(sums, at + p.sum_next)
            index = n * p.C + c
            factor = 1.0 + coefficient(a.scale, p.scale, index, 0.0)
            dbias += factor * s_dz
            dweight += factor * s_dzh
            store_coefficient(a.dscale, p.scale, index, weight * s_dzh + bias * s_dz)
            store_coefficient(a.dshift, p.shift, index, s_dz)
        store_coefficient(a.dweight, p.weight, c, dweight)
        store_coefficient(a.dbias, p.bias, c, dbias)


@cache
def parameters_kernel() -> Any:
    """The compiled kernel; one task takes CHANNELS_PER_TASK channels."""

    def kernel(plan, call, task):
        _parameters(plan_at(plan), call_at(call), task)

    return compiled(kernel, "parameters")
