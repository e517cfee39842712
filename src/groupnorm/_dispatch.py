"""Which engine takes a problem: a table, and one function that reads it."""

from importlib import import_module
from typing import Any

from groupnorm._core.problem import Problem
from groupnorm.errors import EngineError, OptionError

__all__ = ["ENGINES", "choose", "engine"]

ENGINES = {  # name -> module; an engine is imported when it is first chosen
    "cpu": "groupnorm._engines.cpu",
    "reference": "groupnorm._engines.reference",
    "gpu": None,  # takes tensors that live on a GPU, so it is never chosen for NumPy arrays
}


def engine(name: Any) -> Any:
    """The engine's module; OptionError for an unknown name, EngineError for one that is not here."""
    if not isinstance(name, str) or name not in ENGINES:
        raise OptionError(f"impl must be one of None, {', '.join(ENGINES)}: got {name!r}; None picks the fastest")
    module = ENGINES[name]
    if module is None:
        raise EngineError(f'impl="{name}" takes arrays in GPU memory: got a NumPy array in host memory; use "cpu"')
    try:
        return import_module(module)
    except ImportError as error:
        raise EngineError(
            f'impl="{name}" could not be loaded ({error}); reinstall groupnorm, or use impl="reference"'
        ) from error


def choose(problem: Problem, impl: str | None, num_threads: int) -> tuple[Any, Any]:
    """The engine (a module) that will take the problem, and its plan. A named engine is obeyed or refused, never
    replaced.
    """
    chosen = engine("cpu" if impl is None else impl)
    refusal = chosen.supports(problem)
    if refusal is not None:
        raise EngineError(f'{impl or "cpu"} engine: {refusal}; impl="reference" takes every problem')
    return chosen, chosen.plan(problem, num_threads)
