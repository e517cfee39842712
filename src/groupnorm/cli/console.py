"""Where commands print: rich consoles that neither colour nor squeeze what goes into a file."""

from rich.console import Console

__all__ = ["console"]

_FILE_WIDTH = 120  # rich takes 80 columns for what is no terminal, too few for our tables


def console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr."""
    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal:
        made.width = _FILE_WIDTH
    return made
