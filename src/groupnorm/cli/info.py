"""`groupnorm info`: what is here, and how a problem would be done."""

from typing import Annotated, Any

import typer

from groupnorm.cli.shapes import sizes_of
from groupnorm.errors import OptionError

__all__ = ["EXAMPLE", "info", "plan_text"]

EXAMPLE = "groupnorm info --shape 2x64x64x320 --groups 32 --layout NHWC --dtype bfloat16 --direction backward"


def info(
    shape: Annotated[
        str | None, typer.Option(help="Explain how x of this shape (N first; channels last for NHWC) is done.")
    ] = None,
    groups: Annotated[int, typer.Option(help="Number of groups.")] = 32,
    layout: Annotated[str, typer.Option(help="NCHW (channels on axis 1) or NHWC (channels last).")] = "NCHW",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16, float32 or float64.")] = "float32",
    direction: Annotated[str, typer.Option(help="forward or backward.")] = "forward",
    activation: Annotated[str | None, typer.Option(help="An activation fused behind, e.g. silu.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads to plan for.")] = None,
    impl: Annotated[str | None, typer.Option(help="Engine: cpu or reference; the best one if left away.")] = None,
    bandwidth: Annotated[bool, typer.Option("--bandwidth", help="Also measure the copy speed (one second).")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show versions, machine and engines; with --shape also the plan for that problem."""
    from groupnorm import set_num_threads

    if threads is not None:
        set_num_threads(threads)
    found: dict[str, Any] = {}
    if shape is None or json:
        found |= _facts()
    if bandwidth:
        found["copy_bandwidth_bytes_per_s"] = _copy_bandwidth()
    if shape is not None:
        engine, text = plan_text(
            shape, groups, layout=layout, dtype=dtype, direction=direction, activation=activation, impl=impl
        )
        found["plan"] = {"engine": engine, "text": text}
    if json:
        from groupnorm.cli.documents import print_json

        print_json(found)
        return
    _print(found)


def plan_text(
    shape: str, groups: int, *, layout: str, dtype: str, direction: str, activation: str | None, impl: str | None
) -> tuple[str, str]:
    """The engine that would take the problem, and its plan in words. No memory of x's size is taken.

    shape: as in the layout, so channels come last for NHWC. Backward is planned with mean and rstd given.
    Raises OptionError and ShapeError as a call would.
    """
    import numpy as np

    from groupnorm import get_num_threads
    from groupnorm._core.arguments import Options, prepare
    from groupnorm._core.problem import DTYPES
    from groupnorm._dispatch import choose
    from groupnorm.bench.work import numpy_dtype

    sizes = sizes_of(shape, "--shape")
    if dtype not in DTYPES:
        raise OptionError(f"--dtype must be one of {', '.join(DTYPES)}: got {dtype!r}")
    if direction not in ("forward", "backward"):
        raise OptionError(f"--direction must be forward or backward: got {direction!r}")
    try:
        x = _untouched(sizes, numpy_dtype(dtype))
    except (ValueError, OverflowError) as error:
        raise OptionError(f"--shape {shape} is too large for an array: {error}") from error
    channels = sizes[1] if layout.startswith("NC") else sizes[-1]
    weight = _untouched((channels,), np.dtype(np.float32))
    arrays: dict[str, Any] = {"x": x, "weight": weight, "bias": weight}
    if direction == "backward":
        kind = np.dtype(np.float64 if dtype == "float64" else np.float32)
        stats = _untouched((sizes[0], max(1, min(groups, channels))), kind)
        arrays |= {"dy": x, "mean": stats, "rstd": stats}
    call, _ = prepare(Options(direction, groups, 1e-5, layout, activation, False), arrays)
    engine, plan = choose(call.problem, impl, get_num_threads())
    return engine.__name__.rpartition(".")[2], str(plan)


def _untouched(shape: tuple[int, ...], dtype: Any) -> Any:
    """A contiguous array without memory behind it: a plan depends on strides, not on data."""
    import numpy as np

    strides = [dtype.itemsize] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(1, shape[axis + 1])
    return np.lib.stride_tricks.as_strided(np.empty(1, dtype), shape, strides)


def _facts() -> dict[str, Any]:
    from dataclasses import asdict

    from groupnorm import get_num_threads
    from groupnorm._core import machine

    return {
        "versions": machine.versions(("torch", "jax", "onnxruntime", "openvino", "matplotlib")),
        "machine": asdict(machine.describe()),
        "threads": get_num_threads(),
        "engines": _engines(),
        "numba_cache": _numba_cache(),
    }


def _engines() -> dict[str, str]:
    """Engine -> "available", or the reason why it is not. Numba is not loaded: that takes a third of a second."""
    from importlib.util import find_spec

    from groupnorm._dispatch import ENGINES

    found = {}
    needed = {"cpu": ("numba", "llvmlite"), "gpu": ("torch", "triton")}
    for name in ENGINES:
        missing = [package for package in needed.get(name, ()) if find_spec(package) is None]
        there = "for arrays and tensors on a GPU" if name == "gpu" else "available"
        found[name] = f"not available: {missing[0]} is not installed" if missing else there
    return found


def _numba_cache() -> str:
    import os
    from pathlib import Path

    import groupnorm

    wished = os.environ.get("NUMBA_CACHE_DIR")
    beside = Path(groupnorm.__file__).parent / "_engines" / "cpu"
    if wished or os.access(beside, os.W_OK):
        return wished or str(beside / "__pycache__")
    return f"Numba's folder among the user's caches, as {beside} cannot be written"


def _copy_bandwidth() -> float:
    """Bytes per second, read and written, of the fastest ordinary copy of 128 MB."""
    import numpy as np

    from groupnorm import get_num_threads
    from groupnorm.bench.copies import STREAMED, copies
    from groupnorm.bench.timing import measure

    x = np.ones(1 << 25, np.float32)
    times = measure(copies(x, get_num_threads()), budget_s=0.25)
    best_s = min(time.median_s for name, time in times.items() if name != STREAMED)
    return float(f"{2 * x.nbytes / best_s:.4g}")


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table

    from groupnorm.cli.console import console as new_console

    console = new_console()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    if "versions" in found:
        machine = found["machine"]
        table.add_row("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items()))
        table.add_row("processor", f"{machine['cpu']}, {machine['cores']} cores, {machine['logical_cpus']} logical")
        table.add_row("threads", f"{found['threads']} (GROUPNORM_NUM_THREADS or set_num_threads)")
        table.add_row(
            "caches", ", ".join(f"{name} {size >> 10} KB" for name, size in machine["caches"].items()) or "unknown"
        )
        if machine["memory_bytes"]:
            table.add_row("memory", f"{machine['memory_bytes'] / 2**30:.1f} GB")
        for name, state in found["engines"].items():
            table.add_row(f"engine {name}", state)
        table.add_row("kernel cache", found["numba_cache"])
    if "copy_bandwidth_bytes_per_s" in found:
        speed = found["copy_bandwidth_bytes_per_s"] / 1e9
        table.add_row("copy speed", f"{speed:.1f} GB/s (128 MB; bytes read and written)")
    if "plan" in found:
        table.add_row("engine", found["plan"]["engine"])
        table.add_row("plan", found["plan"]["text"])
    console.print(table)
