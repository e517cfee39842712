"""`groupnorm demo`: a photograph, its feature maps, both directions in both layouts, checked, timed, and drawn."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from groupnorm.errors import FileError, OptionError

__all__ = ["EXAMPLE", "demo"]

EXAMPLE = "groupnorm demo --output picture.png"

_GROUPS = 24  # one for each filter, which has a channel for each of its two scales
_ALLOWED_GRADIENT = 1e-6  # relative error in the 2-norm; the plain float32 formula has about 3e-7 on these maps


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the picture goes.")] = Path(
        "groupnorm-demo.png"
    ),
    side: Annotated[int, typer.Option(help="Pixels of a crop, 32 to 512.")] = 256,
    seconds: Annotated[float, typer.Option(help="Time for each contestant and direction.")] = 0.25,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Normalise the feature maps of a photograph, check every value, show the times, write a picture."""
    import groupnorm as gn
    from groupnorm.analysis import features
    from groupnorm.cli.console import console as new_console

    if not 32 <= side <= 512:
        raise OptionError(f"--side must be between 32 and 512: got {side}")
    if not 0 < seconds <= 60:
        raise OptionError(f"--seconds must be between 0 and 60: got {seconds}")
    if output.suffix.lower() != ".png":
        raise FileError(f"--output must end in .png: got {output}")
    if not output.absolute().parent.is_dir():
        raise FileError(f"cannot write {output}: there is no folder {output.absolute().parent}; create it first")
    note = None
    try:
        photo = features.photograph()
    except FileError as error:
        photo, note = features.stand_in(), f"{error} (a synthetic picture takes its place, and none is drawn)"
    console = new_console(stderr=json)
    if note:
        new_console(stderr=True).print(note, soft_wrap=True)
    pictures = features.crops(photo, side)
    maps = features.feature_maps(photo, side)
    size = "x".join(map(str, maps.shape))
    console.print(f"{maps.shape[0]} crops of a photograph, {maps.shape[1]} real filters: {size}, "
                  f"{maps.nbytes / 1e6:.0f} MB float32, "
                  f"{_GROUPS} groups, {gn.get_num_threads()} threads")  # fmt: skip
    results = [
        _try(maps, layout, direction, seconds, console)
        for layout in ("NCHW", "NHWC")
        for direction in ("forward", "backward")
    ]
    _table(results, console)
    correct = all(result["error"] <= result["allowed"] for result in results)
    if note is None:
        _draw(output, photo, pictures, maps, results)
        console.print(f"wrote {output}", soft_wrap=True)
    if json:
        from groupnorm.cli.documents import print_json

        written = str(output) if note is None else None
        print_json(
            {
                "shape": list(maps.shape),
                "num_groups": _GROUPS,
                "correct": correct,
                "picture": written,
                "results": results,
            }
        )
    if not correct:
        raise typer.Exit(1)


def _try(maps: Any, layout: str, direction: str, seconds: float, console: Any) -> dict[str, Any]:
    """Check every value and measure; times are median seconds of a call."""
    import numpy as np

    import groupnorm as gn
    from groupnorm.bench.cases import Case
    from groupnorm.bench.copies import STREAMED, copies
    from groupnorm.bench.rivals import RIVALS, installed
    from groupnorm.bench.timing import measure
    from groupnorm.bench.work import Work

    case = Case("photograph", maps.shape, _GROUPS, "the demonstration", "silu")
    x = maps if layout == "NCHW" else np.ascontiguousarray(np.moveaxis(maps, 1, -1))
    work = Work(case, "float32", layout, direction, "silu", gn.get_num_threads(), {"x": x})
    with console.status(f"{layout} {direction}: every value against the specification"):
        ready = {name: RIVALS[name].prepare(work) for name in ("groupnorm", "torch") if installed(RIVALS[name]) is None}
        got = ready["groupnorm"].arrays(ready["groupnorm"].run())
        error, allowed = _error(work, got)
    with console.status(f"{layout} {direction}: times"):
        contestants = {name: way for name, way in copies(work.x, work.threads).items() if name != STREAMED}
        times = measure(
            {**contestants, **{name: each.run for name, each in ready.items()}}, budget_s=seconds, min_repeats=3
        )
    copy = min(contestants, key=lambda name: times[name].median_s)
    named = {"copy": times[copy].median_s, "groupnorm": times["groupnorm"].median_s}
    if "torch" in times:
        named["PyTorch"] = times["torch"].median_s
    speed = 100 * work.minimum_bytes / times["groupnorm"].median_s / (2 * x.nbytes / times[copy].median_s)
    return {"layout": layout, "direction": direction, "values": sum(a.size for a in got), "error": error,
            "allowed": allowed, "seconds": named, "percent_of_copy": speed}  # fmt: skip


def _error(work: Any, got: tuple[Any, ...]) -> tuple[float, float]:
    """Forward: the worst value as a fraction of its budget. Backward: the worst gradient's relative error."""
    import numpy as np

    from groupnorm.bench.promises import fraction_of_budget

    if work.direction == "forward":
        options = {"layout": work.layout, "activation": work.activation}
        samples = (
            slice(n, n + 1) for n in range(work.x.shape[0])
        )  # one at a time: float64 copies of all would take 1 GB
        arguments = (_GROUPS, work.weight, work.bias)
        return _worst(fraction_of_budget(got[0][at], work.x[at], *arguments, **options) for at in samples), 1.0
    errors = []
    for a, want in zip(got, work.expected, strict=True):
        difference = np.subtract(a, want, dtype=np.float64)
        errors.append(float(np.linalg.norm(difference.ravel()) / np.linalg.norm(want.ravel().astype(np.float64))))
    return _worst(errors), _ALLOWED_GRADIENT


def _worst(errors: Iterable[float]) -> float:
    """The largest; NaN, which is never correct, if there is one."""
    import numpy as np

    return float(np.max(list(errors)))


def _table(results: list[dict[str, Any]], console: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    from groupnorm.bench.tables import ms

    others = [name for name in results[0]["seconds"] if name not in ("copy", "groupnorm")]
    table = Table(
        title="GroupNorm + SiLU, every value checked; times are medians in milliseconds", title_justify="left"
    )
    for name in (
        "layout",
        "direction",
        "values",
        "worst error",
        "copy",
        "groupnorm",
        "% of copy",
        *others,
        *(["times faster"] if others else []),
    ):
        table.add_column(name, justify="left" if name in ("layout", "direction") else "right")
    for result in results:
        seconds = result["seconds"]
        fine = result["error"] <= result["allowed"]
        error = (
            f"{result['error']:.2f} of budget"
            if result["direction"] == "forward"
            else f"{result['error']:.1e} relative"
        )
        row = [result["layout"], result["direction"], f"{result['values']:,}", Text(error, style="" if fine else "red"),
               ms(seconds["copy"]), ms(seconds["groupnorm"]), f"{result['percent_of_copy']:.0f}"]  # fmt: skip
        row += [ms(seconds[name]) for name in others]
        row += [f"{seconds[name] / seconds['groupnorm']:.1f}" for name in others]
        table.add_row(*row)
    console.print(table)


def _draw(output: Path, photo: Any, pictures: Any, maps: Any, results: list[dict[str, Any]]) -> None:
    import groupnorm as gn
    from groupnorm._core import machine
    from groupnorm._core.atomic import commit, pending_file
    from groupnorm.bench import picture

    times = {f"{result['direction']} {result['layout']}": result["seconds"] for result in results}
    size = "x".join(map(str, maps.shape))
    where = f"{gn.get_num_threads()} threads, {machine.describe().cpu}"
    filters = f"{maps.shape[1]} filters (three colour axes, two scales, six orientations)"
    caption = f"x is {size} float32 in {_GROUPS} groups: {filters} on four crops.  Times with SiLU, {where}."
    normalized = gn.group_norm(maps, _GROUPS)
    with pending_file(output) as pending:
        with pending.writing():
            picture.draw(pending.file, photo, pictures, maps, normalized, times, _GROUPS, caption)
        commit([pending])
