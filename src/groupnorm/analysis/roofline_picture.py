"""The picture of a roofline: what the machine can do at each intensity, and where this call stands; PNG or SVG."""

from io import BytesIO
from pathlib import Path
from typing import Any

from groupnorm._core.atomic import write_whole
from groupnorm.analysis.roofline import Roofline
from groupnorm.errors import FileError, OptionError

__all__ = ["FORMATS", "draw_roofline"]

FORMATS = (".png", ".svg")
_INK, _MUTED, _BOUND, _OURS, _PREDICTED = "#24292f", "#8c959f", "#b91c1c", "#1f6feb", "#d97706"


def draw_roofline(found: Roofline, measured_s: float | None, path: Path) -> None:
    """Write the picture, whole or not at all: on the left flops per second over flops per byte, with a roof for each
    level of memory and for arithmetic; on the right the time of each limit, beside what is predicted and measured.

    Raises OptionError for another ending than .png or .svg, FileError where matplotlib is missing.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptionError(f"the picture must end in {' or '.join(FORMATS)}: got {path.name}")
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FileError("pictures need matplotlib, which is not installed: pip install matplotlib") from error
    style: Any = {
        "font.size": 10, "font.family": "DejaVu Sans", "text.color": _INK, "axes.titlesize": 11,
        "axes.edgecolor": _MUTED, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "groupnorm",
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=(12.5, 5.2), dpi=110, facecolor="white")
        FigureCanvasAgg(figure)
        act = f" + {found.activation}" if found.activation else ""
        size = "x".join(map(str, found.shape))
        figure.suptitle(
            f"GroupNorm{act} {found.direction}, {size} {found.dtype} {found.layout}, {found.num_groups} groups",
            x=0.02, y=0.965, ha="left", fontsize=14, weight="bold",
        )  # fmt: skip
        figure.text(0.02, 0.895, f"{found.machine.name}: {found.machine.source}", color="#57606a", parse_math=False)
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        _roofs(left, found, measured_s)
        _times(right, found, measured_s)
        figure.subplots_adjust(left=0.075, right=0.965, top=0.8, bottom=0.125, wspace=0.42)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else {"Software": "groupnorm"}
        drawn = BytesIO()
        figure.savefig(drawn, format=path.suffix[1:].lower(), metadata=metadata)
    write_whole(path, drawn.getvalue())


def _roofs(axes: Any, found: Roofline, measured_s: float | None) -> None:
    speeds = found.machine.for_threads(found.threads)
    peak = speeds.flops_per_s["float64" if found.dtype == "float64" and "float64" in speeds.flops_per_s else "float32"]
    low, high = min(0.1, found.intensity / 4), max(100.0, found.ridge * 8)
    for level in speeds.levels:
        ridge = peak / level.best_bytes_per_s
        axes.plot([low, ridge], [low * level.best_bytes_per_s / 1e9, peak / 1e9], color=_INK, lw=1.4)
        axes.annotate(
            f"{level.name} {level.best_bytes_per_s / 1e9:,.0f} GB/s", (low, low * level.best_bytes_per_s / 1e9),
            xytext=(12, 1), textcoords="offset points", fontsize=8, color="#57606a",
            bbox={"facecolor": "white", "lw": 0, "pad": 0.6},
        )  # fmt: skip
    first = peak / max(level.best_bytes_per_s for level in speeds.levels)
    axes.plot([first, high], [peak / 1e9] * 2, color=_INK, lw=1.4)
    axes.annotate(f"arithmetic {peak / 1e9:,.0f} GFLOP/s", (high, peak / 1e9), xytext=(0, 4), ha="right",
                  textcoords="offset points", fontsize=8.5, color="#57606a", parse_math=False)  # fmt: skip
    axes.axvline(found.intensity, color=_MUTED, lw=0.8, ls=":")
    for name, seconds, colour in _points(found, measured_s):
        speed = found.flops / seconds / 1e9
        axes.plot([found.intensity], [speed], "o", color=colour, ms=8, label=f"{name}: {speed:,.1f} GFLOP/s")
    axes.set(xscale="log", yscale="log", xlabel="flops per byte that has to move", ylabel="GFLOP/s", xlim=(low, high))
    axes.set_title("what the machine can do, and where this call is", loc="left")
    axes.legend(frameon=False, loc="lower right", fontsize=9)


def _points(found: Roofline, measured_s: float | None) -> list[tuple[str, float, str]]:
    points = [("bound", found.time_s, _BOUND)]
    if found.predicted_s is not None:
        points.append(("predicted", found.predicted_s, _PREDICTED))
    if measured_s is not None:
        points.append(("measured", measured_s, _OURS))
    return points


def _times(axes: Any, found: Roofline, measured_s: float | None) -> None:
    limits = [(f"{limit} bound", seconds, _BOUND if limit == found.bound else _MUTED)
              for limit, seconds in found.times_s.items()]  # fmt: skip
    rows = limits + _points(found, measured_s)[1:]
    unit, factor = ("ms", 1e3) if max(seconds for _, seconds, _ in rows) >= 1e-2 else ("us", 1e6)
    for i, (_, seconds, colour) in enumerate(rows):
        axes.barh(i, seconds * factor, color=colour, height=0.62)
        axes.text(seconds * factor, i, f" {seconds * factor:,.1f} {unit}", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel(f"time, {unit}")
    axes.margins(x=0.2)
    axes.set_title(f"no call of ours takes less; {found.bound} binds", loc="left")
