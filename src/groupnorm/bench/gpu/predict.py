"""What the GPU engine should take on a GPU that is not here: `python -m groupnorm.bench.gpu.predict`.

Predictions, not measurements: a model of a few numbers, all of them assumptions until `make bench-gpu` has run.

    time = START_US + BARRIER_US * barriers + CLUSTER_US * clusters + LAUNCH_US * (launches - 1)
         + bytes / (memory bandwidth * EFFICIENCY * busy)

`bytes` is what the regime moves through memory: 2 units forward and 3 backward (a unit is the size of x), in two passes
3 and 5. What is read again from L2 costs L2_SHARE of what it would from memory: in the ticketed regime all of it, in
two passes what the end of the first one left there, L2_KEPT of its size. `busy` is the share of multiprocessors that
have a program.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from groupnorm._core.atomic import write_whole
from groupnorm._engines.gpu.plan import Plan, make_plan
from groupnorm.bench.gpu.cases import LAYOUTS, problem_of, select_gpu_cases
from groupnorm.bench.gpu.kernels import ARCHITECTURES

__all__ = ["ASSUMED", "predict_us"]

ASSUMED = {
    "START_US": 2.2,  # a kernel in a graph, from the end of the one before
    "BARRIER_US": 1.5,  # a release and an acquire through L2, with what is stored and loaded around them
    "CLUSTER_US": 0.5,  # the same within a cluster, through shared memory
    "LAUNCH_US": 1.2,  # another kernel in a graph
    "EFFICIENCY": 0.85,  # of the bandwidth on the data sheet
    "L2_SHARE": 0.35,  # what reading a byte again from L2 takes, of reading it from memory
    "L2_KEPT": 0.5,  # share of L2 that holds what was read last
    "BANDWIDTH_BYTES_PER_S": 4.8e12,  # NVIDIA H200 data sheet, SXM
    "COPY": 0.9,  # of it: what a plain copy of large tensors reaches
}


def predict_us(plan: Plan) -> tuple[float, float, float]:
    """Microseconds that a plan should take, that it could take at the least (least traffic at the speed of a copy), and
    the units that it moves through memory.
    """
    p = plan.problem
    unit = p.N * p.C * p.S * p.itemsize
    least, second = (3, 2) if p.task == "backward" else (2, 1)
    kept = {"ticketed": second, "two_pass": min(second, ASSUMED["L2_KEPT"] * plan.device.l2_bytes / unit)}
    units: float = least
    if plan.regime in kept:
        units += second - (1 - ASSUMED["L2_SHARE"]) * kept[plan.regime]
    programs = math.prod(plan.launches[0].grid) * plan.launches[0].multiprocessors
    busy = min(1.0, programs / plan.device.multiprocessors)
    waits = plan.regime in ("split", "ticketed")
    waits_us = ASSUMED["BARRIER_US"] * waits + ASSUMED["CLUSTER_US"] * (plan.regime == "clustered")
    time_us = ASSUMED["START_US"] + waits_us + ASSUMED["LAUNCH_US"] * (len(plan.launches) - 1)
    bandwidth = ASSUMED["BANDWIDTH_BYTES_PER_S"]
    time_us += units * unit / (bandwidth * ASSUMED["EFFICIENCY"] * busy) * 1e6
    return time_us, least * unit / (bandwidth * ASSUMED["COPY"]) * 1e6, units


def main() -> None:
    """Predict the cases of the short tables, for one H200, and write them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--save", type=Path, default=Path("results/offline"))
    options = parser.parse_args()
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
    device = ARCHITECTURES[90]
    rows: list[dict[str, Any]] = []
    for case in select_gpu_cases(headline=True):
        for layout in LAYOUTS:
            for task in ("forward", "backward"):
                plan = make_plan(problem_of(case, task, layout, "bfloat16"), device)
                time_us, least_us, units = predict_us(plan)
                rows.append({
                    "case": case.name, "shape": case.size, "activation": case.activation, "layout": layout,
                    "task": task,
                    "dtype": "bfloat16", "regime": plan.regime, "kernels": [x.kernel for x in plan.launches],
                    "units": round(units, 2), "least_us": round(least_us, 2), "predicted_us": round(time_us, 1),
                })  # fmt: skip
    text = json.dumps({"device": device.name, "assumed": ASSUMED, "predictions": rows}, indent=1) + "\n"
    write_whole(options.save / "predictions.json", text.encode())
    print(f"{len(rows)} predictions for one {device.name}")


if __name__ == "__main__":
    main()
