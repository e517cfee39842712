"""The contract of the GPU engine on a GPU: `make test-gpu`, or `python -m groupnorm.bench.gpu.verify`.

First every option on small shapes (`options.py`), then every case at full size (`full_size.py`), then, where they are
installed, CuPy's arrays, and races in the barriers with compute-sanitizer. What is wrong is printed at once, and what
was found is written after each case. Ends with a table, exits with 1 if anything is wrong.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import util
from itertools import product
from pathlib import Path
from typing import Any

from groupnorm._core.atomic import write_whole
from groupnorm.bench.gpu.cases import LAYOUTS, select_gpu_cases
from groupnorm.bench.gpu.full_size import Check, check_case
from groupnorm.bench.gpu.options import check_options

__all__ = ["main"]

_MODULE = "groupnorm.bench.gpu.verify"
_FOUND = 9  # the exit code that compute-sanitizer is told to give
_LEAST_S = 20.0  # of a tool: less is not worth its start
_RACES = ("resnet50-conv2", "sd15-64", "tiny-64")  # small enough for a tool that watches every access


def _other_libraries() -> list[Check]:
    """CuPy's arrays, which come and go by DLPack."""
    import torch

    if util.find_spec("cupy") is None:
        print("CuPy is not installed: its arrays are not tried")
        return []
    import cupy

    import groupnorm.cuda as gnc

    found = []
    for shape, axis in (((2, 64, 20, 24), 1), ((2, 20, 24, 64), -1)):
        x = torch.randn(shape, device="cuda")
        y = gnc.group_norm(cupy.from_dlpack(x), 8, layout="NCHW" if axis == 1 else "NHWC")
        want = torch.nn.functional.group_norm(x.movedim(axis, 1).double(), 8).movedim(1, axis)
        failure = None if isinstance(y, cupy.ndarray) else f"the result is a {type(y).__name__}"
        used = (torch.as_tensor(y).double() - want).abs().max().item() / 1e-5
        found.append(Check("CuPy's arrays", f"{shape}", "any", used, failure))
    return found


def _races(end: float) -> list[Check]:
    """What compute-sanitizer finds in small cases, up to the moment `end`: races in shared memory, accesses out of
    bounds, barriers that not all threads reach. It does not look at races in global memory, where parts meet: for these
    there are the same bits many times.
    """
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not installed: races are not looked for")
        return []
    found = []
    for what in ("racecheck", "memcheck", "synccheck"):
        seconds = end - time.monotonic()
        if seconds < _LEAST_S:
            print(f"{what} was not begun, for lack of time")
            continue
        command = [tool, "--tool", what, "--error-exitcode", str(_FOUND), sys.executable, "-m", _MODULE, "--cases",
                   ",".join(_RACES), "--repeats", "0", "--no-races", "--minutes", f"{seconds / 60:.2f}"]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
        except subprocess.TimeoutExpired:
            print(f"{what} was not finished in {seconds:.0f} s")
            continue
        summary = [line.strip("= ") for line in (done.stdout + done.stderr).splitlines() if "SUMMARY" in line]
        if not summary:  # nothing was looked at
            print(f"{what} did not run: {(done.stderr or done.stdout)[-300:]}")
            found.append(Check(what, ",".join(_RACES), "all", float("inf"), "it did not run"))
            continue
        bad = done.returncode == _FOUND  # 1: a refused launch, say, which is no error of memory
        found.append(Check(what, ",".join(_RACES), "all", float("inf") if bad else 0.0, summary[-1] if bad else None))
    return found


@dataclass(slots=True)
class _Report:
    """What was found so far: printed at once where it is wrong, and written whenever something is added."""

    path: Path | None
    head: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def bad(self) -> list[Check]:
        """What is wrong."""
        return [check for check in self.checks if check.failure is not None or not check.used <= 1]

    def add(self, checks: list[Check]) -> None:
        """Take up what was found."""
        known = len(self.bad)
        self.checks += checks
        for check in self.bad[known:]:
            how = check.failure or f"{check.used:.2f} of what is allowed"
            print(f"WRONG {check.what}: {check.case}, {check.regime}: {how}", flush=True)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = [{name: getattr(check, name) for name in check.__slots__} for check in self.checks]
            record = {**self.head, "left": self.left, "checks": rows}
            write_whole(self.path, (json.dumps(record, indent=1) + "\n").encode())

    def show(self) -> None:
        """The worst of each kind."""
        for what in dict.fromkeys(check.what for check in self.checks):
            of_kind = [check for check in self.checks if check.what == what]
            worst = max(of_kind, key=lambda check: check.used)
            print(f"{what:18} {len(of_kind):5} comparisons, worst {worst.used:.2f} of what is allowed ({worst.case}, "
                  f"{worst.regime})")  # fmt: skip
        if self.left:
            print(f"not begun, for lack of time: {', '.join(self.left)}")
        print(end="", flush=True)


def _device_is_lost() -> bool:
    """Whether every call on the device fails from now on, as it does after an access out of bounds."""
    import torch

    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"the device is lost: {error}", flush=True)
        return True
    return False


def _tried(what: str, run: Callable[[], list[Check]]) -> list[Check]:
    """What a check finds, or what it raised."""
    try:
        return run()
    except Exception as error:
        return [Check("runs", what, "any", float("inf"), f"{type(error).__name__}: {error}"[:200])]


def main() -> None:
    """Check, print the worst of each kind, write what was found."""
    parser = argparse.ArgumentParser(description="The contract of the GPU engine at full size.")
    parser.add_argument("--cases", help="names, with commas; all if left away")
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing after that")
    parser.add_argument("--no-races", action="store_true")
    parser.add_argument("--save", type=Path, help="the folder for the records")
    options = parser.parse_args()
    import torch

    from groupnorm._engines.gpu.device import describe_device

    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA GPU: torch.cuda.is_available() is False here")
    names = options.cases.split(",") if options.cases else None
    end = time.monotonic() + 60 * options.minutes
    path = options.save / describe_device(0).slug / "gpu-checks.json" if options.save else None
    report = _Report(path, {"device": torch.cuda.get_device_name(), "torch": torch.__version__})
    report.add(_tried("options", check_options))
    lost = _device_is_lost()
    for case, dtype, layout in product(select_gpu_cases(), ("bfloat16", "float32", "float16"), LAYOUTS):
        if names is not None and case.name not in names:
            continue
        what = f"{case.name} {dtype} {layout}"
        if lost or time.monotonic() > end:
            report.left.append(what)
            continue
        repeats = options.repeats // (1 if case.elements < 1 << 21 else 100)
        report.add(_tried(what, partial(check_case, case, dtype, layout, repeats)))
        lost = _device_is_lost()
    if not lost:
        report.add(_tried("other libraries", _other_libraries))
    report.show()
    if not options.no_races:
        report.add(_races(end))
        report.show()
    raise SystemExit(1 if report.bad else 0)


if __name__ == "__main__":
    main()
