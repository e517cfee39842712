"""How functions become kernels, and whether there is a GPU to run them or Triton's interpreter."""

import os
from typing import Any

import triton

__all__ = ["INTERPRETED", "TESTED", "VERSION", "kernel"]

# Numbers that change from call to call: a kernel is not compiled again because one of them is 1 or divisible by 16.
_RUNTIME = ("N", "slabs", "parts", "across", "lag", "tiles", "rows", "VECTORS")

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # Triton looks at it at each decoration, so now
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
TESTED = ((3, 6), (3, 9))  # versions of Triton with which this engine is tested: from, up to and with
kernel: Any = triton.jit(do_not_specialize=_RUNTIME)
