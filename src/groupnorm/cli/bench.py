"""`groupnorm bench`: measure this machine, or make the tables of the documents from what was measured."""

from pathlib import Path
from typing import Annotated, Any

import typer

from groupnorm.errors import OptionError

__all__ = ["EXAMPLE", "bench"]

EXAMPLE = "groupnorm bench --cases sd15,vae-512 --rivals torch,numpy --dtypes float32,bfloat16"


def bench(
    cases: Annotated[
        str | None, typer.Option(help="Names or beginnings of names, with commas; all if left away.")
    ] = None,
    rivals: Annotated[str | None, typer.Option(help="Rivals, with commas; every installed one if left away.")] = None,
    directions: Annotated[str, typer.Option(help="forward, backward, or both.")] = "forward,backward",
    dtypes: Annotated[str, typer.Option(help="float32, bfloat16, float16, float64.")] = "float32",
    layouts: Annotated[str, typer.Option(help="NCHW, NHWC, or both.")] = "NCHW,NHWC",
    activations: Annotated[str, typer.Option(help="none, model (what the network has), or names.")] = "none,model",
    threads: Annotated[int | None, typer.Option(help="Threads for everybody; all CPUs if left away.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for each contestant on each piece of work.")] = 0.5,
    cold: Annotated[bool, typer.Option("--cold", help="Also time with nothing in the caches.")] = False,
    models: Annotated[
        bool, typer.Option("--models", help="Measure whole models instead, stock and converted; --cases names them.")
    ] = False,
    compiled: Annotated[bool, typer.Option("--compiled", help="With --models: torch.compile, too.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Few small cases, short times.")] = False,
    save: Annotated[Path | None, typer.Option(help="Folder for the records; results, and none with --quick.")] = None,
    no_save: Annotated[bool, typer.Option("--no-save", help="Print only; write no records.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Measure nothing; make tables and charts in README.md and docs/.")
    ] = False,
    root: Annotated[Path, typer.Option(help="The folder of README.md, docs and results, for --report.")] = Path(),
    list_: Annotated[bool, typer.Option("--list", help="List cases and rivals.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure this machine beside a plain copy and every installed rival; verified first, then timed in turns."""
    if list_:
        _list(as_json=json)
    elif report:
        _report(root, as_json=json)
    else:
        from groupnorm import get_num_threads, set_num_threads
        from groupnorm.bench import cases as all_cases
        from groupnorm.bench import rivals as all_rivals
        from groupnorm.bench.runner import works

        if threads is not None:
            set_num_threads(threads)
        if not 0 < seconds <= 60:
            raise OptionError(f"--seconds must be between 0 and 60: got {seconds}")
        if compiled and not models:
            raise OptionError("--compiled is for whole models: give --models, too")
        if models and (cold or rivals is not None or activations != "none,model"):
            raise OptionError("--models measures stock and converted models: leave --cold, --rivals and --activations "
                              "away")  # fmt: skip
        folder = None if no_save else save or (None if quick else Path("results"))
        chosen: dict[str, Any] = {
            "dtypes": _choice("dtypes", dtypes, ("float32", "bfloat16", "float16", "float64")),
            "layouts": _choice("layouts", layouts, ("NCHW", "NHWC")),
            "directions": _choice("directions", directions, ("forward", "backward")),
            "threads": get_num_threads(),
        }
        if models:
            from groupnorm.cli.bench_models import measure_models

            measure_models(
                cases, **chosen, compiled=compiled, seconds=0.1 if quick else seconds, quick=quick,
                folder=folder, as_json=json,
            )  # fmt: skip
            return
        todo = works(
            all_cases.select(cases, quick=quick),
            activations=_activations("none" if quick and activations == "none,model" else activations),
            **chosen,
        )
        _measure(list(todo), all_rivals.select(rivals), 0.1 if quick else seconds, cold, folder, json)


def _choice(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise OptionError(f"--{option} must be among {', '.join(known)}: got {name!r}")
    if not names:
        raise OptionError(f"--{option} must name at least one of {', '.join(known)}: got {text!r}")
    return names


def _activations(text: str) -> list[str]:
    from groupnorm._core.problem import ACTIVATIONS

    return _choice("activations", text, ("none", "model", *filter(None, ACTIVATIONS)))


def _measure(todo: list[Any], rivals: Any, seconds: float, cold: bool, folder: Path | None, as_json: bool) -> None:
    from dataclasses import asdict

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from groupnorm.bench.records import save
    from groupnorm.bench.runner import run
    from groupnorm.cli.console import console as new_console

    console = new_console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=new_console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(todo))

        def done(records: list[Any]) -> None:
            progress.update(task, advance=1, description=records[0].case)
            if folder is not None:
                save(records, folder)  # at once: an interrupted run keeps what it has
            if not as_json:
                progress.stop()  # the table goes to stdout, which may be a file
                console.print(_table(records))
                progress.start()

        if folder is not None:
            _keep_figures(folder)
        found = run(todo, rivals, budget_s=seconds, cold=cold, report=done)
    if as_json:
        from groupnorm.cli.documents import print_json

        print_json([asdict(record) for record in found])
    elif folder is not None:
        console.print(f"{len(found)} records in {folder}; tables: groupnorm bench --report")
    if any(record.status == "failed" and record.rival.startswith("groupnorm") for record in found):
        raise typer.Exit(1)


def _keep_figures(folder: Path) -> None:
    """What this machine can do at most, beside the records: tables compare them. Measured once for a folder."""
    from groupnorm._core.machine import describe
    from groupnorm.analysis.figures import figures_of, write_figures
    from groupnorm.bench.predictions import FILE

    path = folder / describe().slug / FILE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_figures(figures_of(None), path)


def _table(records: list[Any]) -> Any:
    from rich.table import Table

    from groupnorm.bench.rivals import RIVALS
    from groupnorm.bench.tables import ms, short

    first = records[0]
    size = "x".join(map(str, first.shape))
    title = f"{first.case}  {size}  G={first.num_groups}  {short(first)}  {first.direction}"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("ms", "quartiles", "cold ms", "% of copy", "error"):
        table.add_column(name, justify="right")
    table.add_column("")
    table.add_row(f"copy ({first.copy})", ms(first.copy_s), "", "", "100", "", f"{first.copy_bandwidth / 1e9:.1f} GB/s")
    for record in records:
        quartiles = f"{ms(record.q1_s)} .. {ms(record.q3_s)}" if record.ok else ""
        percent = "" if record.percent_of_copy is None else f"{record.percent_of_copy:.0f}"
        error = "" if record.error is None else f"{record.error:.0e}"
        note = "" if record.ok else f"{record.status}: {record.reason}"
        cold = "" if record.cold_s is None else ms(record.cold_s)
        table.add_row(RIVALS[record.rival].title, ms(record.median_s), quartiles, cold, percent, error, note)
    return table


def _report(root: Path, *, as_json: bool) -> None:
    from groupnorm.bench.report import report

    changed = report(root)
    names = [str(path) for path in changed]
    if as_json:
        from groupnorm.cli.documents import print_json

        print_json({"changed": names}, indent=None)
    else:
        print("\n".join(f"wrote {name}" for name in names) or "nothing changed")


def _list(*, as_json: bool) -> None:
    from dataclasses import asdict

    from groupnorm.bench.cases import CASES
    from groupnorm.bench.rivals import RIVALS, installed

    rivals = {rival.name: installed(rival) for rival in RIVALS.values()}
    if as_json:
        from groupnorm.cli.documents import print_json

        states = {name: "installed" if missing is None else f"needs {missing}" for name, missing in rivals.items()}
        print_json({"cases": [asdict(case) for case in CASES], "rivals": states})
        return
    from rich.table import Table

    from groupnorm.cli.console import console as new_console

    table = Table("case", "shape", "G", "activation", "source")
    for case in CASES:
        table.add_row(case.name, case.size, str(case.num_groups), case.activation or "", case.source)
    names = ", ".join(name if missing is None else f"{name} (needs {missing})" for name, missing in rivals.items())
    console = new_console()
    console.print(table)
    console.print(f"rivals: {names}")
