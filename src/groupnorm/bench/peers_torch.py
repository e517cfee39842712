"""PyTorch, eager and compiled, and ours in its place. Tensors share memory with the NumPy arrays; NHWC becomes torch's
channels_last.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from groupnorm.bench.ready import Ready, Unsupported
from groupnorm.bench.work import Work, numpy_dtype

__all__ = ["prepare_compiled", "prepare_eager", "prepare_ours", "to_numpy", "to_torch"]

Array = Any

_ACTIVATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "relu": lambda F, z: F.relu(z),
    "silu": lambda F, z: F.silu(z),
    "gelu": lambda F, z: F.gelu(z),
    "gelu_tanh": lambda F, z: F.gelu(z, approximate="tanh"),
    "sigmoid": lambda F, z: z.sigmoid(),
    "tanh": lambda F, z: z.tanh(),
    "hardswish": lambda F, z: F.hardswish(z),
}


def to_torch(array: Array, axis: int = 1) -> Any:
    """A tensor on the array's memory with the channels, which lie at `axis`, on axis 1."""
    import torch

    if array.dtype.name == "bfloat16":
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    return tensor if axis == 1 else tensor.movedim(axis, 1)


def to_numpy(tensor: Any, axis: int = 1) -> Array:
    """The reverse of `to_torch`."""
    import torch

    tensor = tensor.detach()
    if axis != 1:
        tensor = tensor.movedim(1, axis)
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
    return tensor.numpy()


def prepare_eager(work: Work) -> Ready:
    """`torch.nn.functional.group_norm`, and the activation after it."""
    return _prepare(work, _function(work))


def prepare_ours(work: Work) -> Ready:
    """`groupnorm.torch.group_norm` in the place of these two, without out=."""
    from groupnorm.torch import group_norm

    groups, eps, activation = work.case.num_groups, work.case.eps, work.activation
    return _prepare(work, lambda x, weight, bias: group_norm(x, groups, weight, bias, eps, activation=activation))


def prepare_compiled(work: Work) -> Ready:
    """The same two calls through `torch.compile`, which fuses them."""
    import torch
    import torch._inductor.config

    torch._dynamo.reset()  # one graph per measurement, not a cache of many
    # The default lets a compiled backward reuse what the forward saved, so that it could run only once.
    torch._functorch.config.donated_buffer = False
    torch._inductor.config.compile_threads = 1  # it forks its compilers otherwise, which JAX's threads may not survive
    return _prepare(work, torch.compile(_function(work), dynamic=False))


def _function(work: Work) -> Callable[..., Any]:
    from torch.nn import functional

    groups, eps = work.case.num_groups, work.case.eps
    if work.activation is None:
        return lambda x, weight, bias: functional.group_norm(x, groups, weight, bias, eps)
    if work.activation not in _ACTIVATIONS:
        raise Unsupported(f"no {work.activation} in this rival")
    act = _ACTIVATIONS[work.activation]
    return lambda x, weight, bias: act(functional, functional.group_norm(x, groups, weight, bias, eps))


def _prepare(work: Work, function: Callable[..., Any]) -> Ready:
    import torch

    torch.set_num_threads(work.threads)
    inputs = (to_torch(work.x, work.axis), to_torch(work.weight), to_torch(work.bias))
    if work.direction == "forward":

        def run() -> Any:
            with torch.no_grad():
                return function(*inputs)

        return Ready(run, lambda y: (to_numpy(y, work.axis),))
    leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    y, dy = function(*leaves), to_torch(work.dy, work.axis)
    return Ready(
        lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True),
        lambda found: (to_numpy(found[0], work.axis), to_numpy(found[1]), to_numpy(found[2])),
    )
