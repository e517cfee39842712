"""The contract of the GPU engine at full size, on a GPU: `make test-gpu`, or `python -m groupnorm.bench.gpu.verify`.

For every case, type, layout and direction, in every regime that can take it: y and the gradients against the formula in
float64 on the same GPU; the same bits in 1000 repetitions (10 beyond 2^21 elements) with other work between them; a
sample alone against the same sample in its batch; constant groups; NaN in one group. Then, where they are installed,
CuPy's arrays, and races in the barriers with compute-sanitizer. Ends with a table, exits with 1 if anything is wrong.

Budgets are the promises of docs/numerics.md: y as there, before its rounding to 16 bits; gradients at most twice as far
from the exact ones, in the 2-norm, as the plain formula in float32, and a rounding of their own type.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

from groupnorm._core.atomic import write_whole
from groupnorm.bench.cases import Case
from groupnorm.bench.gpu.cases import LAYOUTS, select_gpu_cases

__all__ = ["Check", "check_case", "main"]

Tensor = Any

_UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
_FLOAT32 = 2.0**-24
_GRADIENTS = ("dx", "dweight", "dbias")
_STEEPEST = {None: 1.0, "relu": 1.0, "silu": 1.1}  # how far an activation stretches an error, of those in the cases
_RACES = ("resnet50-conv2", "sd15-64", "tiny-64")  # small enough for a tool that watches every access


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: what, in which case and regime, how far of what is allowed (1 is the limit), or what went
    wrong.
    """

    what: str
    case: str
    regime: str
    used: float
    failure: str | None = None


def check_case(case: Case, dtype: str, layout: str, repeats: int, device: str = "cuda") -> list[Check]:
    """All comparisons of a case in one type and layout."""
    from groupnorm._engines.gpu import INSTEAD
    from groupnorm._engines.gpu.device import current_device
    from groupnorm._engines.gpu.plan import REGIMES, make_plan
    from groupnorm.bench.gpu.cases import problem_of
    from groupnorm.errors import EngineError

    name = f"{case.name} {dtype} {layout}"
    data = _data(case, dtype, layout, device)
    wanted = _exact(case, data)
    found: list[Check] = []
    for regime in REGIMES:
        try:
            for task in ("forward", "backward"):
                make_plan(problem_of(case, task, layout, dtype), current_device(), regime)
        except EngineError:
            continue
        try:
            with _forced(regime) as made:
                results = _compare(case, data, wanted, dtype, regime, name, repeats)
            if any(INSTEAD in plan.ready for plan in made):  # what was compared is another regime's
                results = [Check("runs", name, regime, float("inf"), "the device refused the launch")]
            found += results
        except Exception as error:  # whatever a driver or a compiler says belongs into the table
            found.append(Check("runs", name, regime, float("inf"), f"{type(error).__name__}: {error}"[:200]))
    return found


def _data(case: Case, dtype: str, layout: str, device: str) -> dict[str, Tensor]:
    import torch

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    format_ = torch.contiguous_format
    if layout == "NHWC":
        format_ = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(case.shape), format_)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(kind)

    channels = case.shape[1]
    column = (channels, *[1] * (len(case.shape) - 2))
    x = torch.randn(case.shape, device=device) + torch.rand(column, device=device)  # channels differ in their means
    return {"x": x.to(kind).to(memory_format=format_), "dy": normal(*case.shape).to(memory_format=format_),
            "weight": normal(channels), "bias": normal(channels)}  # fmt: skip


def _formula(case: Case, data: dict[str, Tensor], kind: Any) -> dict[str, Tensor]:
    """y and gradients by PyTorch's own operations, in another type."""
    import torch

    from groupnorm.torch import composite

    with torch.enable_grad():
        given = {name: tensor.to(kind).requires_grad_(name != "dy") for name, tensor in data.items()}
        inputs = given["x"], given["weight"], given["bias"]
        x, weight, bias = inputs
        y = composite.group_norm(x, case.num_groups, weight, bias, case.eps, case.activation, *[None] * 4)
        found = torch.autograd.grad(y, inputs, given["dy"])
    return {"y": y.detach(), **dict(zip(_GRADIENTS, found, strict=True))}


def _exact(case: Case, data: dict[str, Tensor]) -> dict[str, Any]:
    """y and gradients in float64, what y's budget is a part of, and how far the plain formula in float32 is from the
    gradients.
    """
    import torch

    exact, plain = (_formula(case, data, kind) for kind in (torch.float64, torch.float32))
    reached = {name: _distance(plain[name], exact[name]) for name in _GRADIENTS}
    x = data["x"].double()
    flat = x.reshape(case.shape[0], case.num_groups, -1)
    mean, std = flat.mean(2, keepdim=True), flat.std(2, correction=0, keepdim=True)
    xhat = ((flat - mean) / std).reshape(case.shape)
    column = (1, -1, *[1] * (len(case.shape) - 2))
    weight, bias = data["weight"].double().abs().view(column), data["bias"].double().abs().view(column)
    size = (weight * xhat.abs() + bias + weight).reshape(flat.shape) * (1 + mean.abs() / std)
    return {**exact, "size": size.reshape(case.shape), "reached": reached}


def _distance(found: Tensor, exact: Tensor) -> float:
    """The 2-norm of the error, as a part of what is exact."""
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@contextmanager
def _forced(regime: str) -> Iterator[list[Any]]:
    """All plans for y and dx are in this regime; gives those that were made."""
    import groupnorm._engines.gpu as engine
    from groupnorm._engines.gpu.device import current_device
    from groupnorm._engines.gpu.plan import make_plan
    from groupnorm.torch import call

    made: list[Any] = []

    def plan(problem: Any, num_threads: int) -> Any:
        made.append(make_plan(problem, current_device(), regime))
        return made[-1]

    before = engine.plan
    engine.plan = plan
    call._kinds.clear()
    try:
        yield made
    finally:
        engine.plan = before
        call._kinds.clear()


def _run(case: Case, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Forward and backward by the engine."""
    from groupnorm.torch import call

    x, weight, bias = data["x"], data["weight"], data["bias"]
    kind = call.kind_of(x, case.num_groups, weight, bias, case.eps, case.activation, None, None, None, None, None)
    y, stats = call.forward(kind, x, weight, bias, None, None, None, None, None, True)
    needs = (True, True, True, False, False, False)
    found = call.backward(kind, data["dy"], x, weight, bias, None, None, None, None, stats, needs)
    return {"y": y, "dx": found.dx, "dweight": found.dweight, "dbias": found.dbias, "stats": stats}


def _compare(
    case: Case, data: dict[str, Tensor], wanted: dict[str, Tensor], dtype: str, regime: str, name: str, repeats: int
) -> list[Check]:
    import torch

    from groupnorm.torch import composite

    got = _run(case, data)
    unit = _UNIT[dtype]
    rounding = 0.0 if dtype == "float32" else unit
    size, y = wanted["size"] * _STEEPEST[case.activation], wanted["y"]
    allowed = 4 * _FLOAT32 * (size + y.abs()) + rounding * y.abs() + 1e-30
    found = [Check("y", name, regime, ((got["y"].double() - y).abs() / allowed).max().item())]
    for gradient in _GRADIENTS:
        most = 2 * max(wanted["reached"][gradient], _FLOAT32) + rounding
        found.append(Check(gradient, name, regime, _distance(got[gradient], wanted[gradient]) / most))
    other = torch.empty(64 << 20, dtype=torch.uint8, device=data["x"].device)  # what lies in L2 is to differ
    for again in range(repeats):
        if again % 7 == 0:
            other.fill_(again & 255)
        now = _run(case, data)
        wrong = [key for key in got if not torch.equal(got[key], now[key])]
        if wrong:
            found.append(Check("same bits", name, regime, float("inf"), f"{', '.join(wrong)} differ in run {again}"))
            break
    else:
        found.append(Check("same bits", name, regime, 0.0))
    if case.shape[0] > 1:
        alone = {key: tensor[:1].clone(memory_format=torch.preserve_format) if tensor.dim() > 1 else tensor
                 for key, tensor in data.items()}  # fmt: skip
        one = _run(case, alone)
        same = torch.equal(one["y"], got["y"][:1]) and torch.equal(one["dx"], got["dx"][:1])
        found.append(
            Check("a sample alone", name, regime, 0.0 if same else float("inf"), None if same else "other bits")
        )
    broken = data["x"].clone(memory_format=torch.preserve_format)
    broken[(0,) * broken.dim()] = float("nan")
    now, size = _run(case, {**data, "x": broken})["y"], (case.shape[0], case.num_groups, -1)
    intact = torch.isclose(now, got["y"], rtol=0, atol=0).reshape(size).all(2)
    lost = not now.reshape(size)[0, 0].isnan().all() or int((~intact).sum()) != 1
    found.append(Check("NaN in one group", name, regime, float("inf") if lost else 0.0, "in others" if lost else None))
    constant = _run(case, {**data, "x": torch.full_like(data["x"], 1234.5)})["y"]
    bias = data["bias"].view(1, -1, *[1] * (len(case.shape) - 2)).float()
    expected = bias if case.activation is None else composite.ACTIVATIONS[case.activation](bias)
    used = ((constant.float() - expected).abs() / (2 * unit * expected.abs() + 1e-6)).max().item()
    return [*found, Check("a constant group", name, regime, used)]


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


def _races(seconds: float) -> list[Check]:
    """What compute-sanitizer finds in small cases, in so many seconds: races in shared memory, accesses out of bounds,
    barriers that not all threads reach. It does not look at races in global memory, where parts meet: for these there
    are the same bits many times.
    """
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not installed: races are not looked for")
        return []
    found = []
    end = time.monotonic() + seconds
    for what in ("racecheck", "memcheck", "synccheck"):
        remaining = max(1.0, (end - time.monotonic()) / 60)
        command = [tool, "--tool", what, "--error-exitcode", "9", sys.executable, "-m", __name__, "--cases",
                   ",".join(_RACES), "--repeats", "0", "--no-races", "--minutes", f"{remaining:.2f}"]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60 * remaining)
        except subprocess.TimeoutExpired:
            print(f"{what} was not finished in {remaining:.1f} minutes")
            continue
        lines = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
        bad = done.returncode == 9
        found.append(
            Check(what, ",".join(_RACES), "all", float("inf") if bad else 0.0, lines[-1] if bad and lines else None)
        )
    return found


def main() -> None:
    """Check, print the worst of each kind, write what was found."""
    parser = argparse.ArgumentParser(description="The contract of the GPU engine at full size.")
    parser.add_argument("--cases", help="names, with commas; all if left away")
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no case after that")
    parser.add_argument("--no-races", action="store_true")
    parser.add_argument("--save", type=Path, help="the folder for the records")
    options = parser.parse_args()
    import torch

    from groupnorm._engines.gpu.device import describe_device

    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA GPU: torch.cuda.is_available() is False here")
    names = options.cases.split(",") if options.cases else None
    begin, checks, left = time.monotonic(), [], []
    for case in select_gpu_cases():
        for dtype in ("bfloat16", "float32", "float16"):
            for layout in LAYOUTS:
                if names is not None and case.name not in names:
                    continue
                if time.monotonic() - begin > 60 * options.minutes:
                    left.append(f"{case.name} {dtype} {layout}")
                    continue
                small = case.elements < 1 << 21
                checks += check_case(case, dtype, layout, options.repeats // (1 if small else 100))
                torch.cuda.empty_cache()
    checks += _other_libraries()
    if not options.no_races:
        checks += _races(max(60.0, 60 * options.minutes - (time.monotonic() - begin)))
    bad = [check for check in checks if check.failure is not None or not check.used <= 1]
    for check in bad:
        how = check.failure or f"{check.used:.2f} of what is allowed"
        print(f"WRONG {check.what}: {check.case}, {check.regime}: {how}")
    for what in dict.fromkeys(check.what for check in checks):
        of_kind = [check for check in checks if check.what == what]
        worst = max(of_kind, key=lambda check: check.used)
        print(f"{what:18} {len(of_kind):5} comparisons, worst {worst.used:.2f} of what is allowed ({worst.case}, "
              f"{worst.regime})")  # fmt: skip
    if left:
        print(f"not begun, for lack of time: {', '.join(left)}")
    if options.save:
        record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "left": left,
                  "checks": [{name: getattr(check, name) for name in check.__slots__} for check in checks]}  # fmt: skip
        folder = options.save / describe_device(0).slug
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "gpu-checks.json", (json.dumps(record, indent=1) + "\n").encode())
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
