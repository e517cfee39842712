"""The norms and convolutions of a PyTorch model, and the shapes that a forward gives them."""

import math
import re
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from groupnorm.errors import EngineError, OptionError

__all__ = ["Layer", "find_layers", "import_torch"]

Module = Any
Tensor = Any

_LAYER_NORM_2D = re.compile(r"LayerNorm.*[23]d|LayerNormChannels?|Channels?LayerNorm", re.IGNORECASE)
_BLOCK = re.compile(r"block|bottleneck|residual", re.IGNORECASE)


@dataclass(slots=True, eq=False)
class Layer:
    """A norm or a convolution. `family`: "BN", "frozen BN", "GN", "IN", "LN" or "conv"; `kind`: its class.

    `channels` are those of its output, None as long as a lazy module has none. `groups`: of a GN or IN as it is.
    `shape`: (N, C, *spatial) of what was normalized, or of what a convolution gave, the one of fewest elements a sample
    where there were several; None without a forward. `calls`: how often that happened in it, `shapes`: with which
    shapes. `after`: the convolution whose output a norm was given. `feeds_norm`: the same for a convolution.
    `ends_block`: the last norm among the children of what looks like a residual block, by its name.
    """

    name: str
    kind: str
    family: str
    channels: int | None
    groups: int | None = None
    eps: float | None = None
    shape: tuple[int, ...] | None = None
    dtype: str = "float32"
    channels_last: bool = False
    calls: int = 0
    shapes: Counter[tuple[int, ...]] = field(default_factory=Counter)
    after: str | None = None
    feeds_norm: bool = False
    ends_block: bool = False
    zero_weight: bool | None = None
    module: Module = field(default=None, repr=False)


def import_torch() -> Any:
    """PyTorch; EngineError that names what to install where it is missing."""
    try:
        import torch
    except ImportError as error:
        raise EngineError(f"models need PyTorch, which cannot be loaded ({error}): pip install torch") from error
    return torch


def find_layers(model: Module, example_inputs: Any = None) -> tuple[list[Layer], int]:
    """The layers in the order of the model's modules, and how many torch.nn.LayerNorm it has besides.

    example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments. With them the model runs
    once in eval mode, without gradients; afterwards its modes are what they were. Raises OptionError for what is no
    module, and when the model raises.
    """
    torch = import_torch()
    if not isinstance(model, torch.nn.Module):
        raise OptionError(f"model must be a torch.nn.Module: got {type(model).__name__}; pass the model itself")
    layers = {name: Layer(name or "(model)", type(module).__name__, family, None, module=module)
              for name, module in model.named_modules() if (family := _family(torch, module)) is not None}  # fmt: skip
    if example_inputs is not None:
        _run(torch, model, layers, example_inputs)
    for layer in layers.values():
        _describe(layer)
    _mark_blocks(torch, model, layers)
    plain = sum(type(module) is torch.nn.LayerNorm for module in model.modules())
    return list(layers.values()), plain


def _family(torch: Any, module: Module) -> str | None:
    kind = type(module).__name__
    if isinstance(module, torch.nn.GroupNorm):
        return "GN"
    if "FrozenBatchNorm" in kind:
        return "frozen BN"
    if isinstance(module, torch.nn.modules.instancenorm._InstanceNorm):
        return "IN"
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        return "BN"
    if type(module) is not torch.nn.LayerNorm and _LAYER_NORM_2D.search(kind):
        return "LN"
    return "conv" if isinstance(module, torch.nn.modules.conv._ConvNd) else None


def _describe(layer: Layer) -> None:
    """Fill in what a module says about itself; after a forward, when lazy modules know it."""
    module: Any = layer.module
    layer.kind = type(module).__name__
    found = (getattr(module, name, None) for name in ("num_channels", "num_features", "out_channels"))
    channels = next((value for value in found if isinstance(value, int) and value > 0), None)
    if channels is None and layer.family in {"LN", "frozen BN"}:
        weight = getattr(module, "weight", None)
        channels = weight.numel() if weight is not None else None
    if channels is None and layer.shape is not None:
        channels = layer.shape[1]
    layer.channels = channels
    layer.groups = {"GN": getattr(module, "num_groups", None), "IN": channels}.get(layer.family)
    eps = getattr(module, "eps", None)
    layer.eps = float(eps) if isinstance(eps, (int, float)) else None


def _mark_blocks(torch: Any, model: Module, layers: dict[str, Layer]) -> None:
    """Mark the last norm of each residual block that ends with one, as far as names and the order of children tell.
    Where a convolution comes after the norms the block normalizes first, and the norm is not what is added.
    """
    for name, module in model.named_modules():
        norms, ends = [], False
        for key, child in module._modules.items():
            layer = layers.get(f"{name}.{key}" if name else key)
            if layer is not None and layer.family in {"BN", "GN"}:
                norms.append(layer)
                ends = True
            elif child is not None:
                inside = {_family(torch, part) for part in child.modules()}
                ends = ends and not ("conv" in inside and not inside & {"BN", "GN"})
        if ends and len(norms) >= 2 and _BLOCK.search(type(module).__name__):
            weight = getattr(norms[-1].module, "weight", None)
            norms[-1].ends_block = True
            if weight is not None and not torch.nn.parameter.is_lazy(weight) and weight.device.type != "meta":
                norms[-1].zero_weight = not bool(weight.any())


def _run(torch: Any, model: Module, layers: dict[str, Layer], example_inputs: Any) -> None:
    args, kwargs = _arguments(example_inputs)
    made: dict[int, tuple[Any, Layer]] = {}  # id of what a convolution gave -> it, while it lives, and whose it is

    def before(layer: Layer) -> Any:
        def hook(module: Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = next((value for value in (*given, *named.values()) if isinstance(value, torch.Tensor)), None)
            if x is None:
                return
            _see(torch, layer, x)
            alive, conv = made.get(id(x), (lambda: None, None))
            if conv is not None and alive() is x:
                layer.after, conv.feeds_norm = conv.name, True

        return hook

    def behind(layer: Layer) -> Any:
        def hook(module: Module, given: Any, y: Any) -> None:
            if isinstance(y, torch.Tensor):
                _see(torch, layer, y)
                made[id(y)] = (weakref.ref(y), layer)

        return hook

    hooks = [
        layer.module.register_forward_hook(behind(layer)) if layer.family == "conv"
        else layer.module.register_forward_pre_hook(before(layer), with_kwargs=True)
        for layer in layers.values()
    ]  # fmt: skip
    try:
        with _evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(*args, **kwargs)
    except (Exception, SystemExit) as error:
        raise OptionError(f"the model raised {type(error).__name__} for the example inputs: {error}; give "
                          "inputs that it takes") from error  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, dict):
        return (), example_inputs
    return (tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)), {}


def _see(torch: Any, layer: Layer, x: Tensor) -> None:
    """Remember the shapes of calls, and count them."""
    layer.calls += 1
    if x.dim() < 2:
        return
    rank = next((int(digit) for digit in re.findall(r"([123])d", type(layer.module).__name__)), None)
    single = layer.family in {"IN", "conv"} and rank is not None and x.dim() == rank + 1  # a sample without its batch
    shape = (1, *x.shape) if single else tuple(x.shape)
    layer.shapes[shape] += 1
    if layer.shape is None or math.prod(shape[1:]) < math.prod(layer.shape[1:]):
        layer.shape = shape
    layer.dtype = str(x.dtype).removeprefix("torch.")
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    layer.channels_last = (x.dim() in formats and not x.is_contiguous()
                           and x.is_contiguous(memory_format=formats[x.dim()]))  # fmt: skip


@contextmanager
def _evaluating(model: Module) -> Iterator[None]:
    """Every module in eval mode inside, and in its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
