"""`groupnorm check`: the promises about numbers, tried on this machine."""

from typing import Annotated, Any

import typer

from groupnorm.errors import OptionError

__all__ = ["EXAMPLE", "check"]

EXAMPLE = "groupnorm check --dtypes float32,bfloat16 --activations none,silu"


def check(
    dtypes: Annotated[str, typer.Option(help="Which types, with commas.")] = "float32,float64,float16,bfloat16",
    layouts: Annotated[str, typer.Option(help="NCHW, NHWC, or both.")] = "NCHW,NHWC",
    activations: Annotated[str | None, typer.Option(help="none, silu, ...; all of them if left away.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only none and silu: a few seconds once the kernels are compiled.")
    ] = False,
    impl: Annotated[str | None, typer.Option(help="Engine: cpu or reference; the best one if left away.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Try every promise about numbers on this machine; exit code 1 if one is broken.

    The first run compiles every kernel there is, which takes minutes; later ones take seconds.
    """
    from dataclasses import asdict

    from groupnorm._core.problem import ACTIVATIONS, DTYPES
    from groupnorm.bench.promises import check as findings
    from groupnorm.cli.console import console as new_console

    known = {"none": None, **{name: name for name in ACTIVATIONS if name is not None}}
    if activations is None:
        activations = "none,silu" if quick else ",".join(known)
    kinds = _names("dtypes", dtypes, DTYPES)
    where = _names("layouts", layouts, ("NCHW", "NHWC"))
    chosen = [known[name] for name in _names("activations", activations, tuple(known))]
    found: list[Any] = []
    with new_console(stderr=True).status("checking") as status:
        for finding in findings(kinds, where, chosen, impl=impl):
            found.append(finding)
            status.update(f"checked {finding.promise}, {finding.dtype} {finding.layout}")
    broken = [finding for finding in found if finding.broken]
    if json:
        from groupnorm.cli.documents import print_json

        print_json({"kept": not broken, "findings": [asdict(finding) for finding in found]})
    else:
        _print(found, broken)
    if broken:
        raise typer.Exit(1)


def _names(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names or [text]:
        if name not in known:
            raise OptionError(f"--{option} must be among {', '.join(known)}: got {name!r}")
    return names


def _print(found: list[Any], broken: list[Any]) -> None:
    from rich.table import Table

    from groupnorm.bench.promises import PROMISES
    from groupnorm.cli.console import console as new_console

    console = new_console()
    for promise, meaning in PROMISES.items():
        console.print(f"{promise:10} {meaning}", soft_wrap=True)
    table = Table("dtype", "layout", *PROMISES, title="worst case, as a fraction of what is allowed",
                  title_justify="left")  # fmt: skip
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for finding in found:
        rows.setdefault((finding.dtype, finding.layout), {})[finding.promise] = finding
    for (dtype, layout), row in rows.items():
        table.add_row(dtype, layout, *(_cell(row[promise]) for promise in PROMISES))
    console.print(table)
    for finding in broken:
        for place in finding.broken[:5]:
            line = f"broken: {finding.promise}, {finding.dtype} {finding.layout}: {place}"
            console.print(line, style="red", soft_wrap=True)
    tried = sum(finding.tried for finding in found)
    verdict = f"{len(broken)} of {len(found)} promises broken" if broken else "every promise kept"
    console.print(f"{tried} comparisons: {verdict}", style="red" if broken else "green")


def _cell(finding: Any) -> Any:
    from rich.text import Text

    exact = finding.promise in ("bits", "constant", "contained")
    text = ("exact" if not finding.broken else "broken") if exact else f"{finding.worst:.2f}"
    return Text(text, style="red" if finding.broken else "")
