"""`groupnorm compare`: group norm beside instance, layer and batch norm: identities, differences, times, noise."""

from pathlib import Path
from typing import Annotated, Any

import typer

from groupnorm.cli.shapes import sizes_of
from groupnorm.errors import FileError, OptionError

__all__ = ["EXAMPLE", "compare"]

EXAMPLE = "groupnorm compare --groups 24 --output noise.png"

_SIDE = 64  # pixels of a crop of the photograph
_TIMED = 32  # of the crops, a usual batch
_CHECKED = 1 << 20  # values that identities are checked on; their float64 copies are 8 MB each
_LARGEST = 1 << 28  # values of --shape: 1 GB


def compare(
    x: Annotated[
        str | None,
        typer.Argument(help="A file of features (.npy, .npz or .safetensors), (N, C, H, W) or other positions."),
    ] = None,
    shape: Annotated[str | None, typer.Option(help="Random features of this shape instead, e.g. 8,64,56,56.")] = None,
    groups: Annotated[
        int | None, typer.Option("--groups", "-g", help="Number of groups; without it, what is nearest to 32.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time for each contestant.")] = 0.15,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Draw noise against batch size to this PNG.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compare group norm with instance, layer and batch norm: where they are equal, what they cost, and how much the
    batch changes them. Without input: features of crops of a photograph.
    """
    import numpy as np

    from groupnorm.analysis import batch_noise as noises
    from groupnorm.analysis import compare as comparing
    from groupnorm.cli.console import console as new_console

    if not 0 < seconds <= 60:
        raise OptionError(f"--seconds must be between 0 and 60: got {seconds}")
    if x is not None and shape is not None:
        raise OptionError(f"give a file or --shape, not both: got {x} and {shape}")
    features, what = _features(x, shape)
    features = comparing.check_features(features)
    N, C = features.shape[:2]
    if groups is not None and (groups < 1 or C % groups):
        nearest = comparing.nearest_groups(C, groups)
        raise OptionError(f"--groups must divide the {C} channels: got {groups}; try {nearest}")
    G = comparing.nearest_groups(C) if groups is None else groups
    if output is not None and N < 2:
        raise OptionError("--output draws noise against batch size, which one sample has not: give two or more")
    with _written(output) as pending, new_console(stderr=True).status("checking, timing, drawing batches"):
        checked = features[: max(2, _CHECKED // features[0].size)]  # a batch, so that a sample has others beside it
        timed = features if x or shape else features[:_TIMED]
        random = np.random.default_rng(0)
        weight, bias = (random.standard_normal(C).astype(np.float32) for _ in range(2))
        identities = comparing.identities(checked, G, weight, bias)
        found = {
            "features": what, "shape": list(features.shape), "num_groups": G, "checked_samples": len(checked),
            "timed_samples": len(timed), "identities": identities,
            "torch": comparing.beside_torch(checked, G, weight, bias), "kinds": comparing.kinds(checked, G),
            "times_s": _times(timed, G, weight, bias, seconds),
            "noise": noises.batch_noise(features) if N > 1 else [],
            "group_dependence": noises.group_dependence(checked, G),
        }  # fmt: skip
        if pending is not None:
            _draw(pending, found)
    if json:
        _print_json(found, output)
    else:
        _print(found, new_console())
        if output is not None:
            new_console().print(f"wrote {output}", soft_wrap=True)
    if not all(identity.holds for identity in identities):
        raise typer.Exit(1)


def _features(path: str | None, shape: str | None) -> tuple[Any, str]:
    """The features, and what they are in words."""
    import numpy as np

    from groupnorm.analysis import features as filters
    from groupnorm.files.source import read_array

    if path is not None:
        return read_array(path), Path(path).name
    if shape is None:
        try:
            picture, name = filters.photograph(), "a photograph"
        except FileError:
            picture, name = filters.stand_in(), "a synthetic picture (matplotlib, which has a photograph, is missing)"
        return filters.filtered(picture, _SIDE), f"{filters.CHANNELS} filters on crops of {name}"
    sizes = sizes_of(shape, "--shape")
    count = 1
    for size in sizes:
        count *= size
    if count > _LARGEST or len(sizes) > 16:
        raise OptionError(f"--shape {shape} is too large: got {count:,} values, expected at most {_LARGEST:,}")
    return np.random.default_rng(0).standard_normal(sizes, np.float32), "random numbers, normally distributed"


def _times(x: Any, G: int, weight: Any, bias: Any, seconds: float) -> dict[str, float]:
    """Median seconds of a call of each norm, taken in turns; PyTorch's with as many threads, where it is installed."""
    import groupnorm as gn
    from groupnorm.bench.timing import measure

    C = x.shape[1]
    ours = {f"groupnorm, G = {n}": n for n in dict.fromkeys((G, C, 1))}
    contestants = {
        name: (lambda n=n: gn.group_norm(x, n, weight, bias)) for name, n in ours.items()
    } | _torch_layers(x, G, weight, bias)  # fmt: skip
    return {name: time.median_s for name, time in measure(contestants, budget_s=seconds, min_repeats=3).items()}


def _torch_layers(x: Any, G: int, weight: Any, bias: Any) -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        return {}
    import groupnorm as gn

    F = torch.nn.functional
    torch.set_num_threads(gn.get_num_threads())
    tensor, w, b = (torch.from_numpy(a.astype(x.dtype, copy=False)) for a in (x, weight, bias))
    each = (x.shape[1], *(1,) * (x.ndim - 2))
    wide_w, wide_b = (a.reshape(each).expand(x.shape[1:]).contiguous() for a in (w, b))
    return {
        f"torch group_norm, G = {G}": lambda: F.group_norm(tensor, G, w, b),
        "torch instance_norm": lambda: F.instance_norm(tensor, weight=w, bias=b),
        "torch layer_norm": lambda: F.layer_norm(tensor, x.shape[1:], wide_w, wide_b),
        "torch batch_norm, training": lambda: F.batch_norm(tensor, None, None, w, b, True),
    }


def _written(output: Path | None) -> Any:
    """The file on its way to `output`, or None; without a trace unless the block commits it."""
    from contextlib import nullcontext

    from groupnorm._core.atomic import pending_file

    if output is None:
        return nullcontext()
    if output.suffix.lower() != ".png":
        raise FileError(f"--output must end in .png: got {output}")
    return pending_file(output)


def _draw(pending: Any, found: dict[str, Any]) -> None:
    from groupnorm._core.atomic import commit
    from groupnorm.analysis.batch_noise import SOURCE
    from groupnorm.analysis.noise_picture import draw_noise

    try:
        with pending.writing():
            draw_noise(pending.file, found["noise"], found["group_dependence"], SOURCE, found["features"])
    except ImportError as error:
        raise FileError("--output needs matplotlib, which is not installed: pip install matplotlib") from error
    commit([pending])


def _print_json(found: dict[str, Any], output: Path | None) -> None:
    from dataclasses import asdict

    from groupnorm.analysis import batch_noise as noises
    from groupnorm.cli.documents import print_json

    plain = found | {name: [asdict(row) for row in found[name]] for name in ("identities", "torch", "kinds", "noise")}
    published = {"source": noises.SOURCE, "by_batch": noises.PUBLISHED, "at_32": noises.PUBLISHED_NORMS}
    holds = all(identity.holds for identity in found["identities"])
    picture = None if output is None else str(output)
    print_json(plain | {"holds": holds, "published": published, "picture": picture})


def _print(found: dict[str, Any], console: Any) -> None:
    from rich.table import Table

    from groupnorm.bench.tables import ms

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left")
        for i, name in enumerate(columns):
            made.add_column(name, justify="left" if i == 0 or name in ("is", "mean and variance over") else "right")
        return made

    shape = "x".join(map(str, found["shape"]))
    console.print(f"x: {found['features']}, {shape}", soft_wrap=True)
    made = table(f"What each is, on {found['checked_samples']} samples; difference: root mean square, from group norm",
                 "norm", "mean and variance over", "pairs", "needs the batch", "difference")  # fmt: skip
    for kind in found["kinds"]:
        made.add_row(kind.name, kind.over, str(kind.statistics), "yes" if kind.uses_batch else "no",
                     f"{kind.difference:.3f}")  # fmt: skip
    console.print(made)
    made = table(
        f"Where they are the same function, on {found['checked_samples']} samples",
        "this operator",
        "is",
        "largest difference",
        "of allowed",
    )
    for row in (*found["identities"], *found["torch"]):
        allowed = "" if row.fraction is None else f"{row.fraction:.2f}{'' if row.holds else ' BROKEN'}"
        made.add_row(row.ours, row.other, f"{row.largest:.1e}", allowed)
    console.print(made)
    made = table("Time of a call", "norm", f"ms for {found['timed_samples']} samples, median")
    for name, time_s in found["times_s"].items():
        made.add_row(name, ms(time_s))
    console.print(made)
    _print_noise(found, table, console)


def _print_noise(found: dict[str, Any], table: Any, console: Any) -> None:
    from groupnorm.analysis.batch_noise import PUBLISHED, PUBLISHED_NORMS, SOURCE

    made = table("Noise of batch norm's statistics (root mean square over batches), and published errors",
                 "batch", "mean, in std", "by 1/sqrt(n)", "variance, relative", "values",
                 *(f"{name}: error %" for name in PUBLISHED))  # fmt: skip
    for row in found["noise"]:
        errors = (f"{by[row.size]}" if row.size in by else "" for by in PUBLISHED.values())
        made.add_row(str(row.size), f"{row.mean:.3f}", f"{row.mean_by_law:.3f}", f"{row.var:.3f}", f"{row.output:.3f}",
                     *errors)  # fmt: skip
    if found["noise"]:
        console.print(made)
    changed = found["group_dependence"]
    console.print(f"group norm: a sample alone and in its batch have statistics that differ by {changed:g}")
    at_32 = ", ".join(f"{name} {error}" for name, error in PUBLISHED_NORMS.items())
    console.print(f"published errors: {SOURCE}; with 32 images each: {at_32}", soft_wrap=True)
    worse = {size: PUBLISHED["batch norm"][size] - error for size, error in PUBLISHED["group norm, G = 32"].items()}
    small = {size: more for size, more in worse.items() if more > 0}
    console.print(
        f"a batch is small where batch norm's published error is above group norm's: {max(small)} images for each set "
        f"of statistics, and fewer ({', '.join(f'{more:+.1f} with {size}' for size, more in small.items())})",
        soft_wrap=True,
    )
