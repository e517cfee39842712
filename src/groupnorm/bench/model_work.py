"""One measurement of a model: how it is built, stock or converted, and what one call of it does."""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from groupnorm.bench.models import ModelCase

__all__ = ["Built", "ModelWork", "build", "model_works", "step"]

Module = Any
Tensor = Any


@dataclass(frozen=True, slots=True)
class ModelWork:
    """A model in one mode, size, dtype and memory format ("contiguous" or "channels_last"); eager, or compiled too."""

    case: ModelCase
    mode: str
    size: str
    dtype: str
    memory_format: str
    compiled: bool
    threads: int


@dataclass(frozen=True, slots=True)
class Built:
    """A model with its inputs; how many norms and activations `convert` swapped and fused, 0 for stock."""

    model: Module
    inputs: tuple[Tensor, ...]
    swapped: int
    fused: int


def model_works(
    cases: Iterable[ModelCase], *, modes: Iterable[str], dtypes: Iterable[str], memory_formats: Iterable[str],
    compiled: bool, threads: int, tiny: bool = False,
) -> Iterator[ModelWork]:  # fmt: skip
    """Every combination that a case has. The memory format changes fastest: what is exact does not depend on it."""
    for case in cases:
        for mode in modes:
            for dtype in dtypes:
                for memory_format in memory_formats:
                    if mode in case.sizes and dtype in case.dtypes:
                        size = "tiny" if tiny else case.sizes[mode]
                        wanted = compiled and case.compiled
                        yield ModelWork(case, mode, size, dtype, memory_format, wanted, threads)


def build(work: ModelWork, *, converted: bool = False, dtype: str | None = None) -> Built:
    """The model and its inputs, the same each time. dtype: computed in this one instead, on the numbers of the work's
    own: that is how a result becomes exact.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = work.case.build(work.size).train(work.mode != "inference")
        inputs = work.case.inputs(work.size)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.GroupNorm) and module.affine:  # 1 and 0 would hide a mistake
                    module.weight.normal_(1, 0.1)
                    module.bias.normal_(0, 0.1)
    kinds = [getattr(torch, name) for name in (work.dtype, dtype or work.dtype)]
    for kind in kinds:
        model = model.to(kind)
        inputs = tuple(tensor.to(kind) if tensor.is_floating_point() else tensor for tensor in inputs)
    if work.memory_format == "channels_last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        model = model.to(memory_format=formats[max(parameter.dim() for parameter in model.parameters())])
        inputs = tuple(
            tensor.to(memory_format=formats[tensor.dim()]) if tensor.dim() in formats else tensor for tensor in inputs
        )
    if not converted:
        return Built(model, inputs, 0, 0)
    from groupnorm.torch import convert

    report = convert(model)
    return Built(model, inputs, report.count("swapped"), report.count("fused"))


def step(work: ModelWork, model: Module, inputs: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
    """One call as it is timed: gives the output in inference, all gradients in training, those of every sample for
    DP-SGD.
    """
    return {"inference": _inference, "training": _training, "dp-sgd": _private}[work.mode](work, model, inputs)


def _inference(work: ModelWork, model: Module, inputs: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
    import torch

    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (model(*inputs),)

    return run


def _training(work: ModelWork, model: Module, inputs: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
    parameters = list(model.parameters())

    def run() -> tuple[Tensor, ...]:
        for parameter in parameters:
            parameter.grad = None
        y = model(*inputs)
        y.backward(_gradient(work.dtype, y.dtype, y.shape))
        return tuple(parameter.grad for parameter in parameters if parameter.grad is not None)

    return run


def _private(work: ModelWork, model: Module, inputs: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
    import torch
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    sampled = GradSampleModule(model, loss_reduction="sum")
    parameters = list(sampled.parameters())
    optimizer = DPOptimizer(
        torch.optim.SGD(parameters, lr=0.0),  # so that every step is the same
        noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=len(inputs[0]), loss_reduction="sum",
    )  # fmt: skip

    def run() -> tuple[Tensor, ...]:
        optimizer.zero_grad()
        y = sampled(*inputs)
        with warnings.catch_warnings():  # Opacus hooks the first layer, whose input needs no gradient: as is meant
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            y.backward(_gradient(work.dtype, y.dtype, y.shape))
        optimizer.step()
        return tuple(parameter.grad_sample for parameter in parameters)

    return run


@functools.lru_cache(maxsize=2)
def _gradient(rounded: Any, dtype: Any, shape: Any) -> Tensor:
    """The gradient of the loss by the output: the same numbers in every dtype."""
    import torch

    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return values.to(getattr(torch, rounded)).to(dtype)
