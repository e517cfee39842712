"""The most memory that one call of a model takes, measured in a process of its own.

The process builds the model and calls it once, so that kernels are compiled and scratch memory is there. Then free
memory goes back to the system, the kernel's note of the highest resident size is reset, and the model is called again:
what is noted then, above what was resident before, is the peak of a call. Linux only: macOS and Windows keep no note
that can be reset.
"""

import ctypes
import gc
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import groupnorm as gn
from groupnorm.bench.model_work import ModelWork, build, step
from groupnorm.bench.models import select_models

__all__ = ["peak_bytes"]

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def peak_bytes(work: ModelWork, *, converted: bool) -> int | None:
    """Bytes that one eager call takes on top of the model and its inputs; None where that cannot be measured."""
    if not _RESET.exists():
        return None
    told = {**asdict(replace(work, compiled=False)), "case": work.case.name, "converted": converted}
    command = [sys.executable, "-m", __name__, json.dumps(told)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def _measure(work: ModelWork, *, converted: bool) -> int:
    import torch

    torch.set_num_threads(work.threads)
    gn.set_num_threads(work.threads)
    built = build(work, converted=converted)
    run = step(work, built.model, built.inputs)
    run()
    for parameter in built.model.parameters():
        parameter.grad = None
    _give_back()
    _RESET.write_text("5", encoding="ascii")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _give_back() -> None:
    """Return what is free to the system, or the next call would take it up again unseen."""
    gc.collect()
    gn.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    """An entry of the process's status, in bytes."""
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    wanted = options.pop("converted")
    print(_measure(ModelWork(**{**options, "case": select_models(options["case"])[0]}), converted=wanted))
