"""The GPU engine on a GPU: `make bench-gpu`, or `python -m groupnorm.bench.gpu.measure`.

In this order, each part written as soon as it exists: what the device copies and how long its barrier takes; the limits
between regimes, tuned and kept in tuned/<device>.json; every regime on the shapes that decide between them; all cases
beside every contestant that is installed, forward and backward, cold, in microseconds and percent of the copy.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import groupnorm._engines.gpu as engine
from groupnorm._core.atomic import write_whole
from groupnorm._engines.gpu.device import current_device, describe_device
from groupnorm._engines.gpu.plan import REGIMES, make_plan
from groupnorm.bench.cases import Case
from groupnorm.bench.gpu.cases import GPU_CASES, LAYOUTS, problem_of, select_gpu_cases
from groupnorm.bench.gpu.contestants import CONTESTANTS, tensors_of
from groupnorm.bench.gpu.timing import copies_for, from_python_us, in_graph_us
from groupnorm.bench.gpu.tune import plan_us, tune
from groupnorm.torch import call

__all__ = ["main"]

_COPY_MB = (1, 4, 16, 64, 256)
_DECIDING = ("sd15-64", "sdxl-64", "vae-512-mid", "video-20", "vae-1024", "fpn-p3")  # cases several regimes could take


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="The GPU engine, measured.")
    parser.add_argument("--save", type=Path, default=Path("results"), help="the folder for the records")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing after that")
    parser.add_argument("--no-tune", action="store_true", help="use the limits as they are")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA GPU: torch.cuda.is_available() is False here")
    begin = time.monotonic()

    def within(share: float) -> Callable[[], bool]:
        return lambda: time.monotonic() - begin < 60 * options.minutes * share

    device = current_device()
    folder = options.save / device.slug
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"device": device.name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
                              "triton": __import__("triton").__version__}  # fmt: skip

    def save(name: str, found: Any) -> None:
        record[name] = found
        write_whole(folder / "gpu.json", (json.dumps(record, indent=1) + "\n").encode())

    save("copy", _copies())
    copy_bytes_per_s = max(row["cold_bytes_per_s"] for row in record["copy"])
    save("barrier_us", _tried(_barrier_us))
    if not options.no_tune:
        found = _tried(lambda: tune(print, within(0.4)))
        save("tuned", found)
        if isinstance(found, dict):
            path = Path(engine.__file__).parent / "tuned" / f"{device.slug}.json"
            path.parent.mkdir(exist_ok=True)
            write_whole(path, (json.dumps(found, indent=1) + "\n").encode())
            describe_device.cache_clear()  # from here on with what was tuned
            call._kinds.clear()
    for name, made in (("regimes", _regimes(within(0.55))), ("cases", _cases(within(1.0), copy_bytes_per_s))):
        rows: list[dict[str, Any]] = []
        save(name, rows)
        _tried(partial(_keep_all, made, rows, partial(save, name, rows)))
    _print(record)


def _tried(run: Callable[[], Any]) -> Any:
    """What a measurement gives, or what went wrong: the others go on."""
    try:
        return run()
    except Exception as error:
        print(f"failed: {type(error).__name__}: {error}"[:300])
        return f"failed: {type(error).__name__}: {error}"[:300]


def _keep_all(made: Iterator[dict[str, Any]], rows: list[dict[str, Any]], save: Callable[[], None]) -> None:
    """Write each row as soon as it is there."""
    for row in made:
        rows.append(row)
        save()


def _copies() -> list[dict[str, float]]:
    """What the device copies, bytes read and written, cold and warm."""
    rows = []
    for megabytes in _COPY_MB:
        size = megabytes << 20
        count = copies_for(2 * size, current_device().l2_bytes)
        pairs = torch.empty(count, 2, size, dtype=torch.uint8, device="cuda")
        calls = [lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs]
        rows.append({"megabytes": megabytes, "cold_bytes_per_s": 2 * size / in_graph_us(calls) * 1e6,
                     "warm_bytes_per_s": 2 * size / in_graph_us(calls[:1]) * 1e6})  # fmt: skip
    return rows


def _barrier_us() -> dict[str, float]:
    """What the barrier of split adds: a slab in parts beside the same data in one pass without a barrier."""
    found = {}
    for case in (
        Case("barrier", (1, 64, 64, 64), 2, "a measurement"),
        Case("barrier", (1, 64, 256, 256), 2, "a measurement"),
    ):
        times = {}
        for task, regime in (("forward", "split"), ("normalize", "two_pass")):
            problem = problem_of(case, task, "NCHW", "bfloat16")
            plan = make_plan(problem, current_device(), regime)
            if task == "forward":
                times[task] = plan_us(plan, case, "bfloat16", "NCHW")
            else:
                times[task] = _normalize_us(plan, case)
        found[case.size] = times["forward"] - times["normalize"]
    return found


def _normalize_us(plan: Any, case: Case) -> float:
    tensors = tensors_of(case, "bfloat16", "NCHW")
    moments = torch.ones(plan.problem.N, plan.problem.G, 3, dtype=torch.float64, device="cuda")
    y = torch.empty_like(tensors["x"])
    addresses = (tensors["x"].data_ptr(), y.data_ptr(), tensors["weight"].data_ptr(), tensors["bias"].data_ptr())
    return in_graph_us([lambda: engine.run_at(plan, False, *addresses, 0, 0, 0, 0, 0, 0, moments.data_ptr())])


def _regimes(within: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """Every regime on the shapes that decide between them."""
    for case in GPU_CASES:
        for layout in LAYOUTS:
            for task in ("forward", "backward"):
                for regime in REGIMES:
                    if case.name not in _DECIDING or not within():
                        continue
                    try:
                        plan = make_plan(problem_of(case, task, layout, "bfloat16"), current_device(), regime)
                        us = plan_us(plan, case, "bfloat16", layout)
                    except Exception as error:  # what a regime cannot do says so
                        found: dict[str, Any] = {"failed": str(error)[:120]}
                    else:
                        found = {"us": us}
                    yield {"case": case.name, "layout": layout, "task": task, "regime": regime, **found}
                torch.cuda.empty_cache()


def _cases(within: Callable[[], bool], copy_bytes_per_s: float) -> Iterator[dict[str, Any]]:
    """All cases beside all contestants; the headline ones first."""
    headline = select_gpu_cases(headline=True)
    for case in (*headline, *(case for case in GPU_CASES if case not in headline)):
        for dtype in ("bfloat16", "float32"):
            for layout in LAYOUTS:
                for direction in ("forward", "backward"):
                    if within():
                        yield from _contest(case, dtype, layout, direction, copy_bytes_per_s)
                        torch.cuda.empty_cache()


def _contest(case: Case, dtype: str, layout: str, direction: str, copy_bytes_per_s: float) -> Iterator[dict[str, Any]]:
    least_bytes = (2 if direction == "forward" else 3) * case.elements * (2 if dtype == "bfloat16" else 4)
    count = copies_for(least_bytes, current_device().l2_bytes)
    torch._dynamo.reset()  # after eight kinds of call it would leave the function as it is
    sets = [tensors_of(case, dtype, layout) for _ in range(count)]
    for name, make in CONTESTANTS.items():
        row: dict[str, Any] = {"case": case.name, "dtype": dtype, "layout": layout, "direction": direction,
                               "contestant": name}  # fmt: skip
        try:
            calls = [make(case, tensors, direction) for tensors in sets]
            row["python_us"] = from_python_us(calls)
            if direction == "forward":  # autograd's own threads and streams are not for graphs
                row["graph_us"] = in_graph_us(calls)
            us = row.get("graph_us", row["python_us"])
            row["percent_of_copy"] = 100 * least_bytes / copy_bytes_per_s * 1e6 / us
        except Exception as error:  # a contestant that cannot do a case says so
            row["failed"] = f"{type(error).__name__}: {error}"[:120]
        yield row
    if direction == "backward":
        plan = make_plan(problem_of(case, "backward", layout, dtype), current_device())
        row = {"case": case.name, "dtype": dtype, "layout": layout, "direction": direction,
               "contestant": "groupnorm engine"}  # fmt: skip
        try:
            us = plan_us(plan, case, dtype, layout)
            row |= {"graph_us": us, "percent_of_copy": 100 * least_bytes / copy_bytes_per_s * 1e6 / us}
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:120]
        yield row


def _print(record: dict[str, Any]) -> None:
    """The short table: ours beside the others, and how much of the copy."""
    best = max(row["cold_bytes_per_s"] for row in record["copy"])
    print(f"{record['device']}: copies {best / 1e12:.2f} TB/s; barrier {record['barrier_us']}")
    rows = record["cases"]
    ratios: dict[tuple[str, str], list[float]] = {}
    print(f"{'case':16} {'':22} {'us':>9} {'% copy':>7}  others, us")
    for row in rows:
        if row["contestant"] != "groupnorm" or "failed" in row:
            continue
        same = [other for other in rows if all(other[k] == row[k] for k in ("case", "dtype", "layout", "direction"))]
        us = row.get("graph_us", row["python_us"])
        others = []
        for other in same:
            if other is not row and "failed" not in other:
                theirs = other.get("graph_us", other.get("python_us"))
                others.append(f"{other['contestant']} {theirs:.1f}")
                if "python_us" in other:
                    ratios.setdefault((other["contestant"], row["direction"]), []).append(theirs / us)
        what = f"{row['dtype']} {row['layout']} {row['direction']}"
        print(f"{row['case']:16} {what:22} {us:9.1f} {row['percent_of_copy']:7.0f}  {', '.join(others)}")
    for (name, direction), found in ratios.items():
        print(f"times faster than {name}, {direction}: geometric mean {statistics.geometric_mean(found):.2f}, "
              f"least {min(found):.2f}, of {len(found)}")  # fmt: skip


if __name__ == "__main__":
    main()
