"""What the compiler makes of the GPU kernels: no spills, no stack, wide loads and stores, registers within the plan.

All kernels of all cases are compiled by `make gpu-kernels`, which takes twenty minutes; what it found lies in
results/offline and must be of these sources. A few are compiled anew here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.9")

from groupnorm._engines.gpu.plan import REGIMES
from groupnorm.bench.gpu.kernels import ARCHITECTURES, source_hash

FOLDER = Path(__file__).parents[1] / "results" / "offline"


@pytest.mark.parametrize(("capability", "version"), [(80, "3.9"), (90, "3.9"), (100, "3.9"), (90, "3.6")])
def test_records_are_of_these_sources_and_break_no_rule(capability: int, version: str) -> None:
    record = json.loads((FOLDER / f"sm_{capability}-triton-{version}.json").read_text(encoding="utf-8"))
    assert record["source"] == source_hash(), "the engine has changed: make gpu-kernels"
    kernels = record["kernels"]
    assert len(kernels) > 200
    clusters = capability >= 90 and version != "3.6"
    assert {kernel["regime"] for kernel in kernels} == {*REGIMES} - {*([] if clusters else ["clustered"])}
    assert {kernel["multiprocessors"] for kernel in kernels} == ({1, 4, 8} if clusters else {1})
    broken = [
        f"{k['case']} {k['task']} {k['layout']} {k['dtype']} {k['kernel']}: {k['broken']}"
        for k in kernels
        if k["broken"]
    ]
    assert not broken


def test_some_compiled_anew() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "groupnorm.bench.gpu.kernels",
        "--cases",
        "sd15-64,vae-1024",
        "--dtypes",
        "bfloat16",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("kernels") == len(ARCHITECTURES)


@pytest.mark.parametrize(
    ("dtype", "layout", "activation", "mask"),
    [("float16", "NCHW", "tanh", True), ("float64", "NHWC", "gelu", True), ("bfloat16", "NHWC", "hardswish", False)],
)
def test_every_option_compiles(dtype: str, layout: str, activation: str, mask: bool) -> None:
    """What the cases of the benchmark do not have: scale, shift, residual, mask, other types. Tiles are small, so that
    it is quick.
    """
    code = f"""
from groupnorm._core.layout import Walk
from groupnorm._core.problem import Problem
from groupnorm._engines.gpu.device import Device, Limits
from groupnorm._engines.gpu.offline import compile_launch
from groupnorm._engines.gpu.plan import make_plan

limits = Limits(held=1 << 13, held_backward=1 << 13, part=512, part_backward=512, together=256)
device = Device(0, "a small GPU", 90, 4, 1 << 16, limits=limits)
N, C, S, G = 2, 24, 64, 4
walk = Walk(C * S, S, 1) if {layout!r} == "NCHW" else Walk(C * S, 1, C)
for task, names in (("forward", "x y residual"), ("backward", "x dy dx residual dresidual")):
    problem = Problem(
        task, {dtype!r}, N, C, S, G, 1e-5, {activation!r}, {dtype!r}, "float32", "float32", {dtype!r}, mask={mask},
        stats=task == "backward", walks=dict.fromkeys(names.split(), walk),
    )
    for regime in ("resident", "split", "ticketed", "two_pass"):
        for launch in make_plan(problem, device, regime).launches:
            print(compile_launch(make_plan(problem, device, regime), launch, 90).kernel)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(set(done.stdout.split())) == 12
