"""What a measurement of a model leaves: one record for each variant, in results/<machine>/models/<model>.json."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groupnorm.bench.records import keep, read

__all__ = ["MODEL_FORMAT", "ModelRecord", "load_models", "save_models"]

MODEL_FORMAT = "groupnorm-models-1"


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """One variant ("stock" or "converted", eager or compiled) of one model. Times are seconds of one call, None where
    it did not run.

    size: of the model, "full", "half" or "tiny". status: "ok", or "failed" (it raised, or its result was wrong); reason
    says why. error: by the exact result, as `model_runner.error` has it; stock_error: that of stock, eager, in the same
    dtype. peak_bytes: the most that one call takes on top of the model, eager only. norm_share: the part of a call's
    time that norms and activations take, eager only. swapped, fused: what convert reported, 0 for stock.
    """

    machine: dict[str, Any]
    versions: dict[str, str]
    date: str
    model: str
    size: str
    mode: str
    dtype: str
    memory_format: str
    compiled: bool
    threads: int
    variant: str
    status: str
    reason: str | None
    error: float | None
    stock_error: float | None
    median_s: float | None
    q1_s: float | None
    q3_s: float | None
    repeats: int
    peak_bytes: int | None
    norm_share: float | None
    swapped: int
    fused: int

    @property
    def work(self) -> tuple[Any, ...]:
        """What was measured: records with the same work stand in one row of a table."""
        return (
            self.machine["slug"],
            self.model,
            self.size,
            self.mode,
            self.dtype,
            self.memory_format,
            self.threads,
        )

    @property
    def run(self) -> tuple[Any, ...]:
        """What is measured together, in turns: stock and converted."""
        return (*self.work, self.compiled)

    @property
    def key(self) -> tuple[Any, ...]:
        """What no two records of a file have in common."""
        return (*self.run, self.variant)


def save_models(records: Iterable[ModelRecord], folder: Path) -> list[Path]:
    """Write records to folder/<machine>/models/<model>.json, in the place of older ones of the same run.

    Returns the files written. Raises FileError if a file that is there cannot be understood, or one cannot be written.
    """
    files: dict[Path, list[ModelRecord]] = {}
    for record in records:
        files.setdefault(folder / record.machine["slug"] / "models" / f"{record.model}.json", []).append(record)
    for path, fresh in files.items():
        keep(path, fresh, ModelRecord, MODEL_FORMAT)
    return list(files)


def load_models(folder: Path) -> list[ModelRecord]:
    """Every record of a model below folder, in the order of file names; there may be none. Raises FileError if a file
    is broken.
    """
    paths = sorted(folder.glob("*/models/*.json"))
    return [record for path in paths for record in read(path, ModelRecord, MODEL_FORMAT) or []]
