"""The specification as an engine: `groupnorm.reference` behind the contract. Slow, takes everything."""

from typing import Any

import numpy as np

from groupnorm import reference
from groupnorm._core.layout import Walk
from groupnorm._core.problem import Problem

__all__ = ["backward", "forward", "plan", "supports"]


def supports(problem: Problem) -> str | None:
    """It takes every problem."""
    return None


def plan(problem: Problem, num_threads: int) -> Problem:
    """The problem itself: there is nothing to choose."""
    return problem


def _cube(array: Any, problem: Problem, walk: Walk) -> Any:
    """The array seen as (N, C, S), without a copy."""
    strides = (step * array.itemsize for step in walk)
    return np.lib.stride_tricks.as_strided(array, (problem.N, problem.C, problem.S), tuple(strides))


def _options(p: Problem, scale: Any, shift: Any, residual: Any, mask: Any) -> dict[str, Any]:
    return {
        "eps": p.eps, "activation": p.activation, "scale": scale, "shift": shift, "mask": mask, "uneven": p.uneven,
        "residual": None if residual is None else _cube(residual, p, p.walks["residual"]),
    }  # fmt: skip


def forward(p: Problem, x: Any, y: Any, weight: Any, bias: Any, scale: Any, shift: Any, residual: Any, mask: Any,
            mean: Any, rstd: Any, moments: Any) -> None:  # fmt: skip
    """Fill y, and mean and rstd or moments where given."""
    options = _options(p, scale, shift, residual, mask)
    x = _cube(x, p, p.walks["x"])
    if p.task == "normalize":
        options["mean"] = moments[..., 1]
        options["rstd"] = 1 / np.sqrt(moments[..., 2] / np.maximum(moments[..., 0], 1) + p.eps)
    if p.task == "moments":
        moments[...] = np.stack(reference.moments(x, p.G, mask=mask, uneven=p.uneven), 2)
        return
    result, group_mean, group_rstd = reference.group_norm(x, p.G, weight, bias, **options)
    _cube(y, p, p.walks["y"])[...] = result
    if mean is not None:
        mean[...], rstd[...] = group_mean, group_rstd


def backward(p: Problem, dy: Any, x: Any, dx: Any, weight: Any, bias: Any, scale: Any, shift: Any, residual: Any,
             mask: Any, mean: Any, rstd: Any, dweight: Any, dbias: Any, dscale: Any, dshift: Any,
             dresidual: Any) -> None:  # fmt: skip
    """Fill dx and every other gradient that is given."""
    options = _options(p, scale, shift, residual, mask)
    dy, x = (_cube(a, p, p.walks[name]) for a, name in ((dy, "dy"), (x, "x")))
    found = reference.group_norm_vjp(dy, x, p.G, weight, bias, mean=mean, rstd=rstd, **options)
    _cube(dx, p, p.walks["dx"])[...] = found.dx
    for target, value in (
        (dweight, found.dweight),
        (dbias, found.dbias),
        (dscale, found.dscale),
        (dshift, found.dshift),
    ):
        if target is not None:
            target[...] = value
    if dresidual is not None:
        _cube(dresidual, p, p.walks["dresidual"])[...] = found.dresidual
