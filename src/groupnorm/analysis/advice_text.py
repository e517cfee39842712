"""An advice as plain text, for print; the command line has tables of its own."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from groupnorm.analysis.advisor import Advice

__all__ = ["as_text", "headline", "norm_line", "seconds"]

_SHOWN = 5  # choices printed with all that is said about them


def as_text(advice: "Advice") -> str:
    """Everything an advice says; the five best choices with their reasons, the others by their scores."""
    lines = [headline(advice), "", "choices, best first (score: points of error above the best published)"]
    for choice in advice.choices[:_SHOWN]:
        D = advice.channels // choice.num_groups
        lines.append(
            f"  G = {choice.num_groups}: score {choice.score:.2f}, D = {D}, M = {advice.elements(choice.num_groups)}"
            + (f", predicted {seconds(choice.predicted_s)}" if choice.predicted_s is not None else "")
        )
        lines += [f"    + {reason}" for reason in choice.reasons]
        lines += [f"    ! {warning}" for warning in choice.warnings]
    others = advice.choices[_SHOWN:]
    if others:
        lines.append("  others: " + ", ".join(f"{choice.num_groups} ({choice.score:.2f})" for choice in others))
    lines += ["", f"norms with {advice.batch} images per GPU, error of ResNet-50 on ImageNet"]
    lines += [f"  {norm.norm}: {norm_line(norm.error_percent)}; {norm.note}" for norm in advice.norms]
    if advice.instead:
        lines += ["", "instead", *(f"  - {text}" for text in advice.instead)]
    cost = advice.cost
    lines += [
        "",
        "cost of BN -> GN",
        f"  kept for backward: GN {cost.saved_bytes:,} bytes, BN {cost.batch_norm_saved_bytes:,}, "
        f"frozen BN {cost.frozen_batch_norm_saved_bytes}",
        f"  a forward moves at least {cost.least_forward_bytes:,} bytes: at least {seconds(advice.bound_s)} "
        f"({advice.bound}) on {advice.machine}",
        *(f"  - {note}" for note in cost.notes),
        "",
        "traps",
        *(f"  - {warning}" for warning in advice.warnings),
    ]
    return "\n".join(lines)


def headline(advice: "Advice") -> str:
    """The question and the answer in a line."""
    shape = "x".join(map(str, (advice.batch, advice.channels, *advice.spatial)))
    purpose = f" for {advice.task}" if advice.task else ""
    if advice.num_groups is None:
        return f"{shape} {advice.dtype}{purpose}: no number of groups is of use (M = 1)"
    groups, D = advice.num_groups, advice.channels // advice.num_groups
    return f"{shape} {advice.dtype}{purpose}: {groups} group{'s' * (groups > 1)} of {D} channel{'s' * (D > 1)}"


def norm_line(error_percent: float | None) -> str:
    """An error as it is printed."""
    return "-" if error_percent is None else f"{error_percent:.1f} %"


def seconds(time_s: float) -> str:
    """A time with a fitting unit, three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if time_s >= size:
            return f"{time_s / size:.3g} {unit}"
    return f"{time_s * 1e9:.3g} ns"
