"""The generated tables about models: functions from their records to Markdown, under the names of their markers."""

from collections.abc import Callable
from typing import Any

from groupnorm.bench.model_records import ModelRecord
from groupnorm.bench.models import MODELS, MODES
from groupnorm.bench.tables import ms, versions_of

__all__ = ["MODEL_TABLES"]

Row = dict[tuple[bool, str], ModelRecord]  # (compiled, variant) -> record, of the same work

_ORDER = {case.name: place for place, case in enumerate(MODELS)}
_HEADLINE = {case.name for case in MODELS if case.headline}
_SHOWN = {("float32", "contiguous"), ("bfloat16", "channels_last")}  # in the short table: the plain and the fast way
_SIZES = {"full": "", "half": ", half the channels"}  # tiny models are in no table
_TYPES = {"float32": "f32", "bfloat16": "bf16"}

_HEAD = (
    "| model | | stock | converted | times faster | compiled: stock | converted | times faster "
    "| peak MB: stock | converted | norm + act: stock | converted |\n"
    "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
)


def _times(*, headline: bool) -> Callable[[list[ModelRecord]], str]:
    def table(records: list[ModelRecord]) -> str:
        blocks: dict[tuple[str, int], list[Row]] = {}
        for row in _rows(records):
            record = next(iter(row.values()))
            shown = (record.dtype, record.memory_format) in _SHOWN and record.model in _HEADLINE
            if shown or not headline:
                blocks.setdefault((record.machine["slug"], record.threads), []).append(row)
        return "\n\n".join("\n".join([_about(rows), "", _HEAD, *map(_line, rows)]) for rows in blocks.values())

    return table


def _rows(records: list[ModelRecord]) -> list[Row]:
    """Records of the same work together, in the order of models, modes, dtypes and memory formats."""
    found: dict[tuple[Any, ...], Row] = {}
    for record in records:
        if record.size in _SIZES:
            found.setdefault(record.work, {})[record.compiled, record.variant] = record
    return [found[work] for work in sorted(found, key=_place)]


def _place(work: tuple[Any, ...]) -> tuple[Any, ...]:
    slug, model, size, mode, dtype, memory_format, threads = work
    place = MODES.index(mode) if mode in MODES else len(MODES)
    return slug, threads, _ORDER.get(model, len(_ORDER)), model, place, size, dtype != "float32", dtype, memory_format


def _line(row: Row) -> str:
    record = next(iter(row.values()))
    kind = f"{_TYPES.get(record.dtype, record.dtype)} {'NHWC' if record.memory_format == 'channels_last' else 'NCHW'}"
    cells = [f"{record.model}{_SIZES[record.size]}", f"{record.mode}, {kind}"]
    for compiled in (False, True):
        stock, converted = row.get((compiled, "stock")), row.get((compiled, "converted"))
        cells += [_time(stock), _time(converted), _ratio(stock, converted)]
    both = [row.get((False, variant)) for variant in ("stock", "converted")]
    cells += ["-" if r is None or r.peak_bytes is None else f"{r.peak_bytes / 1e6:.0f}" for r in both]
    cells += ["-" if r is None or r.norm_share is None else f"{100 * r.norm_share:.0f} %" for r in both]
    return f"| {' | '.join(cells)} |"


def _time(record: ModelRecord | None) -> str:
    if record is None:
        return "-"
    return ms(record.median_s) if record.status == "ok" else "**failed**"


def _ratio(slow: ModelRecord | None, fast: ModelRecord | None) -> str:
    if slow is None or fast is None or not slow.median_s or not fast.median_s:
        return "-"
    quartiles = (slow.q1_s, slow.q3_s, fast.q1_s, fast.q3_s)
    alike = None not in quartiles and slow.q1_s <= fast.q3_s and fast.q1_s <= slow.q3_s  # type: ignore[operator]
    return f"{'~ ' * alike}{slow.median_s / fast.median_s:.2f}"


def _about(rows: list[Row]) -> str:
    records = [record for row in rows for record in row.values()]
    machine, threads = records[0].machine, records[0].threads
    seen = versions_of(records)
    used = [f"{name} {seen[name]}" for name in ("groupnorm", "torch", "diffusers", "monai", "opacus") if name in seen]
    dates = sorted({record.date for record in records})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    where = f"{machine['cpu']}, {machine['cores']} cores, {threads} thread{'s' if threads > 1 else ''}"
    return f"{where}; {', '.join(used)}; {when}. Medians in milliseconds."


def _failures(records: list[ModelRecord]) -> str:
    lines = ["| model | | variant | reason |", "|---|---|---|---|"]
    for row in _rows(records):
        for (compiled, variant), record in sorted(row.items()):
            if record.status == "failed":
                what = f"{record.mode}, {record.dtype} {record.memory_format}"
                reason = (record.reason or "").replace("|", "\\|")
                lines.append(f"| {record.model} | {what} | {variant}{' compiled' * compiled} | {reason} |")
    if not records:
        return ""
    return "\n".join(lines) if len(lines) > 2 else "No model failed."


def _models(_: list[ModelRecord]) -> str:
    lines = ["| model | what it is | source | modes |", "|---|---|---|---|"]
    for case in MODELS:
        modes = ", ".join(f"{mode}{_SIZES[size].replace(',', ' with')}" for mode, size in case.sizes.items())
        lines.append(f"| {case.name} | {case.title} | {case.source} | {modes} |")
    return "\n".join(lines)


MODEL_TABLES: dict[str, Callable[[list[ModelRecord]], str]] = {
    "models": _times(headline=True),
    "models-all": _times(headline=False),
    "models-failures": _failures,
    "models-cases": _models,
}
