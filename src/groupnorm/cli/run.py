"""The command `groupnorm run`: Group Normalization of a file into a file."""

import dataclasses
import re
from collections.abc import Callable
from typing import Annotated

import typer

import groupnorm as gn
from groupnorm.cli.documents import print_json
from groupnorm.files import Report, group_norm_file

__all__ = ["EXAMPLE", "run"]

EXAMPLE = "groupnorm run x.npy --groups 32 -o y.npy --weight model.safetensors:norm.weight --activation silu"

_LONGEST = 30  # characters of a number of bytes
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def run(
    x: Annotated[str, typer.Argument(help="File to read: .npy, .npz or .safetensors; X.npz:name picks an array.")],
    groups: Annotated[int, typer.Option("--groups", "-g", help="Number of groups; it must divide the channels.")],
    output: Annotated[str, typer.Option("--output", "-o", help="File to write: y, or dx with --backward.")],
    weight: Annotated[str | None, typer.Option(help="File with the weight, (C,).")] = None,
    bias: Annotated[str | None, typer.Option(help="File with the bias, (C,).")] = None,
    eps: Annotated[float, typer.Option(help="Added to the variance.")] = 1e-5,
    layout: Annotated[str, typer.Option(help="NCHW: channels on axis 1; NHWC: channels last; any rank.")] = "NCHW",
    activation: Annotated[
        str | None, typer.Option(help="relu, silu, gelu, gelu_tanh, sigmoid, tanh or hardswish.")
    ] = None,
    uneven: Annotated[bool, typer.Option("--uneven", help="Let the last group take what remains.")] = False,
    stats: Annotated[
        str | None,
        typer.Option(help="Write mean and rstd, (N, G), to this .npz or .safetensors; and dweight, dbias."),
    ] = None,
    backward: Annotated[str | None, typer.Option(metavar="DY", help="File with dy: write dx instead of y.")] = None,
    max_memory: Annotated[
        str, typer.Option(help="Most bytes of arrays in memory, e.g. 500M or 4G; larger samples are done in parts.")
    ] = "1G",
    threads: Annotated[int | None, typer.Option(help="Threads to compute with; every CPU if not given.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and no progress.")] = False,
) -> None:
    """Group Normalization of a file into a file, larger than memory if need be.

    The output appears whole or not at all. At the end it says what was read and written, and whether the disk or the
    memory was the bound.
    """
    if threads is not None:
        gn.set_num_threads(threads)

    def work(progress: Callable[[int, int], None] | None = None) -> Report:
        return group_norm_file(
            x, output, groups, weight=weight, bias=bias, eps=eps, layout=layout, activation=activation, uneven=uneven,
            stats=stats, backward=backward, max_memory=_bytes(max_memory), progress=progress,
        )  # fmt: skip

    report = work() if json else _with_bar(work)
    if json:
        print_json(_fields(report), indent=None)
    else:
        typer.echo(str(report))


def _bytes(text: str) -> int:
    """Bytes of "500M", "4G", "1.5GiB" or "1048576"; units are powers of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None or len(text) > _LONGEST:
        raise gn.OptionError(f"max-memory must be a number of bytes, e.g. 500M or 4G: got {text[:80]!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _with_bar(work: Callable[[Callable[[int, int], None] | None], Report]) -> Report:
    """Do the work under a progress bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        return work(None)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("groupnorm run", total=None)
        return work(lambda done, total: bar.update(task, completed=done, total=total))


def _fields(report: Report) -> dict[str, object]:
    derived = ("disk_bandwidth_bytes_per_s", "memory_bandwidth_bytes_per_s", "bound")
    return dataclasses.asdict(report) | {name: getattr(report, name) for name in derived}
