"""A PyTorch model by the name of what makes it: module:factory."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from groupnorm.analysis.model_layers import import_torch
from groupnorm.errors import OptionError

__all__ = ["example_input", "make_model"]

_MAX_ELEMENTS = 1 << 30  # 4 GB of float32
_DIGITS = 18  # of a size: it fits 64 bits


def make_model(spec: str) -> Any:
    """What `factory()` of a module in the current folder or an installed package gives, or the model of that name.

    spec: module:name, the name with dots where it lies in a class. Raises OptionError, with the type and text of what
    went wrong, also when it is the module or the factory that raises.
    """
    torch = import_torch()
    module, colon, name = spec.partition(":")
    if not (colon and module and name):
        raise OptionError(f"--model must be module:factory, such as mynet:build: got {spec!r}")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m has it, and the command groupnorm has not
    with _errors(f"--model {spec}: {module} cannot be imported"):
        found: Any = importlib.import_module(module)
    with _errors(f"--model {spec}: {module} has no {name}"):
        for part in name.split("."):
            found = getattr(found, part)
    if not isinstance(found, torch.nn.Module):
        if not callable(found):
            raise OptionError(f"--model {spec}: {name} is {_kind(found)}, neither a factory nor a torch.nn.Module")
        with _errors(f"--model {spec}: {name}() raised"):
            found = found()
    if not isinstance(found, torch.nn.Module):
        raise OptionError(f"--model {spec}: {name}() gave {_kind(found)}, no torch.nn.Module")
    return found


def example_input(text: str) -> Any:
    """A float32 tensor of normal numbers, always the same, of the shape in "1,3,224,224" or "1x3x224x224"."""
    torch = import_torch()
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() and len(part) <= _DIGITS and int(part) > 0 for part in parts):
        raise OptionError(f"--input must be sizes with commas between them, such as 1,3,224,224: got {text!r}")
    shape = [int(part) for part in parts]
    elements = 1
    for size in shape:
        elements *= size
    if elements > _MAX_ELEMENTS:
        raise OptionError(f"--input {text} has {elements} elements, more than {_MAX_ELEMENTS}; use a smaller one")
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """Whatever somebody's code raises as one OptionError; what it prints goes to stderr, as stdout is for answers."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise OptionError(f"{what}: {_said(error)}") from error


def _said(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:
        text = "its text cannot be made"
    return f"{type(error).__name__}: {text}".rstrip(": ")


def _kind(value: Any) -> str:
    return f"an object of type {type(value).__name__}"
