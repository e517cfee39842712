"""`groupnorm roofline`: what bounds a call, how far our kernels are from it, as numbers and as a picture."""

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from groupnorm.cli.shapes import sizes_of
from groupnorm.errors import OptionError

__all__ = ["EXAMPLE", "roofline"]

EXAMPLE = "groupnorm roofline 1x128x512x512 --groups 32 --activation silu --measure --picture roofline.png"

_BAR = 40  # columns of the longest bar
_LARGEST = 1 << 30  # elements that --measure makes arrays of


def roofline(
    shape: Annotated[str, typer.Argument(help="Shape of x, e.g. 1x128x512x512, in the order of --layout.")],
    groups: Annotated[int, typer.Option("--groups", "-g", help="Number of groups.")] = 32,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    layout: Annotated[str, typer.Option(help="NCHW: channels on axis 1; NHWC: channels last.")] = "NCHW",
    direction: Annotated[str, typer.Option(help="forward or backward.")] = "forward",
    activation: Annotated[str | None, typer.Option(help="What follows in the same kernel.")] = None,
    machine: Annotated[
        str | None, typer.Option(help="A machine of the table, e.g. H200, or a file of figures; this one if left away.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Data streams from hdd, sata, nvme3, nvme4, nvme5, or bytes per second.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Also time our kernels here.")] = False,
    measure_machine: Annotated[
        bool, typer.Option("--measure-machine", help="Measure this machine's figures anew.")
    ] = False,
    save_machine: Annotated[Path | None, typer.Option(help="Write the machine's figures to this .json file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw to this .png or .svg file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """The least that a call must move and compute, the time that takes, which limit binds, and how far our kernels are.

    The first use on a machine measures it, which takes some seconds; later ones answer at once.
    """
    from groupnorm.analysis.figures import figures_of, write_figures
    from groupnorm.analysis.roofline import roofline as make

    sizes = sizes_of(shape)
    if measure and machine is not None:
        raise OptionError(f"--measure times this machine: leave --machine {machine} away")
    if measure and storage is not None:
        raise OptionError(f"--measure times a call in memory: leave --storage {storage} away")
    if measure and math.prod(sizes) > _LARGEST:
        raise OptionError(f"--measure makes arrays of the shape, of up to {_LARGEST:,} elements: got {shape}")
    if picture is not None and not picture.absolute().parent.is_dir():
        raise OptionError(f"cannot write {picture}: there is no folder {picture.absolute().parent}; create it first")
    if measure_machine:
        figures_of(None, measure_anew=True)
    found = make(sizes, groups, dtype=dtype, layout=layout, direction=direction, activation=activation, machine=machine,
                 storage=storage)  # fmt: skip
    measured_s = _measured_s(found) if measure else None
    if picture is not None:
        from groupnorm.analysis.roofline_picture import draw_roofline

        draw_roofline(found, measured_s, picture)
    if save_machine is not None:
        write_figures(found.machine, save_machine)
    if json:
        from groupnorm.cli.documents import print_json

        print_json({**found.as_dict(), "measured_s": measured_s})
    else:
        _print(found, measured_s, picture)


def _measured_s(found: Any) -> float:
    """Median seconds of a call of ours, everything as warm as in the middle of a network."""
    import numpy as np

    import groupnorm as gn
    from groupnorm._core.layout import channel_axis
    from groupnorm.bench.timing import measure
    from groupnorm.bench.work import numpy_dtype

    kind = numpy_dtype(found.dtype)
    draw = np.random.default_rng(0).standard_normal
    x, dy = (draw(found.shape, np.float32).astype(kind, copy=False) for _ in range(2))
    channels = found.shape[channel_axis(found.layout, len(found.shape))]
    weight, bias = np.ones(channels, kind), np.zeros(channels, kind)
    options: Any = {"layout": found.layout, "activation": found.activation}
    if found.direction == "forward":
        return measure({"us": lambda: gn.group_norm(x, found.num_groups, weight, bias, **options)})["us"].median_s
    _, mean, rstd = gn.group_norm(x, found.num_groups, weight, bias, return_stats=True, **options)
    return measure({
        "us": lambda: gn.group_norm_backward(dy, x, found.num_groups, weight, bias, mean=mean, rstd=rstd, **options)
    })["us"].median_s  # fmt: skip


def _block() -> str:
    """What bars are made of, in the characters that stdout has."""
    try:
        "█".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "#"
    return "█"


def _print(found: Any, measured_s: float | None, picture: Path | None) -> None:
    print(found)
    if measured_s is not None:
        print(f"measured here: {_time(measured_s)}, {100 * found.time_s / measured_s:.0f} % of the bound's speed, "
              f"{found.bytes / measured_s / 1e9:.1f} GB/s, {1 / measured_s:,.0f} calls per second")  # fmt: skip
    print()
    rows = [(f"{limit} bound", seconds) for limit, seconds in found.times_s.items()]
    rows += [("predicted", found.predicted_s)] if found.predicted_s is not None else []
    rows += [("measured", measured_s)] if measured_s is not None else []
    longest = max(seconds for _, seconds in rows)
    for name, seconds in rows:
        print(f"{name:>18} {_block() * max(1, round(_BAR * seconds / longest))} {_time(seconds)}")
    if picture is not None:
        print(f"\nwrote {picture}")


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} us" if seconds < 1e-2 else f"{seconds * 1e3:,.1f} ms"
