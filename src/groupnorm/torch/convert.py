"""Whole models: swap every torch.nn.GroupNorm for this package's, fuse the activation that follows, and back again.

A module is swapped by changing its class, so it stays the same object: parameters, hooks, names, and whoever refers to
it know nothing of it.
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from groupnorm.torch.module import GroupNorm

__all__ = ["Change", "Report", "convert", "revert"]

Module = Any

_BATCH_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
_GROUPS = 32  # the number of Wu and He, where it divides the channels and leaves two of them to a group
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OPTIONS = ("activation", "inplace", "momentum", "track_running_stats")  # what a torch.nn.GroupNorm has not


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to one module: `action` is "swapped", "fused", "replaced" or "skipped"."""

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


class Fused(torch.nn.Identity):
    """The place of an activation that the norm before it does now; `original` is that activation."""

    def __init__(self, original: Module) -> None:
        super().__init__()
        self._original = (original,)  # in a tuple, so that it is no submodule

    @property
    def original(self) -> Module:
        """The activation that stood here."""
        return self._original[0]

    def extra_repr(self) -> str:
        """The activation that stood here."""
        return f"{self.original} in the norm before"


def convert(model: Module, *, batch_norm: bool = False) -> Report:
    """Swap every torch.nn.GroupNorm in `model` for `GroupNorm`, in place, and let it do the activation that follows it
    in a torch.nn.Sequential. Returns a `Report`, which prints as a table. Converting twice changes nothing; `revert`
    undoes it.

    batch_norm: also replace BatchNorm1d to 3d by a GroupNorm whose weight and bias take up the running statistics, so
    that it starts near what the BatchNorm does in eval. That is another function, to be trained further, and is not
    undone by `revert`.

    Subclasses of torch.nn.GroupNorm stay as they are. So does an activation wherever fusing could be seen: if it or the
    norm has hooks, or if the norm is used in several places.
    """
    report = Report()
    for name, module in model.named_modules():
        if type(module) is torch.nn.GroupNorm:
            _swap(module)
            report.changes.append(Change(name, "swapped", _sizes(module)))
        elif isinstance(module, torch.nn.GroupNorm) and not isinstance(module, GroupNorm):
            report.changes.append(Change(name, "skipped", f"{type(module).__name__} is a class of its own"))
        elif batch_norm and type(module) in _BATCH_NORMS:
            report.changes.append(_replace_batch_norm(name, module))
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for name, module in model.named_modules():
        if type(module) is torch.nn.Sequential:
            report.changes += _fuse_neighbours(name, module, places)
    return report


def revert(model: Module) -> Report:
    """Undo `convert`: every `GroupNorm` that a torch.nn.GroupNorm can stand for becomes one, and fused activations come
    back.
    """
    report = Report()
    for name, module in model.named_modules():
        for key, child in list(module._modules.items()):
            if isinstance(child, Fused):
                module._modules[key] = child.original
                report.changes.append(Change(_joined(name, key), "restored", str(child.original)))
                before = list(module._modules.values())[list(module._modules).index(key) - 1]
                before.activation = None
    for name, module in model.named_modules():
        if type(module) is GroupNorm:
            if module.activation is not None or module.track_running_stats:
                report.changes.append(Change(name, "skipped", "torch.nn.GroupNorm has no such options"))
                continue
            _swap_back(module)
            report.changes.append(Change(name, "swapped", _sizes(module)))
    return report


def _swap(module: Module) -> None:
    module.__class__ = GroupNorm
    module.activation, module.inplace, module.momentum, module.track_running_stats = None, False, None, False


def _swap_back(module: Module) -> None:
    for option in _OPTIONS:
        del module.__dict__[option]
    module.__class__ = torch.nn.GroupNorm


def _fuse_neighbours(name: str, sequential: Module, places: Counter[int]) -> list[Change]:
    changes = []
    items = list(sequential._modules.items())
    for (_, norm), (key, follower) in pairwise(items):
        activation = _name_of(follower)
        if type(norm) is not GroupNorm or activation is None or norm.activation is not None:
            continue
        reason = None
        if any(getattr(module, hooks) for module in (norm, follower) for hooks in _HOOKS):
            reason = "hooks would see the change"
        elif places[id(norm)] > 1:
            reason = "the norm is used in several places"
        elif norm.track_running_stats:
            reason = "the norm keeps running statistics"
        if reason is not None:
            changes.append(Change(_joined(name, key), "skipped", reason))
            continue
        norm.activation = activation
        sequential._modules[key] = Fused(follower)
        changes.append(Change(_joined(name, key), "fused", f"{activation} into the norm before"))
    return changes


def _name_of(module: Module) -> str | None:
    """The name of the activation that a module is; None if it is something else."""
    if type(module) is torch.nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    names = {torch.nn.ReLU: "relu", torch.nn.SiLU: "silu", torch.nn.Sigmoid: "sigmoid", torch.nn.Tanh: "tanh",
             torch.nn.Hardswish: "hardswish"}  # fmt: skip
    return names.get(type(module))


def _replace_batch_norm(name: str, module: Module) -> Change:
    """Turn a BatchNorm into a GroupNorm. Its running statistics say what the groups' will be: mean u = mean(u_c) and
    variance s^2 = mean(s_c^2 + (u_c - u)^2) over the channels c of a group. With r_c = 1 / sqrt(s_c^2 + eps), weight' =
    weight * s * r_c and bias' = bias + weight * (u - u_c) * r_c the GroupNorm gives what the BatchNorm gave.
    """
    channels = module.num_features
    groups = max(d for d in range(1, _GROUPS + 1) if channels % d == 0 and (channels // d > 1 or d == 1))
    like = module.weight if module.weight is not None else module.running_mean
    kind: dict[str, Any] = {} if like is None else {"device": like.device, "dtype": like.dtype}
    norm: Any = GroupNorm(groups, channels, module.eps, **kind)
    if module.weight is not None:
        norm.weight, norm.bias = module.weight, module.bias  # the same parameters, for who holds them
    with torch.no_grad():
        if module.running_mean is not None:
            mean, var = (t.double().view(groups, -1) for t in (module.running_mean, module.running_var))
            of_group = mean.mean(1, keepdim=True)
            std = (var + (mean - of_group) ** 2).mean(1, keepdim=True).sqrt()
            factor = norm.weight.double() * torch.rsqrt(var + module.eps).view(-1)
            norm.bias += (factor * (of_group - mean).view(-1)).to(norm.bias.dtype)
            norm.weight.copy_(factor * std.expand_as(var).reshape(-1))
    norm.train(module.training)
    hooks = {key: module.__dict__[key] for key in module.__dict__ if key.endswith("_hooks")}
    kind_before = type(module).__name__
    module.__class__ = GroupNorm
    module.__dict__.clear()
    module.__dict__.update(norm.__dict__ | hooks)
    return Change(name, "replaced", f"{kind_before}: {_sizes(module)}; train it further")


def _sizes(module: Module) -> str:
    return f"{module.num_groups} groups of {module.num_channels} channels"


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
