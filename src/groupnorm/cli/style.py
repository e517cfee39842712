"""`groupnorm style`: a picture in the style of another, by instance, group and layer norm, with what each one keeps."""

from pathlib import Path
from typing import Annotated, Any

import typer

from groupnorm.errors import FileError, OptionError

__all__ = ["EXAMPLE", "style"]

EXAMPLE = "groupnorm style content.jpg style.jpg --groups 15 --output picture.png"

_LONGEST = 640  # pixels of a side; a larger picture is reduced, which keeps the whole command under ten seconds
_PARTS = ("mean", "variance", "gram", "correlation")


def style(
    content: Annotated[str | None, typer.Argument(help="Picture whose content stays: PNG, JPEG, ...")] = None,
    style: Annotated[str | None, typer.Argument(help="Picture whose style it gets.")] = None,
    groups: Annotated[
        int, typer.Option("--groups", "-g", help="Groups of the 60 subbands; 15: the filters of each scale.")
    ] = 15,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the picture goes, a PNG.")] = Path(
        "groupnorm-style.png"
    ),
    strength: Annotated[float, typer.Option(help="0 leaves the content, 1 is the whole style.")] = 1.0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Put the style of one picture on another, by instance, group and layer norm, and measure what each does.

    Without files: a portrait and a map of mountains that matplotlib ships.
    """
    from groupnorm.analysis import image_transfer, subbands
    from groupnorm.cli.console import console as new_console

    if groups < 1 or subbands.CHANNELS % groups:
        raise OptionError(f"--groups must divide the {subbands.CHANNELS} subbands: got {groups}; "
                          "15 are the filters of each scale, 3 the colour axes")  # fmt: skip
    if not 0 <= strength <= 1:
        raise OptionError(f"--strength must be between 0 (content) and 1 (style): got {strength}")
    if (content is None) != (style is None):
        raise OptionError(f"give two pictures, CONTENT and STYLE, or none: got only {content or style}")
    for given in filter(None, (content, style)):
        if output.exists() and Path(given).exists() and output.samefile(given):
            raise OptionError(f"--output {output} is one of the pictures; choose another name")
    pictures, titles = _pictures(content, style)
    console = new_console(stderr=json)
    wanted = dict.fromkeys((subbands.CHANNELS, groups, 1))
    with _pending(output) as pending, console.status("splitting both pictures, three transfers"):
        found = image_transfer.study(pictures[0], pictures[1], tuple(wanted), strength=strength)
        _draw(pending, found, strength, titles)
    if json:
        from groupnorm.cli.documents import print_json

        print_json(_document(found, titles, str(output), strength))
        return
    _print(found, titles, strength, console)
    console.print(f"wrote {output}", soft_wrap=True)


def _pictures(content: str | None, style: str | None) -> tuple[tuple[Any, Any], tuple[str, str]]:
    """Both pictures, checked and reduced, and what they are."""
    from groupnorm.analysis import features
    from groupnorm.analysis.pictures import read_picture, reduced, terrain
    from groupnorm.analysis.subbands import check_picture

    if content is None or style is None:
        return (features.photograph(), terrain()), ("Grace Hopper, a portrait", "mountains, a lit map")
    first, second = (check_picture(reduced(read_picture(path), _LONGEST), path) for path in (content, style))
    return (first, second), (Path(content).name, Path(style).name)


def _pending(output: Path) -> Any:
    """The file on its way to `output`; closed without a trace unless the block commits it."""
    from groupnorm._core.atomic import pending_file

    if output.suffix.lower() != ".png":
        raise FileError(f"--output must end in .png: got {output}")
    return pending_file(output)


def _draw(pending: Any, found: Any, strength: float, titles: tuple[str, str]) -> None:
    from groupnorm._core.atomic import commit
    from groupnorm.analysis.style_picture import draw_style

    with pending.writing():
        draw_style(pending.file, found, strength, titles)
    commit([pending])


def _document(found: Any, titles: tuple[str, str], output: str, strength: float) -> dict[str, Any]:
    from dataclasses import asdict

    sizes = {name: list(getattr(found, name).shape[:2]) for name in ("content", "style")}
    return {
        "content": {"name": titles[0], "size": sizes["content"]},
        "style": {"name": titles[1], "size": sizes["style"]},
        "strength": strength,
        "picture": output,
        "apart": asdict(found.apart),  # NaN: there was no difference; infinity: between constants
        "results": [
            {"num_groups": r.num_groups, "clipped": r.clipped, "to_style": asdict(r.to_style),
             "to_content": asdict(r.to_content)} for r in found.results
        ],
        "kept": {str(n): asdict(k) for n, k in found.kept.items()} | {"batch norm": asdict(found.kept_by_batch_norm)},
    }  # fmt: skip


def _print(found: Any, titles: tuple[str, str], strength: float, console: Any) -> None:
    from math import isfinite

    from rich.table import Table

    from groupnorm.analysis.style_picture import named

    console.print(
        f"content: {titles[0]}, {_size(found.content)}; style: {titles[1]}, {_size(found.style)}; 60 subbands"
    )
    table = Table(title=f"Distance of the result's style from both pictures, strength {strength:g} (0: the same)",
                  title_justify="left")  # fmt: skip
    table.add_column("picture", no_wrap=True)
    for of in ("style", "content"):
        for part in ("mean", "variance", "gram"):
            table.add_column(f"{of}:\n{part}", justify="right")
    table.add_column("cut off", justify="right")
    apart = [f"{getattr(found.apart, part):.3f}" for part in _PARTS[:3]]
    table.add_row("content, as it was", *apart, "", "", "", "")
    for r in found.results:
        cells = [f"{getattr(d, part):.3f}" for d in (r.to_style, r.to_content) for part in _PARTS[:3]]
        table.add_row(named(r.num_groups), *cells, f"{100 * r.clipped:.1f}%")
    console.print(table)
    table = Table(title="What each normalisation keeps of the difference between both styles", title_justify="left")
    table.add_column("normalisation")
    for part in ("means", "variances", "gram", "correlations"):
        table.add_column(part, justify="right")
    rows = {named(num_groups): kept for num_groups, kept in found.kept.items()}
    for name, kept in (rows | {"batch norm, both in one batch": found.kept_by_batch_norm}).items():
        values = [getattr(kept, part) for part in _PARTS]
        table.add_row(name, *(f"{100 * value:.0f}%" if isfinite(value) else "-" for value in values))
    console.print(table)
    console.print("over 100%: one mean is taken from a whole group, so subbands whose means agreed agree no longer",
                  soft_wrap=True)  # fmt: skip


def _size(picture: Any) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"
