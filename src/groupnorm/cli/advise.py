"""The command `groupnorm advise`: how many groups, for a layer or for a whole model."""

import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated

import typer

from groupnorm.cli.shapes import sizes_of
from groupnorm.errors import OptionError

if TYPE_CHECKING:
    from groupnorm.analysis.advisor import Advice
    from groupnorm.analysis.model_advice import ModelAdvice

__all__ = ["EXAMPLE", "advise"]

EXAMPLE = "groupnorm advise 320 --spatial 64x64 --batch 2 --task diffusion"

_REASONED = 3  # choices whose reasons are printed


def advise(
    channels: Annotated[int | None, typer.Argument(help="Channels of the layer.")] = None,
    spatial: Annotated[str, typer.Option(help="Spatial sizes, such as 64x64; 1 for vectors.")] = "32x32",
    batch: Annotated[int | None, typer.Option(help="Samples per GPU. [default: 2, or that of --input]")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="classification, detection, segmentation, diffusion, video, medical, dp-sgd or style."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16, float32 or float64.")] = "float32",
    layout: Annotated[str, typer.Option(help="NCHW (channels on axis 1) or NHWC (channels last).")] = "NCHW",
    machine: Annotated[
        str | None, typer.Option(help="Machine to predict times for, as in groupnorm roofline; this one if left away.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FACTORY", help="Advise on each layer of the PyTorch model that factory() makes."),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="N,C,H,W", help="Shape of the model's input, for the shapes of its layers."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """How many groups, with reasons and their sources, and whether to use GroupNorm at all.

    For one layer give its channels; for all layers of a PyTorch model give --model and, for their sizes, --input.
    """
    if (channels is None) == (model is None):
        raise OptionError(
            "give either the CHANNELS of a layer, such as groupnorm advise 320, or --model module:factory"
        )
    if model is not None:
        from groupnorm.analysis.figures import figures_of
        from groupnorm.analysis.model_advice import advise_model
        from groupnorm.cli.model_factory import example_input, make_model

        _only_for_layers(spatial, dtype, layout)
        if machine is not None:
            figures_of(machine)  # a wrong one is said before the model is made
        built = make_model(model)
        with redirect_stdout(sys.stderr):  # what the model prints
            found = advise_model(
                built, tuple(map(example_input, inputs)) if inputs else None, batch=batch, task=task, machine=machine
            )
        _print_json(found) if json else _print_model(found)
        return
    if inputs:
        raise OptionError("--input is for --model; for one layer use --spatial and --batch")
    from groupnorm.analysis.advisor import advise as advise_layer

    assert channels is not None
    advice = advise_layer(
        channels,
        sizes_of(spatial, "--spatial", axes=1),
        2 if batch is None else batch,
        task=task,
        dtype=dtype,
        layout=layout,
        machine=machine,
    )
    _print_json(advice) if json else _print_layer(advice)


def _only_for_layers(spatial: str, dtype: str, layout: str) -> None:
    usual = {"spatial": (spatial, "32x32"), "dtype": (dtype, "float32"), "layout": (layout, "NCHW")}
    for option, (value, default) in usual.items():
        if value != default:
            raise OptionError(f"--{option} is for one layer: a model has its own; leave it away with --model")


def _print_json(found: "Advice | ModelAdvice") -> None:
    from dataclasses import asdict

    from groupnorm.cli.documents import print_json

    answer = {"num_groups": found.num_groups} if hasattr(found, "num_groups") else {}
    print_json(answer | asdict(found))


def _print_layer(advice: "Advice") -> None:
    from rich.table import Table

    from groupnorm.analysis.advice_text import headline, norm_line, seconds
    from groupnorm.cli.console import console as new_console

    console = new_console()
    console.print(headline(advice), style="bold")
    table = Table(box=None, pad_edge=False, title="Choices, best first", title_justify="left")
    for column in ("groups", "D", "M", "score", *_part_names(advice), "predicted"):
        table.add_column(column, justify="right")
    for choice in advice:
        D, M = advice.channels // choice.num_groups, advice.elements(choice.num_groups)
        parts = (f"{choice.points.get(name, 0):.2f}" for name in _part_names(advice))
        time = "-" if choice.predicted_s is None else seconds(choice.predicted_s)
        table.add_row(str(choice.num_groups), str(D), str(M), f"{choice.score:.2f}", *parts, time)
    console.print("\n", table, sep="")
    console.print("Scores are points of error above the best published; lower is better.\n")
    for choice in advice[:_REASONED]:
        lines = [*(f"+ {reason}" for reason in choice.reasons), *(f"! {warning}" for warning in choice.warnings)]
        _print_list(f"{choice.num_groups} group{'s' * (choice.num_groups > 1)}", lines)
    norms = Table(box=None, pad_edge=False, title_justify="left",
                  title=f"Norms with {advice.batch} images per GPU, error of ResNet-50 on ImageNet")  # fmt: skip
    for column in ("norm", "error", "source"):
        norms.add_column(column, overflow="fold")
    for norm in advice.norms:
        norms.add_row(norm.norm, norm_line(norm.error_percent), norm.note)
    console.print(norms, "")
    if advice.instead:
        _print_list("Instead", [f"- {text}" for text in advice.instead])
    cost = advice.cost
    _print_list("What BN -> GN costs", [
        f"- kept for backward: GN {cost.saved_bytes:,} bytes, BN {cost.batch_norm_saved_bytes:,}, frozen BN 0",
        f"- a forward moves at least {cost.least_forward_bytes:,} bytes: at least {seconds(advice.bound_s)} "
        f"({advice.bound}) on {advice.machine}",
        *(f"- {note}" for note in cost.notes),
    ])  # fmt: skip
    _print_list("Traps", [f"- {warning}" for warning in advice.warnings])


def _part_names(advice: "Advice") -> list[str]:
    """The parts of a score that any choice has."""
    return list(
        dict.fromkeys(name for choice in advice for name in choice.points if any(c.points.get(name) for c in advice))
    )


def _print_list(title: str, lines: list[str]) -> None:
    """A title and hanging lines below it."""
    from rich.table import Table

    from groupnorm.cli.console import console as new_console

    console = new_console()
    table = Table(box=None, pad_edge=False, show_header=False, title=title, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for line in lines:
        sign, _, text = line.partition(" ")
        table.add_row(sign, text)
    console.print(table, "")


def _print_model(advice: "ModelAdvice") -> None:
    from rich.table import Table

    from groupnorm.analysis.model_advice import cells, names_of
    from groupnorm.cli.console import console as new_console

    console = new_console()
    where = f", times on {advice.machine}" if advice.machine else ""
    table = Table(box=None, pad_edge=False, title=f"{len(advice)} layers{where}", title_justify="left")
    for column in ("layer", "kind"):
        table.add_column(column, overflow="fold")
    for column in ("channels", "spatial", "D", "M", "groups", "advised", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in advice:
        table.add_row(*cells(layer))
    console.print(table, "")
    said = [f"! {warning} ({names_of(names)})" for warning, names in advice.said().items()]
    if said:
        _print_list("Warnings", said)
    _print_list("Notes", [f"- {note}" for note in advice.notes])
