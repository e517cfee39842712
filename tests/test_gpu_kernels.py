"""What the compiler makes of the GPU kernels: no spills, no stack, wide loads and stores, registers within the plan.

All kernels of all cases are compiled by `make gpu-kernels`, which takes ten minutes; what it found lies in
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
