"""What a measurement leaves: one record for each rival, in results/<machine>/<case>.json; how such files are kept."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from groupnorm._core.atomic import write_whole
from groupnorm.errors import FileError

__all__ = ["FORMAT", "Record", "keep", "load", "read", "save"]

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

    @property
    def run(self) -> tuple[Any, ...]:
        """What is measured together, in turns: all rivals on this work."""
        return self.work

    @property
    def key(self) -> tuple[Any, ...]:
        """What no two records of a file have in common."""
        return (*self.work, self.rival)


class Keyed(Protocol):
    """A dataclass that is kept in files, once for each key."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def run(self) -> tuple[Any, ...]:
        """What is measured together, in turns."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What no two records of a file have in common."""


K = TypeVar("K", bound=Keyed)


def save(records: Iterable[Record], folder: Path) -> list[Path]:
    """Write records to folder/<machine>/<case>.json, in the place of older ones of the same work, other rivals' too:
    times of two days are not to be compared.

    Returns the files written. Raises FileError if a file that is there cannot be understood, or one cannot be written.
    """
    files: dict[Path, list[Record]] = {}
    for record in records:
        files.setdefault(folder / record.machine["slug"] / f"{record.case}.json", []).append(record)
    for path, fresh in files.items():
        keep(path, fresh, Record, FORMAT)
    return list(files)


def load(folder: Path) -> list[Record]:
    """Every record below folder, in the order of file names. Raises FileError if there is none, or a file is broken."""
    found = [record for path in sorted(folder.glob("*/*.json")) for record in read(path, Record, FORMAT) or []]
    if not found:
        raise FileError(f"no benchmark records: found none below {folder}; make some with: groupnorm bench")
    return found


def keep(path: Path, records: Iterable[K], kind: type[K], form: str) -> None:
    """Write records to a file of the format `form`, in the place of older ones of the same runs."""
    fresh = {record.key: record for record in records}
    runs = {record.run for record in fresh.values()}
    old = (read(path, kind, form) or []) if path.exists() else []
    kept = {record.key: record for record in old if record.run not in runs} | fresh
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = [asdict(kept[key]) for key in sorted(kept)]
    write_whole(path, (json.dumps({"format": form, "records": ordered}, indent=1) + "\n").encode())


def read(path: Path, kind: type[K], form: str) -> list[K] | None:
    """The records of one file, which are of the dataclass `kind`; None for a file of another format than `form`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileError(f"{path} must be JSON: {error}; delete it and measure again") from error
    if not isinstance(content, dict) or content.get("format") != form:
        return None
    names = {field.name for field in fields(kind)}
    try:
        return [kind(**{name: entry[name] for name in names}) for entry in content["records"]]
    except (KeyError, TypeError) as error:
        raise FileError(f"{path} must hold {form} records: missing {error}; delete it and measure again") from error
