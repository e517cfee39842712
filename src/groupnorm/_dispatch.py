"""Which engine takes a problem: a table, and one function that reads it."""

import os
from importlib import import_module
from typing import Any

from groupnorm._core.problem import Problem
from groupnorm.errors import EngineError, OptionError

__all__ = ["ENGINES", "choose", "engine"]

ENGINES = {  # name -> module; an engine is imported when it is first chosen
    "cpu": "groupnorm._engines.cpu",
    "reference": "groupnorm._engines.reference",
    "gpu": "groupnorm._engines.gpu",  # for arrays that live on a GPU; None never means this one
}


def engine(name: Any) -> Any:
    """The engine's module; OptionError for an unknown name, EngineError for one that is not here."""
    if not isinstance(name, str) or name not in ENGINES:
        raise OptionError(f"impl must be one of None, {', '.join(ENGINES)}: got {name!r}; None picks the fastest")
    try:
        return import_module(ENGINES[name])
    except ImportError as error:
        what = "install Triton: pip install 'triton>=3.6'" if name == "gpu" else "reinstall groupnorm"
        raise EngineError(f'impl="{name}" could not be loaded ({error}); {what}, or use another impl') from error


def choose(problem: Problem, impl: str | None, num_threads: int, *, on_gpu: bool = False) -> tuple[Any, Any]:
    """The engine (a module) that will take the problem, and its plan. A named engine is obeyed or refused, never
    replaced. on_gpu: where the arrays are; Triton's interpreter takes those in host memory for the GPU engine.
    """
    if impl == "gpu" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise EngineError('impl="gpu" takes arrays in GPU memory: got a NumPy array in host memory; use "cpu", or move '
                          "it to the GPU and call groupnorm.torch")  # fmt: skip
    chosen = engine("cpu" if impl is None else impl)
    refusal = chosen.supports(problem)
    if refusal is not None:
        raise EngineError(f'{impl or "cpu"} engine: {refusal}; impl="reference" takes every problem')
    return chosen, chosen.plan(problem, num_threads)
