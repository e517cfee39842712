"""Norm and activation in one kernel where only the graph of a whole model shows that they belong together.

For what `rewrite.py` does not see: a norm and an activation in different modules, or in a forward without source. The
norm takes over the activation, whose place is held by a module that does nothing. So it holds for calls of the whole
model that take the way that was traced, which only who calls the model can know: `convert` does it when asked.
"""

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx

from groupnorm.torch.fusion import activation_name, is_fused, is_ours, is_watched

__all__ = ["Placeholder", "fuse_graph", "restore"]

Module = Any


class Placeholder(torch.nn.Identity):
    """Stands where an activation stood that the norm before it does now."""

    def __init__(self, original: Module, norm: Module) -> None:
        super().__init__()
        self._both = (original, norm)  # in a tuple, so that they are no submodules

    @property
    def original(self) -> Module:
        """The activation that stood here."""
        return self._both[0]

    @property
    def norm(self) -> Module:
        """The norm that does it now."""
        return self._both[1]

    def extra_repr(self) -> str:
        """The activation that stood here."""
        return f"{self.original} in the norm before"


def fuse_graph(model: Module) -> list[tuple[str, str]]:
    """Let norms do the activations that are the only users of what they give. Gives the names of both.

    Only if torch.fx can trace the model and finds the same in training and in eval; only modules that are called once
    and have no hooks.
    """
    modules = dict(model.named_modules())
    places = Counter(id(child) for module in modules.values() for child in module._modules.values())
    watched = {name for name, module in modules.items() if is_watched(module)}  # a module may give what its norm gives
    free = {name for name, module in modules.items() if places[id(module)] == 1 and watched.isdisjoint(_within(name))}
    norms = {name for name in free if is_ours(modules[name]) and not is_fused(modules[name.rpartition(".")[0]])}
    activations = {name for name in free if activation_name(modules[name]) is not None}
    if not norms or not activations:
        return []
    in_both = _pairs(model, True) & _pairs(model, False)
    found = [(norm, after) for norm, after in sorted(in_both) if norm in norms and after in activations]
    for norm, after in found:
        parent, _, key = after.rpartition(".")
        modules[norm].activation = activation_name(modules[after])
        modules[parent]._modules[key] = Placeholder(modules[after], modules[norm])
    return found


def _within(name: str) -> list[str]:
    """A module's name and those of the modules that it is in."""
    parts = name.split(".")
    return ["", *(".".join(parts[:end]) for end in range(1, len(parts) + 1))]


def restore(model: Module) -> list[str]:
    """Put the activations back in their places. Gives their names."""
    names = []
    for parent, module in list(model.named_modules()):
        for key, child in list(module._modules.items()):
            if isinstance(child, Placeholder):
                child.norm.activation = None
                child.original.training = child.training
                module._modules[key] = child.original
                names.append(f"{parent}.{key}" if parent else key)
    return names


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        """Norms are leaves, too."""
        return isinstance(m, torch.nn.GroupNorm) or super().is_leaf_module(m, module_qualified_name)


def _pairs(model: Module, training: bool) -> set[tuple[str, str]]:
    """Names of modules that follow each other and are called once, the first having one user; nothing if the model
    cannot be traced.
    """
    with _unchanged(model) as modules, warnings.catch_warnings(), torch.random.fork_rng(devices=()):
        warnings.simplefilter("ignore")
        for module in modules:  # not by model.train(), which may do more than that, merge weights of LoRA for example
            module.training = training
        try:
            nodes = list(_Tracer().trace(model).nodes)
        except Exception:  # whatever a model does that a proxy of a tensor cannot
            return set()
        held = set(_held(modules))
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    return {
        (str(node.args[0].target), str(node.target))
        for node in nodes
        if node.op == "call_module" and calls[node.target] == 1
        and len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], torch.fx.Node)
        and node.args[0].op == "call_module" and calls[node.args[0].target] == 1 and len(node.args[0].users) == 1
        and node.args[0] not in held
    }  # fmt: skip


def _held(modules: list[Module]) -> Iterator[Any]:
    """The nodes whose values modules hold on to (`self.features = h`): users that a graph does not show."""
    for module in modules:
        for value in module.__dict__.values():
            for item in (value, *_items(value)):
                if isinstance(item, torch.fx.Proxy):
                    yield item.node


def _items(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, list | tuple) else []


@contextlib.contextmanager
def _unchanged(model: Module) -> Iterator[list[Module]]:
    """Whatever modules are given as attributes in here is forgotten after, and buffers are as they were. Gives the
    modules of which that is so: all but compiled ones.
    """
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    kept = [(module.__dict__, dict(module.__dict__)) for module in modules]
    attributes = [value for module in modules for value in module.__dict__.values()]
    kept += [(value, dict(value)) for value in attributes if isinstance(value, dict)]
    lists = [(value, list(value)) for value in attributes if isinstance(value, list)]
    moving = [buffer for buffer in model.buffers() if not buffer.is_inference()]
    buffers = [(buffer, buffer._version, buffer.detach().clone()) for buffer in moving]
    try:
        yield modules
    finally:
        for now, before in kept:
            now.clear()
            now.update(before)
        for values, items in lists:
            values[:] = items
        for buffer, version, numbers in buffers:
            if buffer._version != version:
                buffer.detach().copy_(numbers)
