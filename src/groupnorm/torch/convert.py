"""Whole models: swap every torch.nn.GroupNorm for this package's, fuse the activations that follow, and back again.

A module is swapped by changing its class, so it stays the same object: parameters, hooks, names, and whoever refers to
it know nothing of it.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from groupnorm.errors import DtypeError
from groupnorm.torch.batch_norm import BATCH_NORMS, replace_batch_norm
from groupnorm.torch.fusion import fuse, is_fused, is_replaced, unfuse
from groupnorm.torch.graph import fuse_graph, restore
from groupnorm.torch.module import GroupNorm
from groupnorm.torch.per_sample import register_with_opacus

__all__ = ["Change", "Report", "convert", "revert"]

Module = Any

# Those of PyTorch's own, which a library may replace.
_FORWARDS: dict[Any, Any] = {kind: kind.forward for kind in (torch.nn.GroupNorm, *BATCH_NORMS)}
_OPTIONS = ("activation", "inplace", "momentum", "track_running_stats")  # what a torch.nn.GroupNorm has not
_NOT_OF_BATCH_NORM = ("activation", "inplace", "num_groups", "num_channels")


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to one module: `action` is "swapped", "fused", "replaced", "restored" or "skipped"."""

    name: str
    action: str
    detail: str


@dataclass(slots=True)
class Report:
    """What `convert` or `revert` did, in the order of the model's modules; str(report) is a table."""

    changes: list[Change] = field(default_factory=list)

    def count(self, action: str) -> int:
        """How many modules this happened to."""
        return sum(change.action == action for change in self.changes)

    def __str__(self) -> str:
        if not self.changes:
            return "nothing to do: no norm that could be swapped"
        rows = [("module", "action", "detail"), *((c.name or "(model)", c.action, c.detail) for c in self.changes)]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{name:{widths[0]}}  {action:{widths[1]}}  {detail}".rstrip() for name, action, detail in rows]
        totals = ", ".join(f"{n} {action}" for action, n in Counter(c.action for c in self.changes).items())
        return "\n".join([*lines, totals])

    def _add(self, name: str, action: str, detail: str) -> None:
        self.changes.append(Change(name, action, detail))


def convert(model: Module, *, batch_norm: bool = False, across_modules: bool = False) -> Report:
    """Swap every torch.nn.GroupNorm in `model` for `GroupNorm`, in place, and let it do the activation that follows it.
    Returns a `Report`, which prints as a table. Converting twice changes nothing; `revert` undoes it.

    An activation is fused where that is the same computation for sure: after a norm in a torch.nn.Sequential, and where
    the source of a module's forward says `act(norm(x))`, in one or in several statements (see
    `groupnorm.torch.rewrite`), also with a residual or a scale and shift between them. Every module stays in its place:
    with hooks on the norm or the activation, or another module in their stead, both are called as before.

    across_modules: also fuse a norm with an activation in another module, where torch.fx, which traces the model's
    forward, shows that nobody else uses what the norm gives. The model must then always be called as a whole, and must
    take the same way through its forward whatever its arguments: a part of it that is called alone would give what the
    norm gives with the activation.

    batch_norm: also replace BatchNorm1d to 3d by a GroupNorm whose weight and bias take up the running statistics, so
    that it starts near what the BatchNorm does in eval. That is another function, to be trained further, and is not
    undone by `revert`.

    Subclasses of torch.nn.GroupNorm stay as they are. Raises DtypeError (a TypeError) for what is no module.
    """
    _check(model)
    report = Report()
    places = {name: place for place, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for name, module in model.named_modules():
        kind = type(module)
        ours = kind is torch.nn.GroupNorm or (batch_norm and kind in BATCH_NORMS)
        if ours and (is_replaced(module) or kind.forward is not _FORWARDS[kind]):
            report._add(name, "skipped", "its forward was replaced")
        elif ours and (taken := _taken(module)):
            report._add(name, "skipped", f"it has something of its own that is called {taken}")
        elif kind is torch.nn.GroupNorm:
            _swap(module)
            report._add(name, "swapped", _sizes(module))
        elif isinstance(module, torch.nn.GroupNorm) and kind is not GroupNorm:
            report._add(name, "skipped", f"{kind.__name__} is a class of its own")
        elif batch_norm and kind in BATCH_NORMS and not {"weight", "bias"} <= module._parameters.keys():
            report._add(name, "skipped", "its weight or bias is computed (pruning, or a norm of the weight)")
        elif batch_norm and kind in BATCH_NORMS and any(owners[id(p)] > 1 for p in module.parameters(recurse=False)):
            report._add(name, "skipped", "it shares its weight or bias with another module")
        elif batch_norm and kind in BATCH_NORMS:
            module.__dict__.pop("forward", None)
            replace_batch_norm(module)
            report._add(name, "replaced", f"{kind.__name__}: {_sizes(module)}; train it further")
        elif batch_norm and isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            report._add(name, "skipped", f"{kind.__name__} is a class of its own")
    for name, module in list(model.named_modules()):
        found = fuse(module)
        for norm, activation in found.norms.items():
            if norm in found.watched:
                report._add(_joined(name, norm), "skipped", f"no {activation} in it as long as there are hooks")
            else:
                report._add(_joined(name, norm), "fused", f"with the {activation} after it")
        if found.reason is not None:
            report._add(name, "skipped", f"no activation was fused: {found.reason}")
    for norm, activation in fuse_graph(model) if across_modules else []:
        report._add(norm, "fused", f"with {activation}, as torch.fx sees it")
    report.changes.sort(key=lambda change: places[change.name])
    return report


def revert(model: Module) -> Report:
    """Undo `convert`: every `GroupNorm` that a torch.nn.GroupNorm can stand for becomes one, and activations are done
    by themselves again.
    """
    _check(model)
    report = Report()
    for name, module in model.named_modules():
        if unfuse(module):
            report._add(name, "restored", "its own forward")
        elif is_fused(module):
            report._add(name, "skipped", "somebody made another class of the one that fuses")
    for name in restore(model):
        report._add(name, "restored", "in its place")
    for name, module in model.named_modules():
        if type(module) is GroupNorm:
            if module.activation is not None or module.track_running_stats:
                report._add(name, "skipped", "torch.nn.GroupNorm has no such options")
                continue
            if is_replaced(module):  # and may call this class's
                report._add(name, "skipped", "its forward was replaced")
                continue
            _swap_back(module)
            report._add(name, "swapped", _sizes(module))
        elif isinstance(module, GroupNorm):
            report._add(name, "skipped", f"{type(module).__name__} is a class of its own")
    return report


def _check(model: Module) -> None:
    if not isinstance(model, torch.nn.Module):
        raise DtypeError(f"model must be a torch.nn.Module: got {type(model).__name__}; pass the model itself")


def _taken(module: Module) -> str | None:
    """The first of the names that a `GroupNorm` needs and that somebody gave to something else in this module."""
    names = _OPTIONS if isinstance(module, torch.nn.GroupNorm) else _NOT_OF_BATCH_NORM
    return next((name for name in names if hasattr(module, name)), None)


def _swap(module: Module) -> None:
    register_with_opacus(GroupNorm)
    module.__dict__.pop("forward", None)
    module.__class__ = GroupNorm
    module.activation, module.inplace, module.momentum, module.track_running_stats = None, False, None, False


def _swap_back(module: Module) -> None:
    module.__dict__.pop("forward", None)
    for option in _OPTIONS:
        del module.__dict__[option]
    module.__class__ = torch.nn.GroupNorm


def _sizes(module: Module) -> str:
    return f"{module.num_groups} groups of {module.num_channels} channels"


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
