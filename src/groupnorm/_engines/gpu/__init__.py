"""The GPU engine: kernels in Python, compiled by Triton.

From outside in: `plan.py` decides how a problem is cut and in which regime it is done; `resident.py`, `split.py`,
`ticketed.py` and `two_pass.py` are the regimes, made of `tiles.py`, `parts.py`, `epilogue.py` and `sync.py`;
`parameters.py` the gradients of weight, bias, scale and shift; `launch.py`, `workspace.py` and `device.py` bring them
to the GPU. How data goes through the chip: docs/gpu.md.
"""

import warnings
from typing import Any

from groupnorm._core.problem import Problem
from groupnorm._engines import fill_empty
from groupnorm._engines.gpu.device import current_device, current_stream, on_device
from groupnorm._engines.gpu.launch import TooLargeError, run
from groupnorm._engines.gpu.plan import Plan, make_plan, refusal
from groupnorm._engines.gpu.workspace import workspace

__all__ = ["INSTEAD", "backward", "forward", "plan", "run_at", "supports"]

INSTEAD = "instead"  # where a plan keeps the one that takes its place


def supports(problem: Problem) -> str | None:
    """None, or the reason why it cannot take this problem: sizes of groups that differ, or arrays with gaps."""
    return refusal(problem)


def plan(problem: Problem, num_threads: int) -> Plan:
    """The plan for the current device; `num_threads` is for engines that have threads."""
    return make_plan(problem, current_device())


def forward(
    plan: Plan, x: Any, y: Any, weight: Any, bias: Any, scale: Any, shift: Any, residual: Any, mask: Any, mean: Any,
    rstd: Any, moments: Any,
) -> None:  # fmt: skip
    """Fill y, and mean and rstd or moments where given: arrays in host memory, for Triton's interpreter."""
    given = (x, y, weight, bias, scale, shift, residual, mask, mean, rstd, moments)
    if not plan.launches:
        fill_empty(plan.problem, mean, rstd, (moments,))
    else:
        run_at(plan, False, *map(_at, given))


def backward(
    plan: Plan, dy: Any, x: Any, dx: Any, weight: Any, bias: Any, scale: Any, shift: Any, residual: Any, mask: Any,
    mean: Any, rstd: Any, dweight: Any, dbias: Any, dscale: Any, dshift: Any, dresidual: Any,
) -> None:  # fmt: skip
    """Fill dx and every other gradient that is given: arrays in host memory, for Triton's interpreter."""
    if not plan.launches:
        fill_empty(plan.problem, None, None, (dweight, dbias, dscale, dshift))
        return
    given = (x, None, weight, bias, scale, shift, residual, mask, mean, rstd, None, dy, dx, dweight, dbias, dscale,
             dshift, dresidual)  # fmt: skip
    run_at(plan, False, *map(_at, given))


def run_at(
    plan: Plan, fresh: bool, x: int, y: int, weight: int, bias: int, scale: int, shift: int, residual: int, mask: int,
    mean: int, rstd: int, moments: int = 0, dy: int = 0, dx: int = 0, dweight: int = 0, dbias: int = 0, dscale: int = 0,
    dshift: int = 0, dresidual: int = 0, low: int = 0,
) -> None:  # fmt: skip
    """Forward or backward, whatever the plan is for, on addresses in the device's memory, 0 where there is no such
    array, on its current stream. For a plan that has launches. `fresh` is for engines that write past caches.
    """
    while INSTEAD in plan.ready:
        plan = plan.ready[INSTEAD]
    device = plan.device.index
    with on_device(device):
        stream = current_stream(device)
        counters = partials = sums = totals = lost = 0
        alive: Any = None
        if plan.counters:
            counters = workspace(device).counters(plan.counters, stream, barrier=plan.regime == "split")
        if plan.floats:
            size = plan.float_bytes
            begin, alive = workspace(device).scratch(size * plan.floats)
            partials = begin if plan.partials else 0
            begin += size * plan.partials
            sums = begin if plan.sums else 0
            begin += size * plan.sums
            totals = begin if plan.totals else 0
            begin += size * plan.totals
            lost = begin if plan.lost else 0
            begin += size * plan.lost
            if plan.statistics_kept:  # what the mean lacks also where the caller wants mean and rstd
                groups = size * plan.problem.N * plan.problem.G
                mean, rstd, low = mean or begin, rstd or begin + groups, begin + 2 * groups
        if plan.statistics is not None:
            run_at(plan.statistics, fresh, x, 0, 0, 0, 0, 0, 0, mask, mean, rstd, low=low)
        bits = (x | y | weight | bias | scale | shift | residual | mask | mean | rstd | moments | dy | dx | dweight
                | dbias | dscale | dshift | dresidual | counters | partials | sums | totals | low | lost)  # fmt: skip
        try:
            run(plan, (x, y, weight, bias, scale, shift, residual, mask, mean, rstd, moments, dy, dx, dweight, dbias,
                       dscale, dshift, dresidual, counters, partials, sums, totals, low, lost), not bits & 15, device,
                stream)  # fmt: skip
        except TooLargeError as error:  # other programs hold a part of the device: from now on without this regime
            warnings.warn(f"the {plan.regime} regime is not used for {plan.problem.task} of such tensors: {error}",
                          RuntimeWarning, stacklevel=2)  # fmt: skip
            plan.ready[INSTEAD] = make_plan(plan.problem, plan.device, without=plan.without | {plan.regime})
            run_at(plan, fresh, x, y, weight, bias, scale, shift, residual, mask, mean, rstd, moments, dy, dx, dweight,
                   dbias, dscale, dshift, dresidual, low)  # fmt: skip
    del alive  # whoever gets this memory now works on this stream, behind these launches


def _at(array: Any) -> int:
    """Where an array in host memory begins, which nothing but the interpreter can use."""
    return 0 if array is None else int(array.ctypes.data)
