"""Every test draws the same numbers each time, whichever tests ran before it in the same process."""

import os
import shutil
import sys

import pytest

if shutil.which("nvidia-smi") is None:  # without a GPU its kernels run in Triton's interpreter, which reads this once
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """PyTorch's generator starts anew; NumPy's are made by each test."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
