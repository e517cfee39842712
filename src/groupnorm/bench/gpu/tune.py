"""The limits between regimes that are the fastest on this GPU: one number after the other, over a few cases."""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

import groupnorm._engines.gpu as engine
from groupnorm._engines.gpu.device import Limits, current_device
from groupnorm._engines.gpu.plan import Plan, make_plan
from groupnorm.bench.cases import Case
from groupnorm.bench.gpu.cases import GPU_CASES, problem_of
from groupnorm.bench.gpu.contestants import tensors_of
from groupnorm.bench.gpu.timing import copies_for, in_graph_us
from groupnorm.errors import EngineError

__all__ = ["plan_us", "tune"]

_CASES = ("resnet50-conv2", "sd15-64", "sd15-32", "vae-512-mid", "video-20", "vae-1024", "fpn-p3")
_CHOICES: dict[str, tuple[float, ...]] = {  # in this order: what decides most comes first
    "part": (1 << 12, 1 << 13, 1 << 14), "part_backward": (1 << 11, 1 << 12, 1 << 13), "held": (1 << 14, 1 << 15),
    "held_backward": (1 << 13, 1 << 14), "cluster": (1, 2, 4, 8),
    "per_warp": (1 << 9, 1 << 10, 1 << 11), "lanes": (1, 2, 4), "in_l2": (0.0, 0.2, 0.4, 0.6), "lag": (1, 2),
    "waves": (4, 8, 16),
}  # fmt: skip


def plan_us(plan: Plan, case: Case, dtype: str, layout: str) -> float:
    """Microseconds of a plan in a graph, cold. Raises EngineError where the device refuses its regime."""
    p = plan.problem
    arrays = 2 if p.task == "forward" else 3
    count = copies_for(arrays * case.elements * p.itemsize, plan.device.l2_bytes)
    made = [_call(plan, case, tensors_of(case, dtype, layout)) for _ in range(count)]
    found = in_graph_us(made)
    if engine.INSTEAD in plan.ready:  # what was measured is another regime's
        raise EngineError(f"the device refused the {plan.regime} regime")
    return found


def _call(plan: Plan, case: Case, tensors: dict[str, Any]) -> Callable[[], None]:
    p = plan.problem
    x, weight, bias = (tensors[name].data_ptr() for name in ("x", "weight", "bias"))
    stats = torch.zeros(2, p.N, p.G, device="cuda") + 1
    out = torch.empty_like(tensors["x"])
    mean, rstd = stats.data_ptr(), stats[1].data_ptr()
    if p.task == "forward":
        given: tuple[int, ...] = (x, out.data_ptr(), weight, bias, 0, 0, 0, 0, mean, rstd)
    else:
        grads = torch.empty(2, p.C, device="cuda", dtype=tensors["weight"].dtype)
        given = (x, 0, weight, bias, 0, 0, 0, 0, mean, rstd, 0, tensors["dy"].data_ptr(), out.data_ptr(),
                 grads.data_ptr(), grads[1].data_ptr())  # fmt: skip
        tensors = {**tensors, "grads": grads}
    kept = tensors, stats, out

    def run() -> None:
        assert kept  # what the addresses point to lives as long as this
        engine.run_at(plan, False, *given)

    return run


def tune(report: Callable[[str], Any], within: Callable[[], bool]) -> dict[str, Any]:
    """The best limits, and what each choice took: geometric mean of microseconds. Stops where `within()` is False."""
    device, limits, tried = current_device(), Limits(), []
    cases = [case for case in GPU_CASES if case.name in _CASES]
    known: dict[Any, float] = {}

    def score(candidate: Limits) -> float:
        total, count = 0.0, 0
        for case in cases:
            for layout in ("NCHW", "NHWC"):
                for task in ("forward", "backward"):
                    plan = make_plan(problem_of(case, task, layout, "bfloat16"), replace(device, limits=candidate))
                    key = case.name, layout, task, str(plan), str(plan.launches)
                    if key not in known:
                        if not within():
                            raise TimeoutError("for lack of time")
                        known[key] = plan_us(plan, case, "bfloat16", layout)
                    total, count = total + math.log(known[key]), count + 1
        return math.exp(total / count)

    best = score(limits)
    for name, choices in _CHOICES.items():
        for choice in choices:
            candidate = replace(limits, **{name: choice})  # type: ignore[arg-type]
            if candidate == limits or not within():
                continue
            try:
                found = score(candidate)
            except Exception as error:  # a choice that does not run is no choice
                tried.append({"name": name, "choice": choice, "failed": str(error)[:200]})
                continue
            tried.append({"name": name, "choice": choice, "us": found})
            if found < 0.99 * best:  # less is noise
                report(f"{name} = {choice}: {found:.2f} us instead of {best:.2f}")
                best, limits = found, candidate
    return {"device": device.name, "limits": asdict(limits), "us": best, "tried": tried}
