"""`advise_model`: a PyTorch model layer by layer: what its norms are, what they should be, and what they cost."""

import functools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from groupnorm._core.group_counts import usual_groups
from groupnorm._core.problem import DTYPES
from groupnorm.analysis.advice_text import norm_line, seconds
from groupnorm.analysis.advisor import TASKS, Advice, advise
from groupnorm.analysis.circumstances import norm_errors
from groupnorm.analysis.model_layers import Layer, find_layers
from groupnorm.analysis.published import SOURCES
from groupnorm.analysis.roofline import roofline
from groupnorm.errors import OptionError, ShapeError

__all__ = ["LayerAdvice", "ModelAdvice", "advise_model"]

Module = Any

_WORSE_POINTS = 0.5  # a present number of groups that scores this much worse than the best is worth a warning
_USUAL_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class LayerAdvice:
    """A norm, or a convolution that no norm follows. `groups`: those of a GroupNorm or InstanceNorm as it is.

    `advised`: the groups to take; None where no number is of use. `D` and `M`, channels and elements of a group, are
    those of the present groups, or where there are none of the advised ones. `shape`, `M` and the times are None
    without example inputs; `predicted_s` and `bound_s` (the least time) are for all `calls` in a forward of the model,
    with the groups of D.
    """

    name: str
    kind: str
    channels: int
    shape: tuple[int, ...] | None
    calls: int
    groups: int | None
    advised: int | None
    D: int
    M: int | None
    predicted_s: float | None
    bound_s: float | None
    after: str | None
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelAdvice:
    """What `advise_model` answers: its layers in order, as a sequence, and notes on the model; str() is a table."""

    layers: tuple[LayerAdvice, ...]
    notes: tuple[str, ...]
    task: str | None
    machine: str | None

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerAdvice]:
        return iter(self.layers)

    def __getitem__(self, index: int) -> LayerAdvice:
        return self.layers[index]

    def said(self) -> dict[str, list[str]]:
        """Each warning once, with the names of the layers that it is about."""
        found: dict[str, list[str]] = {}
        for layer in self.layers:
            for warning in layer.warnings:
                found.setdefault(warning, []).append(layer.name)
        return found

    def __str__(self) -> str:
        rows = [
            ("layer", "kind", "channels", "spatial", "D", "M", "groups", "advised", "time"),
            *map(cells, self.layers),
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines += [f"! {warning} ({names_of(names)})" for warning, names in self.said().items()]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)])


def advise_model(
    model: Module, example_inputs: Any = None, *, batch: int | None = None, task: str | None = None,
    machine: str | None = None,
) -> ModelAdvice:  # fmt: skip
    """Advice for every BatchNorm, GroupNorm, InstanceNorm and LayerNorm2d of a model, and for every convolution that no
    norm follows.

    example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments. With them the model runs
    once in eval mode, so that every layer's shape is known; without, group counts rest on the channels alone. batch:
    samples per GPU, if other than in the inputs: every layer's N is scaled by it. task, machine: as for `advise`.

    Returns a `ModelAdvice`. Raises OptionError for what is no torch.nn.Module, for an unknown task, and when the model
    raises. Cost: one forward, and one `advise` for each kind of layer.
    """
    if task is not None and task not in TASKS:
        raise OptionError(f"task must be None or one of {', '.join(TASKS)}: got {task!r}")
    wished: Any = batch
    if wished is not None and (isinstance(wished, bool) or not isinstance(wished, int) or wished < 1):
        raise ShapeError(f"batch must be a whole number, at least 1: got {batch!r}")
    found, plain = find_layers(model, example_inputs)
    given = _batch_of(example_inputs)
    norms = [layer for layer in found if layer.family != "conv"]
    eps = Counter(layer.eps for layer in norms if layer.eps is not None)
    usual_eps = max(eps, key=eps.__getitem__, default=_USUAL_EPS)
    answer = _Answers(given, batch, task, machine, usual_eps)
    bare = [layer for layer in found if layer.family == "conv" and not layer.feeds_norm]
    ran = example_inputs is not None
    shown = [layer for layer in found if layer.channels and not layer.feeds_norm
             and (layer.family != "conv" or ran or not norms)]  # fmt: skip
    layers = tuple(answer.layer(layer) for layer in shown)
    notes = _notes(norms, bare, plain, batch if batch is not None else given, ran, usual_eps)
    return ModelAdvice(layers, tuple(notes), task, answer.machine_name)


def cells(layer: LayerAdvice) -> tuple[str, ...]:
    """A layer as a row of a table: name, kind, channels, spatial, D, M, groups, advised, time."""
    spatial = None if layer.shape is None else "x".join(map(str, layer.shape[2:])) or "1"
    time_s = layer.bound_s if layer.predicted_s is None else layer.predicted_s
    time = "-" if time_s is None else ("" if layer.predicted_s is not None else "> ") + seconds(time_s)
    values = (layer.name, layer.kind, layer.channels, spatial, layer.D, layer.M, layer.groups, layer.advised, time)
    return tuple("-" if value is None else str(value) for value in values)


def names_of(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


class _Answers:
    """Advice by shape, each asked once."""

    def __init__(
        self, given: int | None, batch: int | None, task: str | None, machine: str | None, usual_eps: float
    ) -> None:
        self.given, self.batch, self.task, self.machine, self.usual_eps = given, batch, task, machine, usual_eps
        self.machine_name: str | None = None
        self.ask = functools.cache(self._ask)

    def _ask(self, shape: tuple[int, ...], dtype: str, last: bool) -> Advice:
        layout = "NHWC" if last else "NCHW"
        return advise(shape[1], shape[2:], shape[0], task=self.task, dtype=dtype, layout=layout, machine=self.machine)

    def layer(self, layer: Layer) -> LayerAdvice:
        channels = layer.channels or 1
        warnings = list(self._eps_warnings(layer))
        shape = self._shape(layer, layer.shape)
        if shape is None:
            advised: int | None = usual_groups(channels, 1 if layer.kind == "BatchNorm1d" else None)  # as convert does
            D = channels // (layer.groups or advised or 1)
            warnings += _named(layer)
            return LayerAdvice(layer.name, layer.kind, channels, None, layer.calls, layer.groups, advised, D, None,
                               None, None, layer.after, tuple(warnings))  # fmt: skip
        dtype = layer.dtype if layer.dtype in DTYPES else "float32"
        advice = self.ask(shape, dtype, layer.channels_last)
        self.machine_name = advice.machine
        best = advice[0]
        groups = layer.groups or best.num_groups
        choice = next((choice for choice in advice if choice.num_groups == groups), None)
        predicted_s, bound_s = self._times(layer, groups, dtype)
        D, M = channels // groups, advice.elements(groups)
        if choice is not None:
            warnings += choice.warnings
            if layer.groups is not None and M > 1 and choice.score - best.score >= _WORSE_POINTS:
                warnings.append(
                    f"G = {groups} scores {choice.score - best.score:.2f} points worse than G = {best.num_groups}"
                )
        if M > 1:
            warnings += _named(layer)
        return LayerAdvice(
            layer.name, layer.kind, channels, shape, layer.calls, layer.groups, advice.num_groups, D, M, predicted_s,
            bound_s, layer.after, tuple(warnings),
        )  # fmt: skip

    def _times(self, layer: Layer, groups: int, dtype: str) -> tuple[float | None, float]:
        """Predicted seconds of all calls of a layer, where there is a prediction, and their bound."""
        roofs = []
        for seen, calls in layer.shapes.items():
            shape = self._shape(layer, seen)
            if shape is not None:
                walked = (shape[0], *shape[2:], shape[1]) if layer.channels_last else shape
                layout = "NHWC" if layer.channels_last else "NCHW"
                roofs += [roofline(walked, groups, dtype=dtype, layout=layout, machine=self.machine)] * calls
        predicted = [roof.predicted_s for roof in roofs if roof.predicted_s is not None]
        return sum(predicted) if len(predicted) == len(roofs) else None, sum(roof.time_s for roof in roofs)

    def _shape(self, layer: Layer, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """A shape of the layer with the batch that was asked for; None if it was not seen, or is empty."""
        if shape is None or math.prod(shape) == 0 or shape[1] != layer.channels:
            return None
        N = shape[0]
        if self.batch is not None and self.given:
            N = max(1, N * self.batch // self.given)
        return (N, *shape[1:])

    def _eps_warnings(self, layer: Layer) -> Iterator[str]:
        if layer.eps is not None and layer.eps != self.usual_eps:
            yield f"eps {layer.eps:g}: most norms here have {self.usual_eps:g}"


def _named(layer: Layer) -> Iterator[str]:
    """What a norm is that goes by another name."""
    if layer.family == "GN" and layer.groups == 1:
        yield "GroupNorm with one group is the LayerNorm of Wu and He, over all channels and positions"
    elif layer.family == "GN" and layer.groups == layer.channels:
        yield "GroupNorm with one channel per group is InstanceNorm"
    elif layer.family == "LN":
        yield f"{layer.kind} normalizes each position over the channels: not what GroupNorm with 1 group does"


def _batch_of(example_inputs: Any) -> int | None:
    """The length of axis 0 of the first tensor among the inputs."""
    values = example_inputs.values() if isinstance(example_inputs, dict) else example_inputs
    for value in values if isinstance(values, (tuple, list, type({}.values()))) else (values,):
        shape = getattr(value, "shape", None)
        if shape is not None and len(shape):
            return int(shape[0])
    return None


def _notes(
    norms: list[Layer], bare: list[Layer], plain: int, batch: int | None, ran: bool, eps: float
) -> Iterator[str]:
    """What there is to say about the model as a whole."""
    if not ran:
        yield "no example inputs: no spatial sizes, so no M, no noise in the statistics and no times"
    unseen = [layer.name for layer in norms if ran and layer.shape is None]
    if unseen:
        yield f"not reached by the forward, so without sizes: {names_of(unseen)}"
    if not norms:
        yield "no BatchNorm, GroupNorm or InstanceNorm in the model"
    elif bare and ran:
        yield f"convolutions whose output no norm takes: {len(bare)}; the advice is for a norm behind them"
    batch_norms = [layer for layer in norms if layer.family == "BN"]
    if batch_norms and batch is not None:
        gn, bn = norm_errors(batch)[:2]
        yield (f"BatchNorm with {batch} samples: {norm_line(bn.error_percent)}, GroupNorm "
               f"{norm_line(gn.error_percent)} (ResNet-50; {bn.note})")  # fmt: skip
    folded = sum(layer.after is not None for layer in batch_norms)
    if folded:
        yield f"BatchNorm layers behind a convolution: {folded}; they fold into it at inference, GroupNorm cannot"
    if any(layer.family == "frozen BN" for layer in norms):
        yield f"a frozen BatchNorm keeps nothing for backward; GroupNorm keeps its input [{SOURCES['cost']}]"
    if eps != _USUAL_EPS:
        yield f"eps is {eps:g}, not PyTorch's {_USUAL_EPS:g}: carry it over with the weights"
    ends = [layer.name for layer in norms if layer.ends_block and layer.zero_weight is False]
    if ends:
        yield (f"hint: {names_of(ends)} may be the last norm of a residual block; before training its weight is best 0 "
               f"[{SOURCES['recipe']}]")  # fmt: skip
    if norms:
        yield f"weight decay cannot be seen here; fine-tuning had 0 for weight and bias of norms [{SOURCES['frozen']}]"
    if plain:
        yield f"left alone, as they normalize each position: {plain} torch.nn.LayerNorm"
