"""Tensors in GPU memory: whether the GPU engine takes them, and how they have to lie for it."""

import functools
import os
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import util
from typing import Any

import torch
from torch._prims_common import suggest_memory_format

from groupnorm._core.arguments import Options
from groupnorm._core.layout import Walk
from groupnorm._core.problem import Problem
from groupnorm._dispatch import choose
from groupnorm.errors import ShapeError

__all__ = ["Fit", "fit", "is_here", "takes"]

Tensor = Any

_LAST = (torch.channels_last, torch.channels_last_3d)
_HOST_TOO = False  # for tests: Triton's interpreter takes tensors in host memory
_SHAPED = ("x", "residual", "dy", "out")


def is_here() -> bool:
    """Whether there is the GPU engine."""
    return _is_here()


is_here._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result loads it


@functools.cache
def _is_here() -> bool:
    """Without Triton CUDA tensors go through PyTorch's own operations, and a warning says so, once; without one where
    the environment has GROUPNORM_GPU=off.
    """
    if os.environ.get("GROUPNORM_GPU", "").lower() == "off":
        return False
    if util.find_spec("triton") is not None:
        return True
    warnings.warn("Triton is not installed: CUDA tensors go through PyTorch's own operations; "
                  "pip install 'triton>=3.6'", RuntimeWarning, stacklevel=5)  # fmt: skip
    return False


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
