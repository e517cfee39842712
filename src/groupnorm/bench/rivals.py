"""Everybody who computes Group Normalization here, behind one signature: a table from a name to how it is prepared.

`prepare(work)` turns a `Work` into `Ready`: a callable that is timed, and a function that turns what it gave into
NumPy arrays. Whatever a rival needs once (its own tensors, a compiled graph, a session) is made in `prepare`, outside
the timed region. Backward means from dy to dx, dweight and dbias after a forward that has already run, with whatever
that rival keeps of it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from typing import Any

import numpy as np

import groupnorm as gn
from groupnorm.bench import peers_numpy, peers_onnx, peers_torch
from groupnorm.bench.ready import Ready, Unsupported
from groupnorm.bench.work import Work
from groupnorm.errors import OptionError

__all__ = ["RIVALS", "Rival", "installed", "select"]


@dataclass(frozen=True, slots=True)
class Rival:
    """One contestant. `needs`: modules that must be there; `packages`: distributions whose version is recorded."""

    name: str
    title: str
    prepare: Callable[[Work], Ready]
    needs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()


def _ours(work: Work) -> Ready:
    """As a user calls it: the output is allocated, from recycled memory when it is large."""
    x, weight, bias, groups = work.x, work.weight, work.bias, work.case.num_groups
    options: dict[str, Any] = {"eps": work.case.eps, "layout": work.layout, "activation": work.activation}
    gn.set_num_threads(work.threads)
    if work.direction == "forward":
        return Ready(lambda: gn.group_norm(x, groups, weight, bias, **options), lambda y: (y,))
    dy = work.dy
    _, mean, rstd = gn.group_norm(x, groups, weight, bias, return_stats=True, **options)
    options |= {"mean": mean, "rstd": rstd}
    return Ready(lambda: gn.group_norm_backward(dy, x, groups, weight, bias, **options), tuple)


def _ours_out(work: Work) -> Ready:
    """Into memory that exists, as the copy does."""
    if work.direction == "backward":
        raise Unsupported("backward has no out=")
    x, weight, bias, groups, out = work.x, work.weight, work.bias, work.case.num_groups, np.empty_like(work.x)
    options: dict[str, Any] = {"eps": work.case.eps, "layout": work.layout, "activation": work.activation, "out": out}
    gn.set_num_threads(work.threads)
    out.fill(0)  # every page exists
    return Ready(lambda: gn.group_norm(x, groups, weight, bias, **options), lambda y: (y,))


def _jax(work: Work) -> Ready:
    # XLA sizes its thread pool once, when it is first used, by this variable.
    os.environ.setdefault("NPROC", str(work.threads))
    from groupnorm.bench import peers_jax

    return peers_jax.prepare(work)


RIVALS: dict[str, Rival] = {
    rival.name: rival
    for rival in (
        Rival("groupnorm", "groupnorm", _ours),
        Rival("groupnorm-out", "groupnorm, out=", _ours_out),
        Rival("groupnorm-torch", "groupnorm.torch", peers_torch.prepare_ours, ("torch",), ("torch",)),
        Rival("torch", "PyTorch eager", peers_torch.prepare_eager, ("torch",), ("torch",)),
        Rival("torch-compile", "torch.compile", peers_torch.prepare_compiled, ("torch",), ("torch",)),
        Rival("jax", "JAX jit", _jax, ("jax", "jaxlib"), ("jax", "jaxlib")),
        Rival(
            "onnxruntime",
            "ONNX Runtime",
            peers_onnx.prepare_onnxruntime,
            ("onnxruntime", "onnx"),
            ("onnxruntime", "onnx"),
        ),
        Rival("openvino", "OpenVINO", peers_onnx.prepare_openvino, ("openvino",), ("openvino",)),
        Rival("numpy", "NumPy", peers_numpy.prepare),
    )
}


def installed(rival: Rival) -> str | None:
    """None if the rival can be used here, else the module that is missing."""
    return next((module for module in rival.needs if util.find_spec(module) is None), None)


def select(names: str | None) -> tuple[Rival, ...]:
    """The rivals of a comma-separated list, or every installed one for None; `groupnorm` itself is always among them.

    Raises OptionError for an unknown name, or for one that is named and not installed.
    """
    if names is None:
        return tuple(rival for rival in RIVALS.values() if installed(rival) is None)
    chosen = {"groupnorm": RIVALS["groupnorm"]}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in RIVALS:
            raise OptionError(f"rivals must be among {', '.join(RIVALS)}: got {name!r}")
        missing = installed(RIVALS[name])
        if missing is not None:
            raise OptionError(f"rival {name} needs {missing}, which is not installed: pip install {missing}")
        chosen[name] = RIVALS[name]
    return tuple(chosen.values())
