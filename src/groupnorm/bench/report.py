"""Makes the tables and charts of README and docs from the records; the same records always give the same bytes.

A document asks for a table with two lines, between which everything is generated:

    <!-- bench:forward -->
    <!-- /bench -->
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from groupnorm._core.atomic import write_whole
from groupnorm.bench.cases import CASES
from groupnorm.bench.chart import Bar, bar_chart
from groupnorm.bench.gpu.tables import GPU_TABLES
from groupnorm.bench.model_records import load_models
from groupnorm.bench.model_tables import MODEL_TABLES
from groupnorm.bench.predictions import PREDICTION_TABLES, load_figures
from groupnorm.bench.records import Record, load
from groupnorm.bench.tables import TABLES, groups_of_work, machine_name, ours, short
from groupnorm.errors import FileError

__all__ = ["CHARTS", "report"]

_OPEN = re.compile(r"<!-- bench:(\S+) -->")
_CLOSE = "<!-- /bench -->"

CHARTS = (
    "chart-forward",
    "chart-backward",
    "speed-forward",
    "speed-backward",
)  # in docs/img/bench-<name>-<machine>.svg


def report(root: Path) -> list[Path]:
    """Rewrite every marked part of README.md and docs/**/*.md below root, and the charts they show.

    Returns the files that changed. Raises FileError for a marker that names no table, has no end, or stands inside
    another, and when there are no records; then nothing is written.
    """
    records = load(root / "results")
    models = load_models(root / "results")
    tables = {name: partial(table, records) for name, table in TABLES.items()}
    tables |= {name: partial(table, models) for name, table in MODEL_TABLES.items()}
    figures = load_figures(root / "results")
    tables |= {name: partial(table, records, figures) for name, table in PREDICTION_TABLES.items()}
    tables |= {name: partial(table, root / "results") for name, table in GPU_TABLES.items()}
    pictures = _pictures(records, root / "docs" / "img")
    new: dict[Path, str] = {}
    used: set[Path] = set()
    for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        if path.exists():
            text = path.read_text(encoding="utf-8")
            filled, shown = _filled(path, text, tables, pictures)
            used |= shown
            if filled != text:
                new[path] = filled
    for picture in pictures.values():
        for path, svg in picture.items():
            if path in used and (not path.exists() or path.read_text(encoding="utf-8") != svg):
                new[path] = svg
    for path, text in new.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
    return list(new)


def _filled(
    path: Path, text: str, tables: Mapping[str, Callable[[], str]], pictures: dict[str, dict[Path, str]]
) -> tuple[str, set[Path]]:
    """The text with every marked part made again, and the pictures that it shows."""
    lines: list[str] = []
    shown: set[Path] = set()
    fenced, name, opened = False, None, 0
    for number, line in enumerate(text.splitlines(), 1):
        fenced ^= line.lstrip().startswith("```") and name is None  # a marker in an example is no marker
        found = None if fenced else _OPEN.fullmatch(line.strip())
        if found:
            if name is not None:
                raise FileError(f"{path}:{number}: marker bench:{found[1]} inside bench:{name} of line {opened}; "
                                f"close that one first with {_CLOSE}")  # fmt: skip
            name, opened = found[1], number
            if name in tables:
                body = tables[name]()
            elif name in pictures:
                shown |= set(pictures[name])
                body = _images(path, pictures[name])
            else:
                known = ", ".join((*tables, *CHARTS))
                raise FileError(f"{path}:{number}: marker bench:{name} names no table; known are {known}")
            lines += [line, "", body or "Nothing of this kind was measured yet.", ""]
        elif not fenced and line.strip() == _CLOSE:
            if name is None:
                raise FileError(f"{path}:{number}: {_CLOSE} without a marker before it; remove it")
            name = None
            lines.append(line)
        elif name is None:
            lines.append(line)
    if name is not None:
        raise FileError(f"{path}:{opened}: marker bench:{name} has no end; add a line {_CLOSE}")
    return "\n".join(lines) + ("\n" if text.endswith("\n") else ""), shown


def _images(path: Path, pictures: Iterable[Path]) -> str:
    links = (Path(os.path.relpath(picture, path.parent)).as_posix() for picture in sorted(pictures))
    return "\n\n".join(f"![Measured speed: {Path(link).stem}]({link})" for link in links)


def _pictures(records: list[Record], folder: Path) -> dict[str, dict[Path, str]]:
    """Name of a chart -> its files, one for each machine and number of threads, with their content."""
    found: dict[str, dict[Path, str]] = {name: {} for name in CHARTS}
    for direction in ("forward", "backward"):
        by_machine: dict[tuple[str, int], list[dict[str, Record]]] = {}
        for group in groups_of_work(records):
            record = next(iter(group.values()))
            plain = record.dtype == "float32" and record.activation is None
            if record.direction == direction and plain and record.case in _chart_cases(records):
                by_machine.setdefault((record.machine["slug"], record.threads), []).append(group)
        for (slug, threads), groups in sorted(by_machine.items()):
            subtitle = machine_name(next(iter(groups[0].values())))
            pairs = [(_label(group), ours(group), group.get("torch")) for group in groups]
            percent = [
                Bar(label, tuple(r.percent_of_copy if r else None for r in (mine, torch)))
                for label, mine, torch in pairs
            ]
            faster = [
                Bar(label, (torch.median_s / mine.median_s,))
                for label, mine, torch in pairs
                if mine and torch and mine.median_s and torch.median_s
            ]
            name = f"bench-%s-{direction}-{slug}-{threads}t.svg"
            found[f"chart-{direction}"][folder / (name % "chart")] = bar_chart(
                f"GroupNorm {direction}, float32: percent of the speed of a copy", subtitle,
                ("groupnorm", "PyTorch eager"),
                percent, unit=" %", mark=100.0,
            )  # fmt: skip
            if faster:
                found[f"speed-{direction}"][folder / (name % "speed")] = bar_chart(
                    f"GroupNorm {direction}, float32: how many times faster than PyTorch eager", subtitle,
                    ("groupnorm",),
                    faster, unit="x", mark=1.0,
                )  # fmt: skip
    return found


def _chart_cases(records: list[Record]) -> set[str]:
    """The headline cases, or all where none was measured."""
    measured = {record.case for record in records}
    return (measured & {case.name for case in CASES if case.headline}) or measured


def _label(group: dict[str, Record]) -> str:
    record = next(iter(group.values()))
    return f"{record.case} {short(record).removeprefix('f32 ')}"
