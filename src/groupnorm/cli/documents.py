"""What --json prints."""

import json
import math
from typing import Any

__all__ = ["print_json"]


def print_json(document: Any, *, indent: int | None = 1) -> None:
    """Print one JSON document on stdout; NaN and infinity, which JSON has no words for, as null."""
    print(json.dumps(_in_json(document), indent=indent, allow_nan=False))


def _in_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _in_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
