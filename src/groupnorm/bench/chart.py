"""Bar charts as SVG, written by hand: the same records give the same bytes everywhere, without a plotting library."""

from html import escape
from typing import NamedTuple

__all__ = ["Bar", "bar_chart"]

_WIDTH, _LABEL, _VALUE, _BAR, _GAP, _PAD = 860, 250, 70, 16, 14, 16  # pixels
_COLOURS = ("#1f6feb", "#d97706", "#6b7280", "#0f766e", "#9333ea", "#b91c1c")
_STYLE = (
    "text{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;font-size:13px;fill:#24292f}"
    ".title{font-size:16px;font-weight:600}.small{font-size:12px;fill:#57606a}"
    ".paper{fill:#ffffff}.grid{stroke:#d0d7de;stroke-width:1}"
    ".mark{stroke:#24292f;stroke-width:1.5;stroke-dasharray:4 3}"
    "@media (prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9da7b3}.paper{fill:#0d1117}"
    ".grid{stroke:#30363d}.mark{stroke:#e6edf3}}"
)


class Bar(NamedTuple):
    """One group of bars: a label, and a value for each series (None leaves the bar out)."""

    label: str
    values: tuple[float | None, ...]


def bar_chart(
    title: str, subtitle: str, series: tuple[str, ...], bars: list[Bar], *, unit: str, mark: float | None = None
) -> str:
    """Horizontal bars, all from zero on one axis. `mark` draws a dashed line at a value, such as 100 %."""
    top = 84
    height_of_group = len(series) * _BAR + _GAP
    height = top + len(bars) * height_of_group + _PAD + 14
    largest = max([value for bar in bars for value in bar.values if value is not None] + [mark or 0.0, 1e-12])
    step = _step(largest)
    scale = (_WIDTH - _LABEL - _VALUE) / (largest or 1.0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        f'role="img" aria-label="{escape(title)}">',
        f'<style>{_STYLE}</style><rect class="paper" width="{_WIDTH}" height="{height}" rx="6"/>',
        f'<text class="title" x="{_PAD}" y="26">{escape(title)}</text>',
        f'<text class="small" x="{_PAD}" y="45">{escape(subtitle)}</text>',
    ]
    x = float(_PAD)
    for name, colour in zip(series, _COLOURS, strict=False):
        parts.append(f'<rect x="{x:.0f}" y="56" width="11" height="11" fill="{colour}"/>')
        parts.append(f'<text class="small" x="{x + 16:.0f}" y="66">{escape(name)}</text>')
        x += 34 + 7.2 * len(name)
    bottom = height - _PAD - 10
    tick = 0.0
    while tick <= largest * 1.0001:
        at = _LABEL + tick * scale
        parts.append(f'<line class="grid" x1="{at:.1f}" y1="{top - 8}" x2="{at:.1f}" y2="{bottom}"/>')
        parts.append(
            f'<text class="small" x="{at:.1f}" y="{height - 8}" text-anchor="middle">{tick:g}{escape(unit)}</text>'
        )
        tick += step
    for i, bar in enumerate(bars):
        y = top + i * height_of_group
        middle = y + len(series) * _BAR / 2 + 4
        parts.append(f'<text x="{_LABEL - 10}" y="{middle:.0f}" text-anchor="end">{escape(bar.label)}</text>')
        for j, (value, colour) in enumerate(zip(bar.values, _COLOURS, strict=False)):
            if value is None:
                continue
            width, at = value * scale, y + j * _BAR
            parts.append(
                f'<rect x="{_LABEL}" y="{at}" width="{width:.1f}" height="{_BAR - 3}" rx="2" fill="{colour}"/>'
            )
            text = f"{value:.0f}" if value >= 10 else f"{value:.1f}"
            parts.append(f'<text class="small" x="{_LABEL + width + 5:.1f}" y="{at + 11}">{text}{escape(unit)}</text>')
    if mark is not None:
        at = _LABEL + mark * scale
        parts.append(f'<line class="mark" x1="{at:.1f}" y1="{top - 8}" x2="{at:.1f}" y2="{bottom}"/>')
    return "\n".join([*parts, "</svg>", ""])


def _step(largest: float) -> float:
    """A round distance between ticks that gives four to eight of them."""
    power = 1.0
    while power * 10 <= largest:
        power *= 10
    while power > largest:
        power /= 10
    return next(power * factor for factor in (0.2, 0.5, 1.0, 2.0) if largest / (power * factor) <= 8)
