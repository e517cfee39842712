"""Who is measured on a GPU: this engine, and others where they are installed. Each is a function that makes a call."""

from collections.abc import Callable
from importlib import util
from typing import Any

import torch

from groupnorm.bench.cases import Case

__all__ = ["CONTESTANTS", "Made", "make_ours", "tensors_of"]

Tensor = Any
Made = Callable[[], Any]

F = torch.nn.functional


def tensors_of(case: Case, dtype: str, layout: str) -> dict[str, Tensor]:
    """x, dy, weight and bias of a case on the GPU."""
    kind = getattr(torch, dtype)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d} if layout == "NHWC" else {}
    format_ = formats.get(len(case.shape), torch.contiguous_format)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.float32).to(kind)

    return {
        "x": normal(*case.shape).to(memory_format=format_), "dy": normal(*case.shape).to(memory_format=format_),
        "weight": normal(case.shape[1]), "bias": normal(case.shape[1]),
    }  # fmt: skip


def _call(forward: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: dict[str, Tensor], direction: str) -> Made:
    """One forward without gradients, or one backward of a forward that was done before."""
    x, weight, bias, dy = (tensors[name] for name in ("x", "weight", "bias", "dy"))
    if direction == "forward":

        def run() -> Tensor:
            with torch.no_grad():
                return forward(x, weight, bias)

        return run
    inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    y = forward(*inputs)
    return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)


def make_ours(case: Case, tensors: dict[str, Tensor], direction: str) -> Made:
    """Our own, as its users call it."""
    import groupnorm.torch as gnt

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return gnt.group_norm(x, case.num_groups, weight, bias, case.eps, activation=case.activation)

    return _call(forward, tensors, direction)


def _activate(y: Tensor, case: Case) -> Tensor:
    return {None: lambda t: t, "relu": F.relu, "silu": F.silu}[case.activation](y)


def _eager(case: Case, tensors: dict[str, Tensor], direction: str) -> Made:
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _activate(F.group_norm(x, case.num_groups, weight, bias, case.eps), case)

    return _call(forward, tensors, direction)


def _compiled(case: Case, tensors: dict[str, Tensor], direction: str) -> Made:
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _activate(F.group_norm(x, case.num_groups, weight, bias, case.eps), case)

    # The default lets a compiled backward reuse what the forward saved, so that it could run only once.
    torch._functorch.config.donated_buffer = False
    return _call(torch.compile(forward, dynamic=False), tensors, direction)


def _apex(case: Case, tensors: dict[str, Tensor], direction: str) -> Made:
    """Channels last only, and only for some channel counts; it raises for others."""
    from apex.contrib.group_norm import GroupNorm

    if not tensors["x"].is_contiguous(memory_format=torch.channels_last) or case.activation not in (None, "silu"):
        raise NotImplementedError("channels last, SiLU or nothing")
    module = GroupNorm(case.num_groups, case.shape[1], case.eps, act=case.activation or "").cuda()
    module = module.to(tensors["x"].dtype)

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return module(x)

    return _call(forward, tensors, direction)


def _liger(case: Case, tensors: dict[str, Tensor], direction: str) -> Made:
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    c, groups = case.shape[1], case.num_groups

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _activate(LigerGroupNormFunction.apply(x, weight, bias, c, groups, case.eps), case)

    return _call(forward, tensors, direction)


def _flag_gems(case: Case, tensors: dict[str, Tensor], direction: str) -> Made:
    import flag_gems

    n, c = case.shape[:2]
    s = case.elements // (n * c)

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _activate(flag_gems.group_norm(x, weight, bias, n, c, s, case.num_groups, case.eps)[0], case)

    return _call(forward, tensors, direction)


_ALL: dict[str, tuple[str, Callable[[Case, dict[str, Tensor], str], Made]]] = {
    "groupnorm": ("groupnorm", make_ours),
    "torch": ("torch", _eager),
    "torch.compile": ("torch", _compiled),
    "apex": ("apex", _apex),
    "liger": ("liger_kernel", _liger),
    "flag_gems": ("flag_gems", _flag_gems),
}
CONTESTANTS = {name: make for name, (module, make) in _ALL.items() if util.find_spec(module) is not None}
