"""The generated tables: each is a function from records to Markdown, under the name that a marker uses."""

from collections.abc import Callable, Iterable
from statistics import geometric_mean
from typing import Any

from groupnorm.bench.cases import CASES
from groupnorm.bench.records import Record
from groupnorm.bench.rivals import RIVALS

__all__ = ["OURS", "TABLES", "groups_of_work", "machine_name", "machine_of", "ms", "ours", "short", "versions_of"]

OURS = ("groupnorm-out", "groupnorm")  # what stands for us: with out= where that exists, as the copy has its target
_ORDER = {case.name: i for i, case in enumerate(CASES)}
_HEADLINE = {case.name for case in CASES if case.headline}
_DTYPES = {name: i for i, name in enumerate(("float32", "bfloat16", "float16", "float64"))}


def groups_of_work(records: Iterable[Record]) -> list[dict[str, Record]]:
    """Records of the same work together, by rival; in the order of cases, dtypes, layouts, activations."""
    found: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in records:
        found.setdefault(record.work, {})[record.rival] = record
    return [found[key] for key in sorted(found, key=_place)]


def _place(work: tuple[Any, ...]) -> tuple[Any, ...]:
    slug, case, dtype, layout, direction, activation, threads = work
    return (
        slug,
        threads,
        direction != "forward",
        _ORDER.get(case, len(_ORDER)),
        case,
        _DTYPES.get(dtype, 9),
        layout != "NCHW",
        activation,
    )


def machine_of(group: dict[str, Record]) -> tuple[str, int]:
    """Slug and threads: what a table is about."""
    record = next(iter(group.values()))
    return record.machine["slug"], record.threads


def machine_name(record: Record) -> str:
    """One line about where this was measured."""
    threads = f"{record.threads} thread{'s' if record.threads > 1 else ''}"
    return f"{record.machine['cpu']}, {record.machine['cores']} cores, {threads}"


def short(record: Record) -> str:
    """dtype, layout and activation in a few letters."""
    names = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64"}
    return " ".join(filter(None, (names.get(record.dtype, record.dtype), record.layout, record.activation)))


def ms(time_s: float | None) -> str:
    """Milliseconds with three digits."""
    if time_s is None:
        return "-"
    value = 1e3 * time_s
    return (
        f"{value:.0f}"
        if value >= 100
        else f"{value:.1f}"
        if value >= 10
        else f"{value:.2f}"
        if value >= 1
        else f"{value:.3g}"
    )


def ours(group: dict[str, Record]) -> Record | None:
    """Our record in a group, if it ran."""
    return next((group[name] for name in OURS if name in group and group[name].ok), None)


def _blocks(records: list[Record], direction: str, *, headline: bool) -> list[tuple[str, list[dict[str, Record]]]]:
    """Groups of one direction, apart for each machine and number of threads, each with its line of explanation."""
    blocks: dict[tuple[str, int], list[dict[str, Record]]] = {}
    for group in groups_of_work(records):
        record = next(iter(group.values()))
        if record.direction == direction and (record.case in _HEADLINE or not headline):
            blocks.setdefault(machine_of(group), []).append(group)
    return [(_about([record for group in groups for record in group.values()]), groups) for groups in blocks.values()]


def versions_of(records: Iterable[Any]) -> dict[str, str]:
    """Package -> its version in these records, all of them where there are several."""
    found: dict[str, set[str]] = {}
    for record in records:
        for name, version in record.versions.items():
            found.setdefault(name, set()).add(version)
    return {name: " and ".join(sorted(versions)) for name, versions in found.items()}


def _about(records: list[Record]) -> str:
    seen = versions_of(records)
    wanted = [
        f"{title} {seen[key]}" for key, title in (("groupnorm", "groupnorm"), ("torch", "PyTorch")) if key in seen
    ]
    dates = sorted({record.date for record in records})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{machine_name(records[0])}; {', '.join(wanted)}; {when}. Medians in milliseconds."


def _against_torch(direction: str, *, headline: bool) -> Callable[[list[Record]], str]:
    def table(records: list[Record]) -> str:
        text = []
        for about, groups in _blocks(records, direction, headline=headline):
            lines = ["| case | shape | | copy | groupnorm | % of copy speed | PyTorch | times faster |",
                     "|---|---|---|--:|--:|--:|--:|--:|"]  # fmt: skip
            for group in groups:
                mine, torch = ours(group), group.get("torch")
                record = mine or next(iter(group.values()))
                size = "x".join(map(str, record.shape))
                lines.append(f"| {record.case} | {size}, G={record.num_groups} | {short(record)} | {ms(record.copy_s)} "
                             f"| {_result(mine or group.get('groupnorm'))} | {_percent(mine)} | {_result(torch)} "
                             f"| {_ratio(torch, mine)} |")  # fmt: skip
            text.append("\n".join([about, "", *lines]))
        return "\n\n".join(text)

    return table


def _drop_in(records: list[Record]) -> str:
    """`groupnorm.torch` in the place of PyTorch's operators: how many times faster, over all cases and at worst."""
    blocks: dict[tuple[str, int], dict[tuple[str, str], list[tuple[float, Record]]]] = {}
    for group in groups_of_work(records):
        mine, torch = group.get("groupnorm-torch"), group.get("torch")
        if mine and torch and mine.median_s and torch.median_s and mine.activation in {None, "silu"}:
            what = mine.direction + (" with SiLU" if mine.activation else "")
            for types in (short(mine).removesuffix(" silu"), "all of them"):
                found = blocks.setdefault(machine_of(group), {}).setdefault((what, types), [])
                found.append((torch.median_s / mine.median_s, mine))
    text = []
    for rows in blocks.values():
        about = _about([record for ratios in rows.values() for _, record in ratios])
        lines = ["| | | cases | times faster, geometric mean | least | most |", "|---|---|--:|--:|--:|--:|"]
        for (what, types), ratios in sorted(rows.items(), key=lambda row: (row[0][0], row[0][1] == "all of them")):
            (least, worst), (most, best) = (choose(ratios, key=lambda pair: pair[0]) for choose in (min, max))
            cases = len({record.case for _, record in ratios})
            lines.append(f"| {what} | {types} | {cases} | {geometric_mean([ratio for ratio, _ in ratios]):.2f} "
                         f"| {least:.2f} ({worst.case}) | {most:.1f} ({best.case}) |")  # fmt: skip
        text.append("\n".join([about.removesuffix(" Medians in milliseconds."), "", *lines]))
    return "\n\n".join(text)


def _rivals(direction: str) -> Callable[[list[Record]], str]:
    def table(records: list[Record]) -> str:
        text = []
        for about, groups in _blocks(records, direction, headline=False):
            present = [name for name in RIVALS if any(name in group for group in groups)]
            lines = ["| case | | copy | " + " | ".join(RIVALS[name].title for name in present) + " |",
                     "|---|---|--:|" + "--:|" * len(present)]  # fmt: skip
            for group in groups:
                record = next(iter(group.values()))
                times = " | ".join(_result(group.get(name)) for name in present)
                lines.append(f"| {record.case} | {short(record)} | {ms(record.copy_s)} | {times} |")
            text.append(
                "\n".join([about + " n/a: no such operation. **failed**: see the table of failures.", "", *lines])
            )
        return "\n\n".join(text)

    return table


def _failures(records: list[Record]) -> str:
    lines = ["| rival | case | | direction | reason |", "|---|---|---|---|---|"]
    for group in groups_of_work(records):
        for name, record in sorted(group.items()):
            if record.status == "failed":
                reason = (record.reason or "").replace("|", "\\|")
                title = RIVALS[name].title if name in RIVALS else name
                lines.append(f"| {title} | {record.case} | {short(record)} | {record.direction} | {reason} |")
    return "\n".join(lines) if len(lines) > 2 else "No rival failed."


def _machines(records: list[Record]) -> str:
    lines = [
        "| machine | cores | caches | memory | copy speed beyond the caches | versions |",
        "|---|--:|---|--:|--:|---|",
    ]
    by_slug: dict[str, list[Record]] = {}
    for record in records:
        by_slug.setdefault(record.machine["slug"], []).append(record)
    for _, found in sorted(by_slug.items()):
        machine = found[0].machine
        largest = max(
            found, key=lambda record: (record.bytes // (2 if record.direction == "forward" else 3), record.date)
        )
        caches = ", ".join(f"{name} {size >> 10} KB" for name, size in machine["caches"].items())
        memory = f"{machine['memory_bytes'] / 2**30:.0f} GB" if machine["memory_bytes"] else "-"
        listed = ", ".join(f"{name} {version}" for name, version in sorted(versions_of(found).items()))
        lines.append(f"| {machine['cpu']} | {machine['cores']} | {caches} | {memory} "
                     f"| {largest.copy_bandwidth / 1e9:.1f} GB/s | {listed} |")  # fmt: skip
    return "\n".join(lines)


def _cases(records: list[Record]) -> str:
    lines = ["| case | shape | G | activation | float32 | source |", "|---|---|--:|---|--:|---|"]
    for case in CASES:
        size = 4 * case.elements
        volume = f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.0f} KB"
        lines.append(
            f"| {case.name} | {case.size} | {case.num_groups} | {case.activation or ''} | {volume} | {case.source} |"
        )
    return "\n".join(lines)


def _result(record: Record | None) -> str:
    if record is None:
        return "-"
    return {"ok": ms(record.median_s), "unsupported": "n/a"}.get(record.status, "**failed**")


def _percent(record: Record | None) -> str:
    return "-" if record is None or record.percent_of_copy is None else f"{record.percent_of_copy:.0f}"


def _ratio(slow: Record | None, fast: Record | None) -> str:
    if slow is None or fast is None or not slow.median_s or not fast.median_s:
        return "-"
    return f"{slow.median_s / fast.median_s:.1f}"


TABLES: dict[str, Callable[[list[Record]], str]] = {
    "forward": _against_torch("forward", headline=True),
    "backward": _against_torch("backward", headline=True),
    "forward-all": _against_torch("forward", headline=False),
    "backward-all": _against_torch("backward", headline=False),
    "drop-in": _drop_in,
    "rivals-forward": _rivals("forward"),
    "rivals-backward": _rivals("backward"),
    "failures": _failures,
    "machines": _machines,
    "cases": _cases,
}
