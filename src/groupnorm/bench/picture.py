"""The picture of the demonstration: photograph, feature maps before and after, statistics of every group, times."""

from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from groupnorm.analysis.features import channel_names

__all__ = ["draw"]

Array = Any

_SHOWN = (14, 0, 13, 22, 45)  # one channel of each kind: a blur, an edge, a spot, and both colour axes
_OURS, _OTHERS, _COPY, _INK = "#1f6feb", "#d97706", "#9aa4af", "#24292f"


def draw(
    file: BinaryIO, photo: Array, pictures: Array, before: Array, after: Array,
    times: Mapping[str, Mapping[str, float]], num_groups: int, caption: str,
) -> None:  # fmt: skip
    """Write the picture to a file, as PNG.

    photo: (H, W, 3). pictures: (N, h, w, 3), the crops. before, after: (N, C, h, w), without affine and activation.
    times: group of bars -> contestant -> seconds.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {
        "font.size": 10,
        "font.family": "DejaVu Sans",  # matplotlib brings it, so the picture is the same everywhere
        "text.color": _INK,
        "axes.titlesize": 10.5,
        "axes.titlecolor": _INK,
        "axes.edgecolor": "#8c959f",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(14.5, 10.2), dpi=110, facecolor="white")
        FigureCanvasAgg(figure)
        figure.suptitle(
            "Group Normalization of a photograph's feature maps", x=0.03, y=0.975, ha="left", fontsize=16, weight="bold"
        )
        figure.text(0.03, 0.936, caption, fontsize=10, color="#57606a", ha="left")
        grid = figure.add_gridspec(
            1, 2, left=0.03, right=0.955, top=0.885, bottom=0.43, width_ratios=(1, 3.05), wspace=0.06
        )
        _photograph(figure.add_subplot(grid[0]), photo, pictures.shape[1])
        maps = grid[1].subgridspec(
            2, len(_SHOWN) + 1, width_ratios=(*(1,) * len(_SHOWN), 0.05), wspace=0.06, hspace=0.3
        )
        _maps(figure, maps, 0, before[0], "before")
        _maps(figure, maps, 1, after[0], "after")
        lower = figure.add_gridspec(
            1, 3, left=0.05, right=0.965, top=0.345, bottom=0.075, width_ratios=(1, 1, 1.75), wspace=0.24
        )
        _statistics(figure.add_subplot(lower[0]), figure.add_subplot(lower[1]), before, after, num_groups)
        _times(figure.add_subplot(lower[2]), times)
        figure.savefig(file, format="png", metadata={"Software": "groupnorm"})


def _photograph(axes: Any, photo: Array, side: int) -> None:
    from matplotlib.patches import Rectangle

    axes.imshow(photo, interpolation="none")
    height, width = photo.shape[:2]
    corners = [(x, y) for y in (0, height - side) for x in (0, width - side)]
    for i, (x, y) in enumerate(corners):
        axes.add_patch(Rectangle((x, y), side - 1, side - 1, fill=False, edgecolor="white", linewidth=3))
        axes.add_patch(Rectangle((x, y), side - 1, side - 1, fill=False, edgecolor=_OURS, linewidth=1.4))
        axes.text(
            x + 8,
            y + 8,
            f"sample {i}",
            color="white",
            fontsize=8.5,
            va="top",
            bbox={"facecolor": _OURS, "lw": 0, "pad": 2},
        )
    axes.set_title(f"{width}x{height} photograph, the batch is its corners", loc="left")
    axes.set_anchor("N")
    axes.set_axis_off()


def _maps(figure: Any, grid: Any, row: int, maps: Array, word: str) -> None:
    """One row of channels of sample 0, all on the same colour scale, which the bar beside them shows."""
    chosen = [c for c in _SHOWN if c < maps.shape[0]]
    names = channel_names()
    limit = float(np.quantile(np.abs(maps[list(chosen)]), 0.995)) or 1.0
    image = None
    for column, channel in enumerate(chosen):
        axes = figure.add_subplot(grid[row, column])
        image = axes.imshow(maps[channel], cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="none")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(True)
        spread = f"mean {_number(float(maps[channel].mean()))}, std {_number(float(maps[channel].std()))}"
        axes.set_xlabel(spread, fontsize=8.5, color="#57606a", labelpad=4)
        if row == 0:
            axes.set_title(names[channel], fontsize=9, loc="left")
        if column == 0:
            axes.set_ylabel(f"{word}: one scale for all", fontsize=9)
    bar = figure.colorbar(image, cax=figure.add_subplot(grid[row, -1]), extend="both")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8)


def _number(value: float) -> str:
    return "0" if abs(value) < 5e-5 else f"{value:.2g}"


def _statistics(left: Any, right: Any, before: Array, after: Array, num_groups: int) -> None:
    """Histograms of mean and standard deviation over all groups of all samples."""
    mean, std = _moments(before, num_groups)
    mean_after, std_after = _moments(after, num_groups)
    reach = float(np.abs(mean).max()) * 1.1 or 1.0
    for axes, a, b, bins in (
        (left, mean, mean_after, np.linspace(-reach, reach, 32)),
        (right, std, std_after, np.geomspace(min(std.min(), 0.5) / 1.5, 2.0, 32)),
    ):
        axes.hist(a, bins, color=_OTHERS, alpha=0.9, label="before")
        axes.hist(b, bins, color=_OURS, alpha=0.6, label="after")
        axes.set_ylabel("groups")
        axes.yaxis.get_major_locator().set_params(integer=True)
    left.set_title(f"mean of each of the {mean.size} groups", loc="left")
    right.set_title("standard deviation of each group", loc="left")
    right.set_xlabel("eps keeps the weakest groups below 1", fontsize=8.5, color="#57606a")
    right.set_xscale("log")
    left.locator_params(axis="x", nbins=5)
    left.legend(frameon=False, loc="upper left")


def _moments(maps: Array, num_groups: int) -> tuple[Array, Array]:
    groups = maps.reshape(maps.shape[0] * num_groups, -1)
    return groups.mean(1, dtype=np.float64), groups.std(1, dtype=np.float64)


def _times(axes: Any, times: Mapping[str, Mapping[str, float]]) -> None:
    """Bars of milliseconds, from zero."""
    names = list(dict.fromkeys(name for bars in times.values() for name in bars))
    colours = {name: _OURS if name == "groupnorm" else _COPY if "copy" in name else _OTHERS for name in names}
    width = 0.8 / len(names)
    for i, (group, bars) in enumerate(times.items()):
        for j, name in enumerate(names):
            if name not in bars:
                continue
            at, value = i + (j - (len(names) - 1) / 2) * width, 1e3 * bars[name]
            axes.bar(at, value, width * 0.92, color=colours[name], label=name if i == 0 else None)
            axes.text(
                at, value, f"{value:.0f}" if value >= 10 else f"{value:.1f}", ha="center", va="bottom", fontsize=8.5
            )
        axes.text(i, -0.06, group, transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=9.5)
    axes.set_xticks([])
    axes.set_ylabel("milliseconds")
    axes.set_title("time (less is better)", loc="left")
    axes.margins(y=0.12)
    axes.legend(
        frameon=False,
        loc="lower right",
        bbox_to_anchor=(1.01, 0.985),
        ncol=len(names),
        columnspacing=1.2,
        handlelength=1,
    )
