"""Where commands print: rich consoles that squeeze no table in a file and take no text for markup.

Messages name things like groupnorm[plots] and [1, 64]: as markup, the first would lose its end and the second might
raise.
"""

from rich.console import Console

__all__ = ["console"]

_FILE_WIDTH = 120  # rich takes 80 columns for what is no terminal, too few for our tables


def console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr."""
    made = Console(stderr=stderr, highlight=False, markup=False)
    if not made.is_terminal:
        made.width = _FILE_WIDTH
    return made
