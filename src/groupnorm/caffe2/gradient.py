"""Gradient operators: of one GroupNorm, and of a net of them, named and summed as Caffe2 does it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from groupnorm.caffe2.definition import create_operator, group_norm_operators, naming, operator_from_definition
from groupnorm.caffe2.proto import as_message
from groupnorm.errors import GroupNormError, OptionError

__all__ = ["add_gradient_operators", "get_group_norm_gradient"]


def get_group_norm_gradient(op_def: Any) -> Any:
    """The OperatorDef of GroupNormGradient for an OperatorDef of GroupNorm with three outputs.

    Its inputs are dY, X, gamma, beta, mu and inv_std, its outputs dX, dgamma and dbeta, where the gradient of a blob x
    is called x_grad. All arguments, the device option and the engine are carried over, as Caffe2 does (the gradient
    reads group and order); is_gradient_op is true and the name empty.

    Raises OptionError for another type of operator, for one with a single output, and as `operator_from_definition`
    does. Source: Caffe2's GetGroupNormGradient and GetGradientForOp.
    """
    op = as_message("OperatorDef", op_def)
    with naming(op):
        if op.type != "GroupNorm":
            raise OptionError("the operator must be GroupNorm: gradients are made for it alone")
        operator_from_definition(op)
        _check_outputs(op)
    return _gradient_of(op, _gradient_name(op.output[0]))


def add_gradient_operators(net: Any, outputs: Mapping[str, str | None] | Iterable[str]) -> tuple[Any, dict[str, str]]:
    """A new NetDef with gradient operators after those of `net`, and a dictionary of each blob's gradient blob.

    net: a NetDef of GroupNorm operators; `net` itself is left as it is. outputs: the blobs to differentiate, with the
    blobs that hold their gradients; or their names alone (or None for a gradient), and then a ConstantFill makes a
    gradient of ones, called x_autogen_grad. Operators are gone through backwards; those that no given gradient reaches
    get none. Where several operators read a blob x, the gradient made first is x_grad, the next ones are called
    _x_grad_autosplit_0, _x_grad_autosplit_1, ..., and a Sum adds them up in x_grad.

    Raises OptionError for an operator that is not GroupNorm, one with a single output on the way, a blob that is
    written twice, or a gradient that would have to go through mean or inv_std, which carry none; GroupNormError for a
    blob that the net does not have. Source: Caffe2's core.GradientRegistry.GetBackwardPass.
    """
    net = as_message("NetDef", net)
    given = _given(outputs)
    _check_net(net, given)
    new = type(net)()
    new.CopyFrom(net)
    contributions: dict[str, list[_Contribution]] = {}
    gradients: dict[str, str] = {}
    for blob, gradient in given.items():
        gradients[blob] = name = gradient or f"{blob}_autogen_grad"
        made = None if gradient else _append(new, create_operator("ConstantFill", [blob], [name], value=1.0))
        contributions[blob] = [_Contribution(made, 0, name)]
    first_reader = {blob: index for index, op in reversed(list(enumerate(net.op))) for blob in op.input}
    for index, op in reversed(list(enumerate(net.op))):
        if any(blob in gradients for blob in op.output[1:]):
            with naming(op, index):
                raise OptionError("mean and inv_std carry no gradient in Caffe2, and one was asked for "
                                  f"{' and '.join(b for b in op.output[1:] if b in gradients)}; differentiate Y "
                                  "only")  # fmt: skip
        if op.output[0] in gradients:
            with naming(op, index):
                _check_outputs(op)
            made = _append(new, _gradient_of(op, gradients[op.output[0]]))
            for place, blob in enumerate(op.input):
                contributions.setdefault(blob, []).append(_Contribution(made, place, made.output[place]))
                gradients[blob] = contributions[blob][0].name
        for blob in dict.fromkeys(op.input):
            if first_reader[blob] == index and len(contributions.get(blob, ())) > 1:
                gradients[blob] = _add_sum(new, contributions[blob])
    _check_names(net, new, given)
    if net.external_input:
        declared = {*net.external_input, *(blob for op in net.op for blob in op.output)}
        new.external_input.extend(dict.fromkeys(g for g in given.values() if g is not None and g not in declared))
    return new, gradients


@dataclass(slots=True)
class _Contribution:
    """One of the gradients that add up to a blob's: the operator that makes it, None if it is given, and its name."""

    maker: Any
    place: int  # among the outputs of the maker
    name: str


def _append(net: Any, op: Any) -> Any:
    """Add a copy of the operator to the net; returns that copy."""
    net.op.add().CopyFrom(op)
    return net.op[-1]


def _gradient_name(blob: str) -> str:
    return f"{blob}_grad"


def _gradient_of(op: Any, dY: str) -> Any:
    X, gamma, beta = op.input
    _, mu, inv_std = op.output
    made = create_operator("GroupNormGradient", [dY, X, gamma, beta, mu, inv_std], [*map(_gradient_name, op.input)])
    made.arg.extend(op.arg)
    if op.HasField("device_option"):
        made.device_option.CopyFrom(op.device_option)
    if op.HasField("engine"):
        made.engine = op.engine
    made.is_gradient_op = True
    return made


def _add_sum(net: Any, parts: list[_Contribution]) -> str:
    """Give the contributions names of their own and add the Sum operator; returns the name of the sum."""
    given = {part.name for part in parts if part.maker is None}
    made = [part for part in parts if part.maker is not None]
    total = made[0].name
    renamed = made if total in given else made[1:]  # the first keeps its name, unless a given gradient has it
    for number, part in enumerate(renamed):
        part.name = part.maker.output[part.place] = f"_{part.name}_autosplit_{number}"
    names = [part.name for part in parts]
    if total in names:
        names.remove(total)
        names.insert(0, total)  # Sum works in place on its first input
    op = create_operator("Sum", names, [total])
    if made[0].maker.HasField("device_option"):
        op.device_option.CopyFrom(made[0].maker.device_option)
    _append(net, op)
    return total


def _given(outputs: Mapping[str, str | None] | Iterable[str]) -> dict[str, str | None]:
    if isinstance(outputs, str):
        raise OptionError(f"outputs must be a list of blobs or a dictionary: got the string {outputs!r}; "
                          f"pass [{outputs!r}]")  # fmt: skip
    try:
        given = dict(outputs) if isinstance(outputs, Mapping) else dict.fromkeys(outputs)
    except TypeError as error:
        raise OptionError(f"outputs must be a list of blobs or a dictionary: got {outputs!r}") from error
    if not all(
        isinstance(blob, str) and (name is None or (isinstance(name, str) and name)) for blob, name in given.items()
    ):
        raise OptionError(f"outputs must map names of blobs to names of their gradients, or None: got {outputs!r}")
    if not given:
        raise OptionError("outputs must name at least one blob to differentiate: got none")
    return given


def _check_outputs(op: Any) -> None:
    if len(op.output) != 3:
        raise OptionError("the gradient needs mean and inv_std, which the operator does not give: got 1 output, "
                          "expected 3 (Y, mean, inv_std); add the two outputs, with is_test=0")  # fmt: skip


def _check_net(net: Any, given: Mapping[str, str | None]) -> None:
    group_norm_operators(
        net, "gradients are made for nets of GroupNorm operators alone; differentiate the rest elsewhere, and give the "
        "gradients of what these operators put out",
    )  # fmt: skip
    known = {blob for op in net.op for blob in (*op.input, *op.output)}
    for blob in given:
        if blob not in known:
            raise GroupNormError(f"the net has no blob {blob!r} to differentiate; its blobs are "
                                 f"{', '.join(sorted(known)) or 'none'}")  # fmt: skip


def _check_names(net: Any, new: Any, given: Mapping[str, str | None]) -> None:
    """No gradient overwrites a blob of the net, or a gradient that was given for something else."""
    old = {blob for op in net.op for blob in (*op.input, *op.output)}
    for op in new.op[len(net.op) :]:
        for blob in op.output:
            if blob in old or (op.type != "Sum" and blob in given.values()):
                raise OptionError(f"the gradient {blob!r} would overwrite a blob of that name; rename that blob")
