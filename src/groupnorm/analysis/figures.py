"""Machine figures: what a machine can do at most, as numbers with their source; measured here once, or from a table."""

import json
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from groupnorm._core.atomic import write_whole
from groupnorm._core.machine import describe
from groupnorm._core.threads import usable_cpus
from groupnorm.errors import FileError, OptionError

__all__ = ["FORMAT", "Level", "MachineFigures", "Speeds", "cache_path", "figures_of", "read_figures", "write_figures"]

FORMAT = "groupnorm-figures-1"


class Level(NamedTuple):
    """A place where data lies: bytes that fit there, and bytes per second, read and written, of three loops."""

    name: str
    capacity_bytes: int | None  # None: as much as anybody needs
    read_bytes_per_s: float
    copy_bytes_per_s: float
    triad_bytes_per_s: float

    @property
    def best_bytes_per_s(self) -> float:
        """The fastest that bytes were ever seen to move here."""
        return max(self.read_bytes_per_s, self.copy_bytes_per_s, self.triad_bytes_per_s)


class Speeds(NamedTuple):
    """What so many threads do together. levels: from the smallest cache to memory. flops_per_s: of multiply-adds, by
    lane type ("float32", "float64"). operations_per_s: operations on single lanes, of every kind together.
    """

    threads: int
    levels: tuple[Level, ...]
    flops_per_s: dict[str, float]
    operations_per_s: float


@dataclass(frozen=True, slots=True)
class MachineFigures:
    """A machine by its numbers. kind: "cpu" or "gpu". lanes: of a vector (of a warp, for a GPU). launch_s: the shortest
    call of the operator. source: where the numbers come from. notes: what a reader should know about them.
    """

    name: str
    kind: str
    source: str
    lanes: int
    launch_s: float
    speeds: tuple[Speeds, ...]
    notes: str = ""

    def for_threads(self, num_threads: int) -> Speeds:
        """The speeds of the smallest measured number of threads that is not below `num_threads`, which so many threads
        cannot beat; of the largest where none is.
        """
        fitting = [speeds for speeds in self.speeds if speeds.threads >= num_threads]
        return min(fitting, key=lambda speeds: speeds.threads) if fitting else self.speeds[-1]


def figures_of(machine: str | Path | MachineFigures | None, *, measure_anew: bool = False) -> MachineFigures:
    """Figures of this machine (None: measured once, in a few seconds, and kept in `cache_path()`), of a machine in the
    table (a name such as "H200"), or in a file that `write_figures` wrote.

    Raises OptionError for a name that is not in the table, FileError for a file that is no figures file.
    """
    if isinstance(machine, MachineFigures):
        return machine
    if machine is not None:
        return _named(machine)
    if not measure_anew:
        try:
            return read_figures(cache_path())
        except FileError:  # not measured yet, or by another version
            pass
    from groupnorm.analysis.measure import measure_figures

    found = measure_figures()
    try:
        cache_path().parent.mkdir(parents=True, exist_ok=True)
        write_figures(found, cache_path())
    except (OSError, FileError) as error:
        warnings.warn(f"machine figures cannot be kept, and are measured again next time: {error}; set "
                      "GROUPNORM_CACHE_DIR to a folder", stacklevel=2)  # fmt: skip
    return found


def cache_path() -> Path:
    """Where this machine's figures are kept: in GROUPNORM_CACHE_DIR, else in the user's folder of caches; a file for
    each kind of processor and number of CPUs that the process may use.
    """
    chosen = os.environ.get("GROUPNORM_CACHE_DIR")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "groupnorm"
    return Path(chosen or home) / f"figures-{describe().slug}-{usable_cpus()}t.json"


def read_figures(path: str | Path) -> MachineFigures:
    """Figures from a file. Raises FileError if it cannot be read, or holds something else."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte, or what is no UTF-8
        reason = getattr(error, "strerror", None) or "it is no text"
        raise FileError(f"cannot read machine figures from {path}: {reason}") from error
    try:
        given = json.loads(text)
        if given.pop("format") != FORMAT:
            raise ValueError("format")
        speeds = tuple(_speeds(each) for each in given.pop("speeds"))
        found = MachineFigures(**given, speeds=speeds)
        _check(found)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FileError(
            f"{path} holds no machine figures of format {FORMAT} ({error}); write one with: "
            "groupnorm roofline SHAPE --save-machine FILE"
        ) from error
    return found


def write_figures(figures: MachineFigures, path: str | Path) -> None:
    """Write figures to a file, whole or not at all. Raises FileError where it cannot be written."""
    fields = asdict(figures)
    fields["speeds"] = [
        {**each._asdict(), "levels": [level._asdict() for level in each.levels]} for each in figures.speeds
    ]
    write_whole(path, (json.dumps({"format": FORMAT, **fields}, indent=1) + "\n").encode())


def _named(machine: str | Path) -> MachineFigures:
    from groupnorm.analysis.devices import DEVICES

    name = str(machine)
    for device in DEVICES:
        if device.name.lower() == name.lower():
            return device
    if os.sep in name or name.endswith(".json"):
        return read_figures(name)
    known = ", ".join(device.name for device in DEVICES)
    raise OptionError(f"machine must be one of {known}, or a file of figures that ends in .json: got {name!r}")


def _speeds(given: dict[str, Any]) -> Speeds:
    return Speeds(**{**given, "levels": tuple(Level(**level) for level in given["levels"])})


def _check(figures: MachineFigures) -> None:
    """ValueError or TypeError unless every figure is a number that a machine may have, and every text one line."""
    if figures.kind not in ("cpu", "gpu"):
        raise ValueError("kind is neither cpu nor gpu")
    texts: list[Any] = [
        figures.name,
        figures.source,
        figures.notes,
        *(level.name for s in figures.speeds for level in s.levels),
    ]
    if not all(isinstance(text, str) and text.isprintable() for text in texts):
        raise ValueError("a name is no line of text")
    counts = [figures.lanes, *(speeds.threads for speeds in figures.speeds)]
    if not all(type(count) is int and 0 < count < 1 << 20 for count in counts):
        raise ValueError("lanes and threads are no whole numbers, at least 1")
    numbers: list[Any] = [figures.launch_s]
    for speeds in figures.speeds:
        numbers += [speeds.operations_per_s, *speeds.flops_per_s.values()]
        for level in speeds.levels:
            numbers += level[2:] if level.capacity_bytes is None else level[1:]
        if not speeds.levels or "float32" not in speeds.flops_per_s:
            raise ValueError("levels or flops are missing")
    if not figures.speeds or not all(type(n) in (int, float) and 1e-12 < n < 1e24 for n in numbers):
        raise ValueError("a figure is missing, or is no positive number")
