"""Norm and activation in one kernel, in the modules of a model, without a change in what the model is.

A module that applies an activation to what a norm gives (a Sequential, a block of diffusers or MONAI, anybody's own)
gets a class with another `forward`, which hands both to `norm_act`. The module stays the same object with the same
children, and `norm_act` looks at them at each call.
"""

import copyreg
import functools
import inspect
import types
from typing import Any, NamedTuple

import torch
from torch.nn.modules import module as torch_module

from groupnorm.torch.composite import ACTIVATIONS
from groupnorm.torch.module import GroupNorm
from groupnorm.torch.rewrite import Unreadable, rewrite

__all__ = ["Found", "activation_name", "fuse", "is_fused", "is_ours", "is_replaced", "is_watched", "norm_act", "unfuse"]

Module = Any
Tensor = Any
F = torch.nn.functional

_MODULES: dict[Any, str] = {
    torch.nn.ReLU: "relu", torch.nn.SiLU: "silu", torch.nn.GELU: "gelu", torch.nn.Sigmoid: "sigmoid",
    torch.nn.Tanh: "tanh", torch.nn.Hardswish: "hardswish",
}  # fmt: skip
_FORWARDS = {kind: kind.forward for kind in _MODULES}  # which a library may replace in PyTorch's own classes
_SEQUENTIAL = torch.nn.Sequential.forward, torch.nn.Sequential.__iter__
_FUNCTIONS = {F: ("relu", "silu", "gelu", "sigmoid", "tanh", "hardswish"), torch: ("relu", "sigmoid", "tanh")}
_DROPOUTS = (torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d)
_IDLE_FORWARDS: dict[Any, Any] = {kind: kind.forward for kind in (torch.nn.Identity, *_DROPOUTS)}
_ABSENT: Any = object()  # no such term in the source; None may be what a variable holds


class Found(NamedTuple):
    """What `fuse` found in a module: the norms, by their names in it, with their activations; and why it could not look
    for more.
    """

    norms: dict[str, str]
    watched: frozenset[str] = frozenset()  # those of them that are not fused as long as they have hooks
    reason: str | None = None


def norm_act(
    norm: Module, activation: Module, x: Tensor, scale: Tensor = _ABSENT, shift: Tensor = _ABSENT,
    residual: Tensor = _ABSENT, inplace: bool = False,
) -> Tensor:  # fmt: skip
    """activation(norm(x)*(1 + scale) + shift + residual), by one kernel where nobody could tell the difference.

    norm, activation: modules; the activation also a name in `groupnorm.reference.ACTIVATIONS`. scale, shift: (N, C, 1,
    ...). inplace: the residual was added in place. Where the norm or the activation are something else by now, or have
    hooks, they are called one after the other.
    """
    name = activation if isinstance(activation, str) else activation_name(activation)
    if name is not None and isinstance(x, torch.Tensor) and is_ours(norm) and not is_watched(norm, activation):
        for_sample = (*x.shape[:2], *[1] * (x.dim() - 2))
        if scale is _ABSENT and residual is _ABSENT:
            return norm.normalized(x, name)
        if (residual is _ABSENT or _is_like(residual, x, x.shape)) and (
            scale is _ABSENT or (_is_like(scale, x, for_sample) and _is_like(shift, x, for_sample))
        ):
            both = (None, None) if scale is _ABSENT else (scale.flatten(1), shift.flatten(1))
            return norm.normalized(x, name, *both, None if residual is _ABSENT else residual)
    y = norm(x)
    if scale is not _ABSENT:
        y = y * (1 + scale) + shift
    if residual is not _ABSENT and inplace:
        y += residual
    elif residual is not _ABSENT:
        y = y + residual
    return ACTIVATIONS[activation](y) if isinstance(activation, str) else activation(y)


def _is_like(value: Any, x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a value is a tensor of this shape and of x's type, so that adding it to x leaves x's type."""
    return isinstance(value, torch.Tensor) and value.shape == shape and value.dtype == x.dtype


def activation_name(module: Module) -> str | None:
    """The name of the activation that a module is; None if it is something else."""
    kind = type(module)
    name = _MODULES.get(kind)
    if name is None or is_replaced(module) or kind.forward is not _FORWARDS[kind]:
        return None
    return "gelu_tanh" if name == "gelu" and module.approximate == "tanh" else name


def is_replaced(module: Module) -> bool:
    """Whether the object has a forward of its own. The one of its class, bound to it, is none: that is what libraries
    leave behind that took theirs away (accelerate, diffusers).
    """
    own, kind = module.__dict__.get("forward"), type(module)
    left = getattr(own, "__self__", None) is module and getattr(own, "__func__", None) is kind.forward
    return own is not None and not left


def is_watched(*modules: Module) -> bool:
    """Whether hooks would see that these modules are not called. Names of activations count as modules without."""
    return bool(torch_module._has_any_global_hook()) or any(  # type: ignore[no-untyped-call]
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
        if not isinstance(module, str)
    )


def fuse(module: Module) -> Found:
    """Let a module hand its norms and the activations after them to `norm_act`. Nothing happens the second time."""
    kind: Any = type(module)
    norms = tuple(sorted(name for name, child in module._modules.items() if child is not None and is_ours(child)))
    if not norms or is_fused(module):
        return Found({})
    if is_replaced(module):
        return Found({}, reason="its forward was replaced")
    found: dict[str, tuple[str | None, str]]  # name of the activation if it is a function, name of its module else
    if kind.forward is _SEQUENTIAL[0] and kind.__iter__ is not _SEQUENTIAL[1]:
        return Found({}, reason="its children come in an order of its own")
    if kind.forward is _SEQUENTIAL[0]:
        steps = _steps(list(module._modules.values()), in_eval=True)
        place = {id(child): name for name, child in module._modules.items()}
        found = {place[id(norm)]: (None, place[id(after)]) for norm, after in steps if after is not None}
        made, reason = _sequential_class(kind) if found else (None, None)
    else:
        activations = sorted(
            name for name, child in module._modules.items() if child is not None and activation_name(child)
        )
        made, found, reason = _block_class(kind, kind.forward, norms, tuple(activations))
    if made is None:
        return Found({}, reason=reason)
    module.__dict__.pop("forward", None)
    module.__class__ = made
    children = {norm: module._modules.get(child, "") for norm, (_, child) in found.items()}
    watched = {norm for norm in found if is_watched(module._modules[norm], children[norm])}
    names = {norm: name or str(activation_name(children[norm])) for norm, (name, _) in found.items()}
    return Found(names, frozenset(watched))


def unfuse(module: Module) -> bool:
    """Give a module back the class that `fuse` took from it; whether there was one."""
    if "unfused" in vars(type(module)):
        if not is_replaced(module):
            module.__dict__.pop("forward", None)
        module.__class__ = module.unfused
        return True
    return False


def is_fused(module: Module) -> bool:
    """Whether `fuse` gave the module its class, of which somebody may have made another one since (a parametrization,
    FSDP).
    """
    return hasattr(type(module), "unfused")


@functools.cache
def _sequential_class(kind: Any) -> tuple[Any, Any]:
    """A torch.nn.Sequential, or a subclass with its forward, that fuses; and the reason if there is none."""

    def forward(self: Module, input: Tensor) -> Tensor:
        for module, activation in _steps(list(self._modules.values())):
            input = module(input) if activation is None else norm_act(module, activation, input)
        return input

    try:
        return _subclass(kind, forward, (_sequential_class, kind)), None
    except Unreadable as reason:
        return None, str(reason)


def _steps(modules: list[Module], *, in_eval: bool = False) -> list[tuple[Module, Module]]:
    """The modules of a Sequential one after the other, norms together with the activation that follows, or None. A
    dropout that does nothing may stand between the two, as in MONAI's ADN; `in_eval`: as if none did anything.
    """
    steps = []
    while modules:
        module = modules.pop(0)
        after = 0
        if is_ours(module):
            while after < len(modules) and _does_nothing(modules[after], in_eval):
                after += 1
            if after < len(modules) and activation_name(modules[after]) is not None:
                steps.append((module, modules[after]))
                del modules[: after + 1]
                continue
        steps.append((module, None))
    return steps


def _does_nothing(module: Module, in_eval: bool) -> bool:
    kind = type(module)
    idle = kind is torch.nn.Identity or (kind in _DROPOUTS and (in_eval or module.p == 0 or not module.training))
    return idle and kind.forward is _IDLE_FORWARDS[kind] and not is_replaced(module) and not is_watched(module)


@functools.cache
def _block_class(kind: Any, source: Any, norms: tuple[str, ...], activations: tuple[str, ...]) -> tuple[Any, Any, Any]:
    """The class that fuses the norms of a block that has the forward `source` and these children; the norms, with the
    name or the module of the activation; and the reason if there is no such class.
    """
    innermost = inspect.unwrap(source)
    if not isinstance(innermost, types.FunctionType):
        return None, {}, "its forward is no Python function"
    self = innermost.__code__.co_varnames[0]
    known: dict[str, str | None] = dict.fromkeys(f"{self}.{name}" for name in activations)
    known |= _functions(innermost)
    try:
        forward, found = rewrite(source, {f"{self}.{name}" for name in norms}, known, norm_act)
        made = _subclass(kind, forward, (_class_of, kind, norms, activations)) if found else None
    except Unreadable as reason:
        return None, {}, str(reason)
    named = {norm.split(".")[1]: (known[after], after.split(".")[-1]) for norm, after in found.items()}
    return made, named, None


def _class_of(kind: Any, norms: tuple[str, ...], activations: tuple[str, ...]) -> tuple[Any, Any, Any]:
    """`_block_class` for pickles, which do not hold the forward."""
    return _block_class(kind, kind.forward, norms, activations)


def _functions(function: types.FunctionType) -> dict[str, str | None]:
    """The activations of PyTorch by the names that they have inside a function."""
    texts: dict[str, str | None] = {}
    local = _variables(function.__code__)
    for name, value in function.__globals__.items():
        if name in local:
            continue
        for owner, path in ((torch, ""), (F, ""), (torch.nn, "functional."), (torch, "nn.functional.")):
            if value is owner:
                texts |= {f"{name}.{path}{known}": known for known in _FUNCTIONS[F if path else owner]}
        for owner, names in _FUNCTIONS.items():
            for known in names:
                if value is getattr(owner, known):
                    texts[name] = known
    return texts


def _variables(code: types.CodeType) -> set[str]:
    """The names of a function's own variables, and of those of the functions and comprehensions in it."""
    inner = [_variables(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_varnames).union(code.co_cellvars, *inner)


def _subclass(kind: Any, forward: Any, recipe: tuple[Any, ...]) -> Any:
    """A class that looks like `kind`, with another forward. Pickles and copies are made by the recipe, unless modules
    of this kind have a way of their own, as those of torch.fx do. Raises Unreadable if `kind` allows no such class.
    """

    def reduce(self: Module, protocol: Any) -> Any:
        make, arguments, *state = kind.__reduce_ex__(self, protocol)
        usual = make is copyreg._reconstructor or (make is copyreg.__newobj__ and len(arguments) == 1)  # type: ignore[attr-defined]
        return (_restored, recipe, *state) if usual else (make, arguments, *state)

    space = {"forward": forward, "unfused": kind, "__reduce_ex__": reduce, "__module__": kind.__module__,
             "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}  # fmt: skip
    try:
        return types.new_class(kind.__name__, (kind,), {}, lambda namespace: namespace.update(space))
    except Exception as error:  # whatever its __init_subclass__ or metaclass raises
        raise Unreadable(f"{kind.__name__} allows no subclass: {error}") from error


def _restored(make: Any, kind: Any, *children: Any) -> Any:
    """A new object of the class of a recipe, still empty; of `kind` itself where that is written otherwise here."""
    cls = make(kind, *children)[0] or kind
    return cls.__new__(cls)


def is_ours(norm: Module) -> bool:
    """Whether a module is a `GroupNorm` of which nothing was changed, and which leaves the activation to others. With
    `inplace` x would hold what the norm gives, or what the activation gives.
    """
    plain = type(norm) is GroupNorm and not is_replaced(norm)
    return plain and norm.activation is None and not norm.track_running_stats and not norm.inplace
