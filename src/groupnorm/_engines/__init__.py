"""The engines, and the contract that each one keeps.

An engine is a module with four functions:

    supports(problem) -> str | None      None, or the reason why it cannot take this Problem
    plan(problem, num_threads) -> Plan   frozen; how it will be done; str(plan) explains the choice
    forward(plan, x, y, weight, bias, scale, shift, residual, mask, mean, rstd, moments) -> None
    backward(plan, dy, x, dx, weight, bias, scale, shift, residual, mask, mean, rstd,
             dweight, dbias, dscale, dshift, dresidual) -> None

Callers allocate and engines fill. Arrays that a call does not have are None. Arrays of x's shape are walked as
`problem.walks` says; weight and bias are (C,), scale and shift (N, C), mask (N, S) bool, mean and rstd (N, G) of the
statistics' dtype, moments (N, G, 3) float64 holding (count, mean, M2), all contiguous. For the task "moments" forward
writes moments only; for "normalize" it reads them; for "forward" it writes mean and rstd where they are given. Backward
writes dx and dresidual unless `problem.dx` is False.

The CPU and the GPU engine have a fifth function, `run_at(plan, fresh, x, y, ...)`: the same on addresses in memory
instead of arrays, for front ends whose tensors are no NumPy arrays.
"""

from typing import Any

import numpy as np

from groupnorm._core.problem import Problem

__all__ = ["fill_empty"]


def fill_empty(p: Problem, mean: Any, rstd: Any, zeros: tuple[Any, ...]) -> None:
    """Results for a problem without elements, for every engine: mean 0, variance 0; moments and gradients 0."""
    if mean is not None:
        mean[...] = 0
        with np.errstate(divide="ignore"):
            rstd[...] = 1 / np.sqrt(np.float64(p.eps))
    for array in zeros:
        if array is not None:
            array[...] = 0
