"""Tensors in GPU memory: whether the GPU engine takes them, and how they have to lie for it."""

import functools
import os
import warnings
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from importlib import metadata, util
from typing import Any

import torch
from torch._prims_common import suggest_memory_format

from groupnorm._core.arguments import Options
from groupnorm._core.layout import Walk
from groupnorm._core.problem import Problem
from groupnorm._dispatch import choose
from groupnorm.errors import ShapeError

__all__ = ["Fit", "count_exactly", "fit", "is_here", "takes"]

Tensor = Any

_COUNTED = 1 << 24
_TRITON = "3.6"
_CAPABILITY = (7, 0)
_LAST = (torch.channels_last, torch.channels_last_3d)
_HOST_TOO = False  # for tests: Triton's interpreter takes tensors in host memory
_SHAPED = ("x", "residual", "dy", "out")


def is_here() -> bool:
    """Whether there is the GPU engine."""
    return _is_here()


is_here._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result loads it


@functools.cache
def _is_here() -> bool:
    """Without the GPU engine CUDA tensors go through PyTorch's own operations, and a warning says why, once; no warning
    where the environment has GROUPNORM_GPU=off.
    """
    if os.environ.get("GROUPNORM_GPU", "").lower() == "off":
        return False
    reason = _missing()
    if reason is not None:
        warnings.warn(f"{reason}: CUDA tensors go through PyTorch's own operations (GROUPNORM_GPU=off says that this "
                      "is meant)", RuntimeWarning, stacklevel=5)  # fmt: skip
    return reason is None


def _missing() -> str | None:
    """What the GPU engine needs and does not find; None if nothing is missing."""
    if util.find_spec("triton") is None:
        return f"Triton is not installed (pip install 'triton>={_TRITON}', with PyTorch 2.10 or later)"
    with suppress(metadata.PackageNotFoundError):  # one that was built by hand will be new enough
        version = metadata.version("triton")
        if tuple(int(part) for part in version.split(".")[:2]) < tuple(map(int, _TRITON.split("."))):
            return f"the GPU engine needs Triton {_TRITON} or later, which PyTorch 2.10 brings: got {version}"
    if torch.version.hip is None and torch.cuda.is_available():
        newest = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
        if newest < _CAPABILITY:
            return f"the GPU engine needs compute capability 7.0 or later: got {newest[0]}.{newest[1]}"
    return None


def takes(x: Tensor) -> bool:
    """Whether x is the GPU engine's, not the CPU's."""
    return bool(x.is_cuda) or _HOST_TOO


@dataclass(frozen=True, slots=True)
class Fit:
    """What has to be converted first, or else the engine (a module) and its plan."""

    convert: frozenset[str]
    engine: Any = None
    plan: Any = None


def fit(options: Options, tensors: dict[str, Tensor], dx: bool) -> Fit:
    """How a call on GPU tensors of these shapes, types and strides is done. Kernels walk tensors that are dense in x's
    memory format and of x's type; others are converted, `out` is filled from a result.
    """
    x = tensors["x"]
    memory_format = suggest_memory_format(x)
    convert = set()
    for name, tensor in tensors.items():
        if tensor is None or name in ("mean", "rstd"):
            continue
        if name in _SHAPED:
            fits = tensor.is_contiguous(memory_format=memory_format) and tensor.dtype == x.dtype
        else:
            fits = tensor.is_contiguous()
        if not fits or tensor.is_neg():
            convert.add(name)
    out = tensors.get("out")
    if out is not None and torch._debug_has_internal_overlap(out) == 1:
        raise ShapeError("out must have memory of its own for each element: got an expanded tensor; pass out.clone()")
    if convert or not x.numel():
        return Fit(frozenset(convert if x.numel() else ()))
    problem = _problem(options, tensors, memory_format in _LAST, dx)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        engine, plan = choose(problem, "gpu", 1, on_gpu=x.is_cuda)
    return Fit(frozenset(), engine, plan)


def count_exactly(found: Tensor, x: Tensor, mask: Tensor) -> None:
    """Put whole numbers in the place of counts that float32, in which kernels count, may not hold."""
    elements = x.numel() // max(x.shape[0] * found.shape[1], 1)
    if elements > _COUNTED:
        real = elements if mask is None else mask.flatten(1).sum(1, dtype=torch.float64)[:, None]
        found[..., 0] = real if mask is None else real * (x.shape[1] // found.shape[1])


def _problem(options: Options, tensors: dict[str, Tensor], channels_last: bool, dx: bool) -> Problem:
    x = tensors["x"]
    n, c = x.shape[:2]
    s = x.numel() // (n * c)
    walk = Walk(c * s, 1, c) if channels_last and s > 1 else Walk(c * s, s, 1)
    names = [name for name in ("x", "residual", "dy") if tensors.get(name) is not None]
    names += ["dx", *(["dresidual"] if "residual" in names else [])] if options.task == "backward" else ["y"]
    kinds: dict[str, Any] = {
        name: None if tensors.get(name) is None else str(tensors[name].dtype).removeprefix("torch.")
        for name in ("weight", "bias", "scale", "shift")
    }
    problem = Problem(
        options.task, str(x.dtype).removeprefix("torch."), n, c, s, options.num_groups, options.eps, options.activation,
        mask=tensors.get("mask") is not None, stats=tensors.get("mean") is not None,
        walks=dict.fromkeys(names, walk), **kinds,
    )  # fmt: skip
    return replace(problem, dx=dx)
