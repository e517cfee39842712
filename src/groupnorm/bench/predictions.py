"""Bound and prediction beside what was measured: the tables of docs/roofline.md, and the fit of the prediction."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from statistics import median

from groupnorm.analysis.figures import FORMAT, MachineFigures, read_figures
from groupnorm.analysis.roofline import Roofline, roofline
from groupnorm.bench.records import Record
from groupnorm.bench.tables import groups_of_work, machine_name, ms, ours, short
from groupnorm.errors import FileError

__all__ = ["FILE", "PREDICTION_TABLES", "Compared", "compare_records", "load_figures"]

FILE = "figures.json"  # beside the records of a machine


@dataclass(frozen=True, slots=True)
class Compared:
    """A record of ours, and the roofline of the same work."""

    record: Record
    roofline: Roofline
    measured_s: float

    @property
    def bound_ratio(self) -> float:
        """The bound over what was measured: never above 1 if the bound is one."""
        return self.roofline.time_s / self.measured_s

    @property
    def predicted_ratio(self) -> float:
        """The prediction over what was measured."""
        return (self.roofline.predicted_s or 0.0) / self.measured_s


def load_figures(results: Path) -> dict[str, MachineFigures]:
    """Slug of a machine -> its figures, for the folders below results/ that have them."""
    found = {}
    for path in sorted(results.glob(f"*/{FILE}")):
        try:
            found[path.parent.name] = read_figures(path)
        except FileError as error:
            raise FileError(f"{error} (format {FORMAT}); measure it again") from error
    return found


def compare_records(records: list[Record], figures: Mapping[str, MachineFigures]) -> list[Compared]:
    """Our records on machines with figures, each with its roofline there; in the order of the other tables."""
    found = []
    for group in groups_of_work(records):
        record = ours(group)
        if record is None or record.median_s is None or record.machine["slug"] not in figures:
            continue
        machine = figures[record.machine["slug"]]
        machine = replace(machine, speeds=(machine.for_threads(record.threads),))
        n, c, *spatial = record.shape
        shape = (n, c, *spatial) if record.layout == "NCHW" else (n, *spatial, c)
        made = roofline(shape, record.num_groups, dtype=record.dtype, layout=record.layout, direction=record.direction,
                        activation=record.activation, machine=machine)  # fmt: skip
        found.append(Compared(record, made, record.median_s))
    return found


def _summary(records: list[Record], figures: Mapping[str, MachineFigures]) -> str:
    return "\n\n".join(_summary_of(compared) for compared in _apart(compare_records(records, figures)))


def _apart(compared: list[Compared]) -> list[list[Compared]]:
    """Those of each machine and number of threads."""
    found: dict[tuple[str, int], list[Compared]] = {}
    for each in compared:
        found.setdefault((each.record.machine["slug"], each.record.threads), []).append(each)
    return list(found.values())


def _summary_of(compared: list[Compared]) -> str:
    errors = [abs(each.predicted_ratio - 1) for each in compared]
    below = sum(each.bound_ratio <= 1 for each in compared)
    within = sum(error <= 0.25 for error in errors)
    nearest = max(compared, key=lambda each: each.bound_ratio)
    return (
        f"{machine_name(compared[0].record)}, {len(compared)} pieces of work: the bound is no longer than the measured "
        f"time in {below} of them (nearest: {100 * nearest.bound_ratio:.0f} %, {nearest.record.case} "
        f"{short(nearest.record)} {nearest.record.direction}). The prediction, "
        f"which was fitted to these records, is off by {100 * median(errors):.0f} % in the median, and by at most 25 % "
        f"in {within}."
    )


def _table(records: list[Record], figures: Mapping[str, MachineFigures]) -> str:
    apart = _apart(compare_records(records, figures))
    tables = [_table_of(compared) for compared in apart]
    if len(tables) > 1:
        tables = [f"{machine_name(each[0].record)}:\n\n{table}" for each, table in zip(apart, tables, strict=True)]
    return "\n\n".join(tables)


def _table_of(compared: list[Compared]) -> str:
    lines = ["| case | shape | | bound | by | predicted | measured | predicted / measured | % of the bound's speed |",
             "|---|---|---|--:|---|--:|--:|--:|--:|"]  # fmt: skip
    for each in compared:
        record, made = each.record, each.roofline
        size = "x".join(map(str, record.shape))
        if prod(record.shape) == 0:
            continue
        lines.append(
            f"| {record.case} | {size}, G={record.num_groups} | {short(record)} {record.direction} | {ms(made.time_s)} "
            f"| {made.bound} | {ms(made.predicted_s)} | {ms(each.measured_s)} | {each.predicted_ratio:.2f} "
            f"| {100 * each.bound_ratio:.0f} |"
        )
    return "\n".join(lines)


def _machine(records: list[Record], figures: Mapping[str, MachineFigures]) -> str:
    text = []
    for machine in figures.values():
        lines = ["| threads | loop | " + " | ".join(level.name for level in machine.speeds[0].levels) + " |",
                 "|--:|---|" + "--:|" * len(machine.speeds[0].levels)]  # fmt: skip
        for speeds in machine.speeds:
            for loop in ("read", "copy", "triad"):
                cells = [f"{getattr(level, f'{loop}_bytes_per_s') / 1e9:.0f}" for level in speeds.levels]
                lines.append(f"| {speeds.threads} | {loop} | {' | '.join(cells)} |")
        most = machine.speeds[-1]
        flops = ", ".join(f"{value / 1e9:.0f} GFLOP/s in {lane}" for lane, value in most.flops_per_s.items())
        text.append(
            f"{machine.name}, GB/s. With {most.threads} threads also {flops} by multiply-adds, and "
            f"{most.operations_per_s / machine.lanes / 1e9:.1f} billion vector instructions per second; the shortest "
            f"call takes {machine.launch_s * 1e6:.1f} us.\n\n" + "\n".join(lines)
        )
    return "\n\n".join(text)


PREDICTION_TABLES = {"prediction-summary": _summary, "prediction": _table, "figures": _machine}
