"""Measures models: verify every variant against the exact result, time all in turns, then memory and where time is."""

import functools
import gc
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import groupnorm as gn
from groupnorm._core.machine import Machine, describe, versions
from groupnorm.bench.model_memory import peak_bytes
from groupnorm.bench.model_profile import norm_share
from groupnorm.bench.model_records import ModelRecord
from groupnorm.bench.model_work import ModelWork, build, step
from groupnorm.bench.models import ModelCase
from groupnorm.bench.timing import Timing, measure, measure_long

__all__ = ["TOLERANCE", "distance", "error", "measure_model", "run_models"]

Tensor = Any

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # an error and a distance of outputs that are always allowed ...
# ... and of gradients: a value that rounds to the other side of a ReLU's 0 changes those of 3-D networks by 0.004 in
# all and one of them by 0.05, in float32, from one number of threads or memory format to another.
_GRADIENT_DISTANCE = {"float32": 1e-2, "bfloat16": 3e-2}
_GRADIENT_ERROR = {"float32": 0.1, "bfloat16": 0.25}
_RATIO = 2  # ... and so many times that of stock, which deep models in bfloat16 need
_EXACT = {"float32": "float64", "bfloat16": "float32"}  # the dtype that gives the exact result: five digits more
_SLOW_S = 20.0  # compiled calls that take longer are called thrice: 3-D convolutions in bfloat16 take 40 s, not 0.1
_NOTHING = (
    1e-3  # gradients below this part of the largest one should be 0 and are rounding, that of a key's bias for one
)


def run_models(
    todo: Iterable[ModelWork], *, budget_s: float = 1.0, memory: bool = True,
    report: Callable[[list[ModelRecord]], Any] = lambda records: None,
) -> list[ModelRecord]:  # fmt: skip
    """The records of all work, in its order; `report` sees those of each piece of work as soon as they exist."""
    import torch

    machine, before = describe(), (gn.get_num_threads(), torch.get_num_threads())
    found: list[ModelRecord] = []
    try:
        for work in todo:
            gn.set_num_threads(work.threads)
            torch.set_num_threads(work.threads)
            records = measure_model(work, machine, budget_s=budget_s, memory=memory)
            found += records
            report(records)
    finally:
        gn.set_num_threads(before[0])
        torch.set_num_threads(before[1])
        _exact.cache_clear()
    return found


@dataclass(slots=True)
class _Entry:
    variant: str
    compiled: bool
    swapped: int
    fused: int
    run: Callable[[], Any] | None  # None once it failed
    reason: str | None = None
    error: float | None = None
    distance: float = 0.0
    peak_bytes: int | None = None
    share: float | None = None

    @property
    def name(self) -> str:
        return f"{self.variant} compiled" if self.compiled else self.variant


def measure_model(
    work: ModelWork, machine: Machine, *, budget_s: float = 1.0, memory: bool = True
) -> list[ModelRecord]:
    """One record for each variant; one that fails or is wrong is recorded with the reason and not timed."""
    exact = _exact(work.case, work.size, work.mode, work.dtype, work.threads)
    entries = _entries(work)
    stock = entries[0]
    for entry in entries:
        _verify(entry, work, exact, stock)
    runs = {entry.name: entry.run for entry in entries if entry.run is not None}
    slow = {name for name, run in runs.items() if name.endswith("compiled") and _is_slow(run)}
    times = measure_long({name: run for name, run in runs.items() if name in slow}) | measure(
        {name: run for name, run in runs.items() if name not in slow},
        budget_s=budget_s, min_repeats=work.case.repeats,
    )  # fmt: skip
    measured = [entry for entry in entries if entry.run is not None and not entry.compiled]
    for entry in measured:
        entry.share = norm_share(entry.run) if entry.run is not None else None
    for entry in entries:
        entry.run = None
    gc.collect()  # the models go before others are built
    for entry in measured:
        entry.peak_bytes = peak_bytes(work, converted=entry.variant == "converted") if memory else None
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return [_record(entry, work, machine, times.get(entry.name), stock.error, date) for entry in entries]


def error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """The largest distance of a tensor from the exact one, as a part of its length (2-norm), or of the largest one's
    where it should be 0: there is nothing to be relative to. inf for what is not finite or of another shape.
    """
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in exact]:
        return math.inf
    scales = [tensor.norm().item() / max(1, tensor.numel()) ** 0.5 for tensor in exact]
    worst = 0.0
    for tensor, wanted, scale in zip(found, exact, scales, strict=True):
        length = (scale if scale > _NOTHING * max(scales) else max(scales)) * max(1, wanted.numel()) ** 0.5
        off = (tensor.to(wanted.dtype) - wanted).norm().item() / length if length else 0.0
        worst = max(worst, off) if math.isfinite(off) else math.inf
    return worst


def distance(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """The distance of all tensors together from the exact ones, as a part of their length (2-norm): what a step of
    training is off by. 1 for zeros.
    """
    length = math.hypot(*(tensor.norm().item() for tensor in exact))
    apart = math.hypot(
        *((tensor.to(wanted.dtype) - wanted).norm().item() for tensor, wanted in zip(found, exact, strict=True))
    )
    return apart / length if length else apart


@functools.lru_cache(maxsize=1)  # memory formats share it
def _exact(case: ModelCase, size: str, mode: str, dtype: str, threads: int) -> tuple[Tensor, ...]:
    work = ModelWork(case, mode, size, dtype, "contiguous", False, threads)
    built = build(work, dtype=_EXACT[dtype])
    return step(work, built.model, built.inputs)()


def _entries(work: ModelWork) -> list[_Entry]:
    """Stock and converted, eager; then the same models compiled, if that is wanted."""
    found: list[_Entry] = []
    built = {"stock": build(work), "converted": build(work, converted=True)}
    for variant, made in built.items():
        run = step(work, made.model, made.inputs)
        found.append(_Entry(variant, False, made.swapped, made.fused, run))
    if work.compiled:
        import torch
        import torch._inductor.config

        torch._dynamo.reset()  # one graph for each measurement, not a cache of many
        torch._inductor.config.compile_threads = 2  # workers idle while models are measured
        for variant, made in built.items():
            run = step(work, torch.compile(made.model, dynamic=False), made.inputs)
            found.append(_Entry(variant, True, made.swapped, made.fused, run))
    return found


def _is_slow(run: Callable[[], Any]) -> bool:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start > _SLOW_S


def _verify(entry: _Entry, work: ModelWork, exact: tuple[Tensor, ...], stock: _Entry) -> None:
    """Run an entry once; take away its `run`, and note the reason, if it cannot be measured.

    Compared are its worst tensor with the worst of stock, and all of them together with those of stock: in bfloat16
    single gradients of a deep model are all rounding (errors of 2 and more), while all together are off by 0.1 or 0.2.
    """
    assert entry.run is not None
    try:
        found = entry.run()
        entry.error = error(found, exact)
        entry.distance = distance(found, exact) if math.isfinite(entry.error) else math.inf
    except Exception as raised:  # whatever a model or a compiler raises goes into the record
        text = str(raised).strip() or "no message"
        entry.run, entry.reason = None, f"{type(raised).__name__}: {text.splitlines()[0]}"[:300]
        return
    outputs, dtype = work.mode == "inference", work.dtype
    limits = (
        ("error", entry.error, stock.error, TOLERANCE[dtype] if outputs else _GRADIENT_ERROR[dtype]),
        ("distance", entry.distance, stock.distance, TOLERANCE[dtype] if outputs else _GRADIENT_DISTANCE[dtype]),
    )
    for what, value, usual, always in limits:
        allowed = max(always, _RATIO * (usual if usual is not None and math.isfinite(usual) else 0.0))
        if math.isinf(value) or (value > allowed and entry is not stock):
            entry.run, entry.reason = None, f"wrong result: {what} {value:.1e}, allowed {allowed:.1e}"
            return


def _record(
    entry: _Entry, work: ModelWork, machine: Machine, timing: Timing | None, stock_error: float | None, date: str
) -> ModelRecord:
    return ModelRecord(
        machine={"slug": machine.slug, **asdict(machine)},
        versions=versions(("torch", *work.case.needs)),
        date=date,
        model=work.case.name, size=work.size, mode=work.mode, dtype=work.dtype, memory_format=work.memory_format,
        compiled=entry.compiled, threads=work.threads, variant=entry.variant,
        status="ok" if entry.reason is None else "failed", reason=entry.reason,
        error=_rounded(entry.error), stock_error=_rounded(stock_error),
        median_s=_rounded(timing.median_s if timing else None), q1_s=_rounded(timing.q1_s if timing else None),
        q3_s=_rounded(timing.q3_s if timing else None),
        repeats=timing.repeats if timing else 0,
        peak_bytes=entry.peak_bytes, norm_share=_rounded(entry.share),
        swapped=entry.swapped, fused=entry.fused,
    )  # fmt: skip


def _rounded(value: float | None) -> float | None:
    """Five digits: more is noise. None for what JSON has no number for."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
