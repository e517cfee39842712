"""Measures models: stock beside converted, verified first, then timed in turns; memory in processes of their own."""

import copy
import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import util
from pathlib import Path
from typing import Any

import groupnorm as gn
from groupnorm.bench.machine import describe, versions
from groupnorm.bench.timing import Timing, measure
from groupnorm.bench.whole.cases import Model, build
from groupnorm.bench.whole.records import ModelRecord

__all__ = ["ModelWork", "measure_model", "model_works", "peak_of"]

Module = Any
Tensor = Any

# Of the largest difference to stock that float32 is allowed: models are some hundred roundings deep. In 16 bits, how
# much further than stock itself from stock in float32; both are off by roundings that come out differently.
_FLOAT32, _SIXTEEN = {"inference": 1e-4, "training": 2e-3, "dp-sgd": 2e-3}, 1.5
_MEMORY_FORMATS = {"NCHW": "contiguous", "NHWC": "channels_last"}


@dataclass(frozen=True, slots=True)
class ModelWork:
    """A model, a mode, and how it is run. quick: the small version of the model."""

    model: Model
    mode: str
    dtype: str
    memory_format: str
    threads: int
    quick: bool = False


def model_works(
    models: Iterable[Model], *, directions: Iterable[str], dtypes: Iterable[str], layouts: Iterable[str], threads: int,
    quick: bool,
) -> Iterator[ModelWork]:  # fmt: skip
    """Every combination that makes sense: forward is inference, backward is training."""
    for model in models:
        for mode in model.modes:
            if ("forward" if mode == "inference" else "backward") not in directions:
                continue
            for dtype in dtypes:
                for layout in layouts:
                    if mode != "dp-sgd" or (dtype, layout) == ("float32", "NCHW"):
                        yield ModelWork(model, mode, dtype, _MEMORY_FORMATS[layout], threads, quick)


def measure_model(work: ModelWork, *, budget_s: float) -> list[ModelRecord]:
    """A record for stock, one for converted, and the same compiled where the model asks for it."""
    import torch

    missing = [package for package in work.model.needs if util.find_spec(package) is None]
    if missing:
        return [_record(work, "stock", status="failed", reason=f"needs {missing[0]}, which is not installed")]
    gn.set_num_threads(work.threads)
    torch.set_num_threads(work.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of other people's libraries
        return _measured(work, budget_s)


def peak_of(work: ModelWork, converted: bool) -> int | None:
    """The most bytes that one call takes beside the model and its inputs, in this process; None where the system does
    not say. A call with the small version of the model comes first, for what is loaded and compiled only once.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    import torch

    def kilobytes(name: str) -> int:
        lines = status.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    torch.set_num_threads(work.threads)
    _caller(replace(work, quick=True), *_variant(replace(work, quick=True), converted))()
    module, inputs = _variant(work, converted)
    call = _caller(work, module, inputs)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before = kilobytes("VmRSS")
    call()
    return 1024 * (kilobytes("VmHWM") - before)


def _measured(work: ModelWork, budget_s: float) -> list[ModelRecord]:
    import torch

    from groupnorm.torch import convert

    stock, inputs = _variant(work, False)
    exact = work if work.dtype == "float32" else replace(work, dtype="float32")
    want = _outcome(exact, *_variant(exact, False))
    own_error = _difference(_outcome(work, stock, inputs), want)
    converted = copy.deepcopy(stock)
    report = convert(converted)
    modules = {"stock": stock, "converted": converted}
    if work.model.compiled and work.mode == "inference" and work.memory_format == "contiguous" and not work.quick:
        torch._dynamo.reset()
        modules |= {f"{name} compiled": torch.compile(copy.deepcopy(modules[name])) for name in ("stock", "converted")}
    records, calls = {}, {}
    for name, module in modules.items():
        record = _record(work, name, swapped=report.count("swapped"), fused=report.count("fused"))
        try:
            error = _difference(_outcome(work, module, inputs), want)
        except Exception as raised:  # whatever a compiler raises goes into its record
            records[name] = replace(record, status="failed", reason=f"{type(raised).__name__}: {raised}"[:300])
            continue
        allowed = max(_FLOAT32[work.mode], _SIXTEEN * own_error)
        ok = error <= allowed
        reason = None if ok else f"the result is off by {error:.1e}, allowed is {allowed:.1e}"
        records[name] = replace(record, error=_rounded(error), status="ok" if ok else "failed", reason=reason)
        calls[name] = _caller(work, module, inputs)
    times = measure(calls, budget_s=budget_s, min_repeats=3)
    share = _norm_share(calls["stock"])
    return [
        replace(_timed(record, times.get(name)), norm_share=share if name == "stock" else None,
                peak_bytes=None if work.quick or "compiled" in name else _peak(work, name == "converted"))
        for name, record in records.items()
    ]  # fmt: skip


def _variant(work: ModelWork, converted: bool) -> tuple[Module, tuple[Tensor, ...]]:
    """The module and its inputs in this dtype and memory format."""
    import torch

    from groupnorm.torch import convert

    module, inputs = build(work.model, work.quick)
    dtype = getattr(torch, work.dtype)
    module = module.to(dtype).train(work.mode != "inference")
    inputs = tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs)
    if work.memory_format == "channels_last":
        module, inputs = _channels_last(module), tuple(_channels_last(t) for t in inputs)
    if converted:
        convert(module)
    return module, inputs


def _channels_last(thing: Any) -> Any:
    """A tensor of four or five axes, or the parameters of a module, with channels last in memory."""
    import torch

    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if isinstance(thing, torch.nn.Module):
        for parameter in thing.parameters():
            parameter.data = _channels_last(parameter.data)
        return thing
    return thing.contiguous(memory_format=formats[thing.dim()]) if thing.dim() in formats else thing


def _output(found: Any) -> Tensor:
    """The tensor in what a model returns."""
    found = getattr(found, "sample", found)
    return found[0] if isinstance(found, tuple | list) else found


def _caller(work: ModelWork, module: Module, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """One call of the model, ready to be timed."""
    import torch

    if work.mode == "inference":

        def infer() -> Any:
            with torch.inference_mode():
                return _output(module(*inputs))

        return infer
    if work.mode == "dp-sgd":
        return _private_step(module, inputs)

    def train() -> None:
        module.zero_grad()
        _loss(_output(module(*inputs))).backward()

    return train


def _loss(y: Tensor) -> Tensor:
    return y.float().square().mean()


def _private_step(module: Module, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """Per-sample gradients, clipped and summed; no noise, so that the result can be compared, and a rate of 0."""
    import opacus
    import torch

    private = copy.deepcopy(module)
    sampled = opacus.GradSampleModule(private)
    optimizer = opacus.optimizers.DPOptimizer(
        torch.optim.SGD(sampled.parameters(), lr=0.0), noise_multiplier=0.0, max_grad_norm=1.0,
        expected_batch_size=len(inputs[0]),
    )  # fmt: skip

    def step() -> Any:
        optimizer.zero_grad()
        _loss(sampled(*inputs)).backward()
        optimizer.step()
        return private

    return step


def _outcome(work: ModelWork, module: Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """What is compared: the output, or the gradients of all parameters, as one tensor."""
    import torch

    found = _caller(work, module, inputs)()
    if work.mode == "inference":
        return found.float().flatten().clone()
    module = found if found is not None else module
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.float().flatten() for gradient in gradients])
    module.zero_grad()
    return flat


def _difference(found: Tensor, want: Tensor) -> float:
    return float((found - want).norm() / want.norm())


def _norm_share(call: Callable[[], Any]) -> float | None:
    """The part of a call that is spent in group_norm and activations, forward and backward."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it reports its starts and ends otherwise
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    times = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    ours = ("native_group_norm", "silu", "relu", "relu_", "threshold_backward", "gelu")
    named = {f"aten::{name}{suffix}" for name in ours for suffix in ("", "_backward")}
    total = sum(times.values())
    return _rounded(sum(spent for key, spent in times.items() if key in named) / total) if total else None


def _peak(work: ModelWork, converted: bool) -> int | None:
    """`peak_of` in a process of its own."""
    choice = [work.model.name, work.mode, work.dtype, work.memory_format, work.threads, converted]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "groupnorm.bench.whole.memory", json.dumps(choice)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found: int | None = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    return found


def _record(work: ModelWork, variant: str, **known: Any) -> ModelRecord:
    machine = describe()
    empty = {"status": "ok", "reason": None, "error": None, "median_s": None, "q1_s": None, "q3_s": None, "repeats": 0,
             "peak_bytes": None, "norm_share": None, "swapped": None, "fused": None}  # fmt: skip
    return ModelRecord(
        machine={"slug": machine.slug, **asdict(machine)}, versions=versions(("torch", *work.model.needs)),
        date=datetime.now(UTC).strftime("%Y-%m-%d"), model=work.model.name, mode=work.mode, dtype=work.dtype,
        memory_format=work.memory_format, threads=work.threads, variant=variant, **empty | known,
    )  # fmt: skip


def _timed(record: ModelRecord, time: Timing | None) -> ModelRecord:
    if time is None:
        return record
    return replace(record, median_s=_rounded(time.median_s), q1_s=_rounded(time.q1_s), q3_s=_rounded(time.q3_s),
                   repeats=time.repeats)  # fmt: skip


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
