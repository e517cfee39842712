"""Triton's interpreter, made to round as GPUs do: float32 to bfloat16 it cuts off (up to 3.9), half of the results are
one unit off then.
"""

from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

__all__ = ["round_as_gpus_do"]


def round_as_gpus_do(monkeypatch: Any) -> None:
    """For the length of a test."""
    convert: Any = interpreter._convert_float

    def rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            with np.errstate(all="ignore"):
                return np.asarray(values).astype(ml_dtypes.bfloat16).view(np.uint16)
        return convert(values, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
