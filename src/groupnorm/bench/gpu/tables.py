"""The tables of docs/gpu.md and README.md about the GPU engine, from results/: what is predicted, compiled,
measured.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

__all__ = ["GPU_TABLES"]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


_SHORT = ("resnet50-conv2", "sd15-64", "vae-512-mid", "video-20", "vae-1024")  # one for each regime and layout


def _predictions(results: Path, *, short: bool = False) -> str:
    """What the engine should take on a GPU that it has not run on; `short`: forward of a few cases."""
    found = _read(results / "offline" / "predictions.json")
    if found is None:
        return ""
    lines = [
        f"**Predicted, not measured**, for one {found['device']}, bfloat16, data in memory, in a CUDA graph:", "",
        "| case | shape | | regime | units of traffic | copy us | predicted us | predicted % of copy |",
        "|---|---|---|---|--:|--:|--:|--:|",
    ]  # fmt: skip
    for row in found["predictions"]:
        if short and (row["case"] not in _SHORT or row["task"] != "forward"):
            continue
        what = f"{row['layout']} {row['task']}{' ' + row['activation'] if row['activation'] else ''}"
        share = 100 * row["least_us"] / row["predicted_us"]
        lines.append(f"| {row['case']} | {row['shape']} | {what} | {row['regime']} | {row['units']:.2g} | "
                     f"{row['least_us']:.1f} | {row['predicted_us']:.1f} | {share:.0f} |")  # fmt: skip
    return "\n".join(lines)


def _kernels(results: Path) -> str:
    """What the compiler made of every kernel of every case."""
    blocks = []
    for path in sorted((results / "offline").glob("sm_*.json"), key=lambda path: (len(path.stem), path.stem)):
        found = _read(path)
        rows: dict[tuple[str, str, str], list[Any]] = {}
        for kernel in found["kernels"]:
            name = kernel["kernel"] + " in clusters" * (kernel["multiprocessors"] > 1)
            rows.setdefault((name, kernel["layout"], kernel["dtype"]), []).append(kernel)
        lines = [
            f"{found['architecture']}, Triton {found['triton']}, {len(found['kernels'])} kernels:", "",
            "| kernel | | variants | warps | registers | spills | shared | barriers | bytes a load: 16 | 8 | less |",
            "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]  # fmt: skip
        for (name, layout, dtype), kernels in sorted(rows.items()):
            loads: dict[int, int] = {}
            for kernel in kernels:
                for width, count in kernel["loads"].items():
                    loads[int(width)] = loads.get(int(width), 0) + count
            narrow = sum(count for width, count in loads.items() if width < 8)
            lines.append(
                f"| {name} | {dtype} {layout} | {len(kernels)} | {_range(kernels, 'warps')} | "
                f"{_range(kernels, 'registers')} | {max(kernel['spills'] for kernel in kernels)} | "
                f"{_range(kernels, 'shared_bytes')} | {_range(kernels, 'barriers')} | {loads.get(16, 0)} | "
                f"{loads.get(8, 0)} | {narrow} |"
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _range(kernels: list[Any], name: str) -> str:
    values = sorted({kernel[name] for kernel in kernels})
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _measured(results: Path) -> str:
    """Every case on every GPU that was measured."""
    blocks = []
    for path in sorted(results.glob("*/gpu.json")):
        found = _read(path)
        rows = found.get("cases", [])
        names = list(dict.fromkeys(row["contestant"] for row in rows))
        head = f"{found['device']}, torch {found['torch']}, Triton {found['triton']}, {found['date']}. Microseconds."
        lines = [head, "", f"| case | | {' | '.join(names)} | % of copy |", f"|---|---|{'--:|' * len(names)}--:|"]
        works = list(dict.fromkeys((row["case"], row["dtype"], row["layout"], row["direction"]) for row in rows))
        for work in works:
            same = {row["contestant"]: row for row in rows
                    if (row["case"], row["dtype"], row["layout"], row["direction"]) == work}  # fmt: skip
            times = [_time(same.get(name)) for name in names]
            share = same.get("groupnorm", {}).get("percent_of_copy")
            shown = "-" if share is None else f"{share:.0f}"
            lines.append(f"| {work[0]} | {' '.join(work[1:])} | {' | '.join(times)} | {shown} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) or "No GPU has been measured yet: `make bench-gpu`."


def _time(row: Any) -> str:
    if row is None:
        return "-"
    return "failed" if "failed" in row else f"{row.get('graph_us', row.get('python_us')):.1f}"


GPU_TABLES: dict[str, Callable[[Path], str]] = {
    "gpu-predictions": _predictions,
    "gpu-predictions-short": partial(_predictions, short=True),
    "gpu-kernels": _kernels,
    "gpu-measured": _measured,
}
