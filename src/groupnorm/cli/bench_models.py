"""`groupnorm bench --models`: whole models, stock beside converted."""

from pathlib import Path
from typing import Any

import typer

from groupnorm.errors import OptionError

__all__ = ["measure_models"]

_MODES = {"forward": ("inference",), "backward": ("training", "dp-sgd")}
_MEMORY_FORMATS = {"NCHW": "contiguous", "NHWC": "channels_last"}


def measure_models(
    names: str | None, *, directions: list[str], dtypes: list[str], layouts: list[str], compiled: bool, threads: int,
    seconds: float, quick: bool, folder: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure, print, save. Raises OptionError for an unknown model, or without PyTorch."""
    from dataclasses import asdict

    from groupnorm.bench.model_records import save_models
    from groupnorm.bench.model_runner import run_models
    from groupnorm.bench.model_work import model_works
    from groupnorm.bench.models import missing, select_models
    from groupnorm.cli.console import console as new_console
    from groupnorm.cli.documents import print_json

    console, errors = new_console(), new_console(stderr=True)
    cases = []
    for case in select_models(names):
        if missing(case) is None:
            cases.append(case)
        else:
            errors.print(f"{case.name} needs {missing(case)}, which is not installed: pip install {missing(case)}")
    if not cases:
        raise OptionError(
            "no model can be built here; install what they need: pip install torch diffusers monai opacus"
        )

    def done(records: list[Any]) -> None:
        if folder is not None and not quick:
            save_models(records, folder)  # at once: an interrupted run keeps what it has
        if not as_json:
            console.print(_table(records))

    works = list(model_works(
        cases, modes=[mode for direction in directions for mode in _MODES[direction]], dtypes=dtypes,
        memory_formats=[_MEMORY_FORMATS[layout] for layout in layouts], compiled=compiled, threads=threads, tiny=quick,
    ))  # fmt: skip
    if not works:
        raise OptionError(
            f"nothing to measure: models are measured in float32 and bfloat16; got {', '.join(dtypes)}, "
            f"{' and '.join(directions)} of {', '.join(case.name for case in cases)}"
        )
    found = run_models(works, budget_s=seconds, memory=not quick, report=done)
    if as_json:
        print_json([asdict(record) for record in found])
    if any(record.status == "failed" and record.variant == "converted" for record in found):
        raise typer.Exit(1)


def _table(records: list[Any]) -> Any:
    from rich.table import Table

    from groupnorm.bench.tables import ms

    first = records[0]
    title = f"{first.model} ({first.size})  {first.mode}  {first.dtype}  {first.memory_format}"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("ms", "quartiles", "times stock", "peak MB", "norm + act", "error"):
        table.add_column(name, justify="right")
    table.add_column("")
    for record in records:
        quartiles = "" if record.q1_s is None else f"{ms(record.q1_s)} .. {ms(record.q3_s)}"
        faster = f"{first.median_s / record.median_s:.2f}" if first.median_s and record.median_s else ""
        peak = "" if record.peak_bytes is None else f"{record.peak_bytes / 1e6:.0f}"
        share = "" if record.norm_share is None else f"{100 * record.norm_share:.0f} %"
        error = "" if record.error is None else f"{record.error:.0e}"
        note = "" if record.status == "ok" else f"{record.status}: {record.reason}"
        name = f"{record.variant}{', compiled' * record.compiled}"
        table.add_row(name, ms(record.median_s), quartiles, faster, peak, share, error, note)
    return table
