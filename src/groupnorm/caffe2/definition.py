"""From an OperatorDef to the operator that it defines, and an OperatorDef from plain values."""

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral, Real
from typing import Any

from groupnorm.caffe2.operators import GroupNormGradientOp, GroupNormOp
from groupnorm.caffe2.proto import as_message, message_class
from groupnorm.errors import DtypeError, GroupNormError, OptionError

__all__ = [
    "IgnoredArgumentWarning",
    "argument",
    "create_operator",
    "group_norm_operators",
    "naming",
    "operator_from_definition",
]

_HELD: dict[str, tuple[Any, Any]] = {  # field of an Argument -> what it takes, and how that becomes its value
    "i": (Integral, int),
    "f": (Real, float),
    "s": (str | bytes, lambda text: text.encode() if isinstance(text, str) else text),
}
_KINDS = {"i": "an int", "f": "a float", "s": "a string"}  # fields of an Argument that hold one value
_LISTS = {"ints": "a list of ints", "floats": "a list of floats", "strings": "a list of strings"}
_OUTPUTS = {"GroupNorm": "1 (Y) or 3 (Y, mean, inv_std)", "GroupNormGradient": "3 (dX, dgamma, dbeta)"}
_INPUTS = {"GroupNorm": "3 (X, gamma, beta)", "GroupNormGradient": "6 (dY, X, gamma, beta, mu, inv_std)"}


class IgnoredArgumentWarning(UserWarning):
    """An operator has the argument num_groups, which Caffe2's schema documents, and not group, which its code reads."""


def create_operator(
    type: str, inputs: Sequence[str], outputs: Sequence[str], *, name: str = "", control_input: Sequence[str] = (),
    device_option: Any = None, engine: str = "", debug_info: str = "", **arguments: Any,
) -> Any:  # fmt: skip
    """An OperatorDef of the type, between blobs of these names (a string is one name), with these arguments.

    An argument may be an int or bool, a float, a str or bytes, or a list of these. control_input, device_option (a
    DeviceOption), engine and debug_info are fields of the definition. Raises DtypeError for anything else. Source: the
    convention of Caffe2's core.CreateOperator.
    """
    inputs, outputs, control_input = (_names(names) for names in (inputs, outputs, control_input or ()))
    texts: dict[str, Any] = {"type": type, "name": name, "engine": engine or "", "debug_info": debug_info or ""}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise DtypeError(f"{key} must be a string: got {text!r}")
    given = {key: text for key, text in texts.items() if text or key in ("type", "name")}
    op = message_class("OperatorDef")(input=inputs, output=outputs, control_input=control_input, **given)
    if device_option is not None:
        op.device_option.CopyFrom(as_message("DeviceOption", device_option))
    for key, value in arguments.items():
        values = list(value) if isinstance(value, list | tuple) else [value]
        kind = next((k for k, (types, _) in _HELD.items() if all(isinstance(v, types) for v in values)), None)
        if kind is None:
            raise DtypeError(f"argument {key} must be an int, a float, a string or a list of one of them: "
                             f"got {value!r}")  # fmt: skip
        values = [_HELD[kind][1](v) for v in values]
        held = op.arg.add(name=key)
        try:
            if isinstance(value, list | tuple):
                getattr(held, {"i": "ints", "f": "floats", "s": "strings"}[kind]).extend(values)
            else:
                setattr(held, kind, values[0])
        except (ValueError, OverflowError) as error:
            raise OptionError(f"argument {key} must fit 64 bits: got {value!r}") from error
    return op


def _names(names: Any) -> list[str]:
    """Names of blobs as a list; a string is one name."""
    found: list[Any] = [names] if isinstance(names, str) else list(names) if isinstance(names, Iterable) else [None]
    if not all(isinstance(name, str) for name in found):
        raise DtypeError(f"blobs must be given as a list of names: got {names!r}")
    return found


def operator_from_definition(op_def: Any) -> GroupNormOp | GroupNormGradientOp:
    """The operator that an OperatorDef of type GroupNorm or GroupNormGradient defines.

    Reads the arguments group, epsilon, order and is_test as Caffe2 does, with its defaults (32, 1e-5, "NCHW", 1), and
    warns with IgnoredArgumentWarning where num_groups stands in place of group. Raises OptionError for another type of
    operator, a wrong number of inputs or outputs, an argument of the wrong type or value.
    """
    op = as_message("OperatorDef", op_def)
    if op.type not in _INPUTS:
        raise OptionError(f"the operator must be GroupNorm or GroupNormGradient: got {op.type!r}")
    gradient = op.type == "GroupNormGradient"
    if len(op.input) != (6 if gradient else 3):
        raise OptionError(f"the operator must have {_INPUTS[op.type]} inputs: got {len(op.input)}")
    if len(op.output) not in ((3,) if gradient else (1, 3)):
        raise OptionError(f"the operator must have {_OUTPUTS[op.type]} outputs: got {len(op.output)}")
    names = [held.name for held in op.arg]
    if "num_groups" in names and "group" not in names:
        warnings.warn(
            f"{_label(op)}: num_groups is ignored, and 32 groups are used: the argument that Caffe2 reads is group; "
            "rename num_groups to group", IgnoredArgumentWarning, stacklevel=2,
        )  # fmt: skip
    group, order = argument(op, "group", "i", 32), _text(argument(op, "order", "s", b"NCHW"))
    if gradient:
        return GroupNormGradientOp(group, order)
    epsilon, is_test = argument(op, "epsilon", "f", 1e-5), argument(op, "is_test", "i", 1)
    return GroupNormOp(group, epsilon, order, bool(is_test), len(op.output))


def argument(op: Any, name: str, kind: str, default: Any) -> Any:
    """The value of an argument of an OperatorDef, or the default where it has none of that name.

    kind: "i", "f" or "s", the field that must hold it. Raises OptionError where another field does, or where the name
    stands twice with different values; Caffe2 enforces both.
    """
    found = [held for held in op.arg if held.name == name]
    if not found:
        return default
    if any(held != found[0] for held in found):
        raise OptionError(f"argument {name} stands twice, with different values; remove one")
    held = found[0]
    if not held.HasField(kind):
        fields = [held_field.name for held_field, _ in held.ListFields() if held_field.name != "name"]
        got = " and ".join(f"{(_KINDS | _LISTS).get(field, 'a message')} ({field})" for field in fields) or "no value"
        raise OptionError(f"argument {name} must be {_KINDS[kind]} ({kind}): got {got}")
    return getattr(held, kind)


def group_norm_operators(net: Any, refusal: str) -> list[GroupNormOp]:
    """The operators of a NetDef that consists of GroupNorm operators, each blob of which keeps its value.

    Raises OptionError, with the index, type and name of the operator: with `refusal` for another type, for a blob that
    is written after it was written or read, and as `operator_from_definition` does.
    """
    operators = []
    known: set[str] = set()
    for index, op in enumerate(net.op):
        with naming(op, index):
            if op.type != "GroupNorm":
                raise OptionError(refusal)
            operator = operator_from_definition(op)
            assert isinstance(operator, GroupNormOp)
            operators.append(operator)
            known.update(op.input)
            for blob in op.output:
                if blob in known:
                    raise OptionError(f"blob {blob!r} is written after it was written or read, and its first value "
                                      "would be lost; give this output another name")  # fmt: skip
                known.add(blob)
    return operators


@contextlib.contextmanager
def naming(op: Any, index: int | None = None) -> Iterator[None]:
    """Errors that are raised inside begin with the operator's index, type and name."""
    try:
        yield
    except GroupNormError as error:
        raise type(error)(f"{_label(op, index)}: {error}") from error


def _label(op: Any, index: int | None = None) -> str:
    number = "" if index is None else f" {index}"
    return f"operator{number} ({op.type or 'no type'}, {f'name {op.name!r}' if op.name else 'no name'})"


def _text(value: bytes) -> str:
    return value.decode("utf-8", "backslashreplace")
