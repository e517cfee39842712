"""Programs of their own, for what a test cannot do in the process of the tests."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import groupnorm as gn

SOURCE = Path(gn.__file__).resolve().parents[1]


def python(
    code: str, *, ok: bool = True, source: Path = SOURCE, timeout: float = 240, **environment: str | None
) -> Any:
    """Run a program of its own; None unsets a variable. Returns what it printed."""
    variables = {**os.environ, "PYTHONPATH": str(source), "GROUPNORM_NUM_THREADS": "2", **environment}
    variables = {name: value for name, value in variables.items() if value is not None}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=variables,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if ok:
        assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
        assert not done.stderr, done.stderr[-2000:]
        return done.stdout
    return done
