"""Every test draws the same numbers each time, whichever tests ran before it in the same process."""

import sys

import pytest


@pytest.fixture(autouse=True)
def seeded() -> None:
    """PyTorch's generator starts anew; NumPy's are made by each test."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
