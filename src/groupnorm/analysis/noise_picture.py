"""A plot of `groupnorm compare`: noise of batch statistics against batch size, and the published errors beside it."""

from collections.abc import Sequence
from typing import Any, BinaryIO

from groupnorm.analysis.batch_noise import PUBLISHED, Noise

__all__ = ["draw_noise"]

_OURS, _OTHERS, _INK, _GREY = "#1f6feb", "#d97706", "#24292f", "#57606a"


def draw_noise(file: BinaryIO, noise: Sequence[Noise], group_dependence: float, source: str, what: str) -> None:
    """Write the plot, a PNG, to an open file.

    group_dependence: as batch_noise.group_dependence gives it. source: of the published errors; what: the samples, in a
    few words.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {"font.family": "DejaVu Sans", "font.size": 10, "text.color": _INK, "axes.spines.top": False,
                  "axes.spines.right": False, "axes.edgecolor": "#8c959f", "axes.titlesize": 11}  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=(12, 4.9), dpi=110, facecolor="white")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.065, right=0.975, top=0.88, bottom=0.2, wspace=0.2)
        sizes = [n.size for n in noise]
        left.plot(sizes, [n.var for n in noise], "o-", color="#b45309", label="batch norm: variance, relative")
        left.plot(sizes, [n.output for n in noise], "s-", color="#e0a458", label="batch norm: normalised values")
        left.plot(sizes, [n.mean for n in noise], "o-", color=_OTHERS, label="batch norm: mean, in standard deviations")
        left.plot(sizes, [n.mean_by_law for n in noise], ":", color=_INK, zorder=3, label="1/√n")
        left.plot(
            sizes,
            [group_dependence] * len(sizes),
            "o-",
            color=_OURS,
            label=f"group norm: {group_dependence:g} for any batch",
            clip_on=False,
        )
        left.set_title("noise of the statistics of a batch", loc="left")
        left.set_ylabel("root mean square error against all samples")
        left.set_ylim(bottom=0)
        for name, errors in PUBLISHED.items():
            colour = _OURS if "group" in name else _OTHERS
            right.plot(list(errors), list(errors.values()), "o-", color=colour, label=name)
        right.set_title("published: ResNet-50 on ImageNet", loc="left")
        right.set_ylabel("validation error, %")
        for axes, ticks in ((left, sizes), (right, list(PUBLISHED["batch norm"]))):
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(size) for size in ticks])
            axes.legend(frameon=False, fontsize=9)
        left.set_xlabel("samples in the batch")
        right.set_xlabel("images on each GPU")
        figure.text(0.015, 0.03, f"Left: {what}. Right: {source}.", fontsize=8.5, color=_GREY, parse_math=False)
        figure.savefig(file, format="png", metadata={"Software": "groupnorm"})
