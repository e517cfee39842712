"""What a measurement leaves: one record for each rival, in results/<machine>/<case>.json."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from groupnorm.errors import FileError

__all__ = ["FORMAT", "Record", "load", "save"]

FORMAT = "groupnorm-bench-1"  # other files may live under results/; only those that name this format are read


@dataclass(frozen=True, slots=True)
class Record:
    """One rival on one piece of work. Times are seconds of one call, None where the rival did not run.

    status: "ok"; "failed" (it raised, or its result was wrong); "unsupported" (it has no such operation). reason says
    why. error: the largest error as a fraction of the largest value. bytes: the least that must move. copy_bandwidth:
    bytes per second of the fastest ordinary copy in the same run, counting what it reads and what it writes;
    stream_bandwidth the same for the engine's streamed copy. cold_s: the median when no data is in a cache, where
    that was measured.
    """

    machine: dict[str, Any]
    versions: dict[str, str]
    date: str
    case: str
    shape: list[int]
    num_groups: int
    dtype: str
    layout: str
    direction: str
    activation: str | None
    threads: int
    rival: str
    status: str
    ok: bool
    reason: str | None
    error: float | None
    median_s: float | None
    q1_s: float | None
    q3_s: float | None
    repeats: int
    cold_s: float | None
    bytes: int
    copy: str
    copy_s: float
    copy_bandwidth: float
    stream_bandwidth: float | None
    percent_of_copy: float | None

    @property
    def work(self) -> tuple[Any, ...]:
        """What was measured: two records with the same work can be compared."""
        return (
            self.machine["slug"],
            self.case,
            self.dtype,
            self.layout,
            self.direction,
            self.activation or "",
            self.threads,
        )


def save(records: Iterable[Record], folder: Path) -> list[Path]:
    """Write records to folder/<machine>/<case>.json, in the place of older ones of the same work and rival.

    Returns the files written. Raises FileError if a file that is there cannot be understood, OSError if one cannot be
    written.
    """
    written: dict[Path, dict[tuple[Any, ...], Record]] = {}
    for record in records:
        path = folder / record.machine["slug"] / f"{record.case}.json"
        if path not in written:
            written[path] = {(*old.work, old.rival): old for old in (_read(path) or [])} if path.exists() else {}
        written[path][*record.work, record.rival] = record
    for path, kept in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        ordered = [asdict(kept[key]) for key in sorted(kept)]
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"format": FORMAT, "records": ordered}, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    return list(written)


def load(folder: Path) -> list[Record]:
    """Every record below folder, in the order of file names. Raises FileError if there is none, or a file is broken."""
    found = [record for path in sorted(folder.glob("*/*.json")) for record in _read(path) or []]
    if not found:
        raise FileError(f"no benchmark records: found none below {folder}; make some with: groupnorm bench")
    return found


def _read(path: Path) -> list[Record] | None:
    """The records of one file; None for a file of another format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileError(f"{path} must be JSON: {error}; delete it and measure again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    names = {field.name for field in fields(Record)}
    try:
        return [Record(**{name: entry[name] for name in names}) for entry in content["records"]]
    except (KeyError, TypeError) as error:
        raise FileError(f"{path} must hold {FORMAT} records: missing {error}; delete it and measure again") from error
