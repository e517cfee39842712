"""What measuring a model leaves: one record for each variant of it, in results/<machine>/models/<model>.json."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from groupnorm.errors import FileError

__all__ = ["VARIANTS", "ModelRecord", "load_models", "save_models"]

_FORMAT = "groupnorm-models-1"
VARIANTS = ("stock", "converted", "stock compiled", "converted compiled")


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """One variant of a model in one mode. Times are seconds of one call; a call is forward for "inference", forward and
    backward for "training", and the optimizer's step besides for "dp-sgd".

    status: "ok", or "failed" with the reason (it raised, or its result was wrong). error: the 2-norm of the difference
    to the stock model in float32 over the norm of that one, outputs for inference, the gradients of all parameters
    else. peak_bytes: the most memory that a call took beside the model and its inputs, in a process of its own.
    norm_share: the part of a stock call that is spent in group_norm and the activations of the model, by
    torch.profiler. swapped, fused: what `convert` reported.
    """

    machine: dict[str, Any]
    versions: dict[str, str]
    date: str
    model: str
    mode: str
    dtype: str
    memory_format: str
    threads: int
    variant: str
    status: str
    reason: str | None
    error: float | None
    median_s: float | None
    q1_s: float | None
    q3_s: float | None
    repeats: int
    peak_bytes: int | None
    norm_share: float | None
    swapped: int | None
    fused: int | None

    @property
    def work(self) -> tuple[Any, ...]:
        """What was measured: records with the same work, of different variants, can be compared."""
        return self.machine["slug"], self.threads, self.model, self.mode, self.dtype, self.memory_format


def save_models(records: Iterable[ModelRecord], folder: Path) -> None:
    """Write records below folder/<machine>/models, in the place of older ones of the same work."""
    by_path: dict[Path, list[ModelRecord]] = {}
    for record in records:
        by_path.setdefault(folder / record.machine["slug"] / "models" / f"{record.model}.json", []).append(record)
    for path, new in by_path.items():
        replaced = {record.work for record in new}
        kept = [record for record in (_read(path) if path.exists() else []) if record.work not in replaced] + new
        kept.sort(key=lambda record: (*record.work, VARIANTS.index(record.variant)))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        content = {"format": _FORMAT, "records": [asdict(record) for record in kept]}
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)


def load_models(folder: Path) -> list[ModelRecord]:
    """Every record below folder, in the order of file names. Raises FileError for a broken file."""
    return [record for path in sorted(folder.glob("*/models/*.json")) for record in _read(path)]


def _read(path: Path) -> list[ModelRecord]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT}")
        names = [field.name for field in fields(ModelRecord)]
        return [ModelRecord(**{name: entry[name] for name in names}) for entry in content["records"]]
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path} must hold records of models: {error}; delete it and measure again") from error
