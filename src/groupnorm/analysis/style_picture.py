"""The picture of `groupnorm style`: content and style, and the content after each normalisation."""

from typing import BinaryIO

from groupnorm.analysis.image_transfer import Study
from groupnorm.analysis.style_distance import Distance
from groupnorm.analysis.subbands import CHANNELS

__all__ = ["draw_style", "named"]

_INK, _GREY, _OURS = "#24292f", "#57606a", "#1f6feb"
_LEFT, _RIGHT = 0.015, 0.985  # of the pictures, as fractions of the figure's width
_PANEL, _ABOVE, _BELOW = 3.35, 1.46, 1.43  # inches: width of a panel; what stands above and below the pictures
_HOW = (
    "The content is split into {} subbands (colour, orientation, scale). Each group of them is normalised, takes mean "
    "and standard deviation of the same group of the style, and all are added up again. Strength {:g}."
)
_DISTANCES = (
    "Distances between styles of pictures, 0 if they are the same. mean: in standard deviations of a subband; "
    "variance: of a subband, from 0 to 2; gram: covariances of the subbands. Root mean squares over subbands."
)
_TALLEST = 1.3  # height of the pictures' room over its width, at most


def named(num_groups: int) -> str:
    """What a normalisation of the subbands with that many groups is called."""
    kind = "instance norm" if num_groups == CHANNELS else "layer norm" if num_groups == 1 else "group norm"
    return f"{kind}, G = {num_groups}"


def draw_style(file: BinaryIO, study: Study, strength: float, titles: tuple[str, str]) -> None:
    """Write the picture, a PNG, to an open file. titles: what content and style are, in a few words."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        ("content", titles[0], study.content, None, study.apart),
        ("style", titles[1], study.style, study.apart, None),
        *((named(r.num_groups), _what(r.num_groups), r.picture, r.to_content, r.to_style) for r in study.results),
    ]
    with mpl.rc_context({"font.family": "DejaVu Sans", "text.color": _INK}):
        tallest = max(float(picture.shape[0] / picture.shape[1]) for _, _, picture, _, _ in panels)
        height = _ABOVE + _BELOW + 0.95 * _PANEL * min(tallest, _TALLEST)

        def down(inches: float) -> float:
            return 1 - inches / height

        figure = Figure(figsize=(_PANEL * len(panels), height), dpi=110, facecolor="white")
        FigureCanvasAgg(figure)
        figure.text(
            _LEFT, down(0.37), "Style as statistics: what each normalisation exchanges", fontsize=16, weight="bold"
        )
        figure.text(_LEFT, down(0.7), _HOW.format(CHANNELS, strength), fontsize=10, color=_GREY)
        grid = figure.add_gridspec(
            1, len(panels), left=_LEFT, right=_RIGHT, top=down(_ABOVE), bottom=_BELOW / height, wspace=0.05
        )
        for i, (title, line, picture, to_content, to_style) in enumerate(panels):
            axes = figure.add_subplot(grid[i])
            axes.imshow(picture, interpolation="lanczos")
            axes.set_anchor("NW")
            axes.set_axis_off()
            left = grid[i].get_position(figure).x0
            figure.text(left, down(1.07), title, fontsize=12, weight="bold", color=_INK if i < 2 else _OURS)
            figure.text(left, down(1.31), line, fontsize=9, color=_GREY, parse_math=False)
            below = _distances(to_content, to_style)
            figure.text(left, 0.46 / height, below, fontsize=9.5, family="DejaVu Sans Mono", linespacing=1.5)
        figure.text(_LEFT, 0.15 / height, _DISTANCES, fontsize=9, color=_GREY)
        figure.savefig(file, format="png", metadata={"Software": "groupnorm"})


def _what(num_groups: int) -> str:
    if num_groups == CHANNELS:
        return "each subband by itself"
    if num_groups == 1:
        return "all subbands together"
    return f"{CHANNELS // num_groups} neighbouring subbands together"


def _distances(to_content: Distance | None, to_style: Distance | None) -> str:
    """Four lines: how far a picture is from content and from style."""
    lines = ["distance from content  style"]
    for name in ("mean", "variance", "gram"):
        cells = ["—" if d is None else f"{getattr(d, name):.2f}" for d in (to_content, to_style)]
        lines.append(f"{name:13} {cells[0]:>7} {cells[1]:>6}")
    return "\n".join(lines)
