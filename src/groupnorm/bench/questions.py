"""Runs the commands that a document shows, and writes what they print below them.

    python -m groupnorm.bench.questions docs/questions.md

A document asks for a command with two lines, between which everything is generated:

    <!-- run: groupnorm roofline 2x320x64x64 -->
    <!-- /run -->

Only commands of this package are run. A picture that a command writes goes where the command says, seen from the
document's folder. What is measured is measured anew, so numbers differ from run to run.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from groupnorm._core.atomic import write_whole
from groupnorm.errors import FileError

__all__ = ["commands_in", "fill"]

_OPEN = re.compile(r"<!-- run: (groupnorm .+) -->")
_CLOSE = "<!-- /run -->"


def commands_in(text: str) -> list[str]:
    """The commands that a document shows, in order."""
    return [found[1] for line in text.splitlines() if (found := _OPEN.fullmatch(line.strip()))]


def fill(path: Path) -> bool:
    """Run every command that the document at `path` shows; returns whether the document changed. It is rewritten whole
    or not at all.

    Raises FileError where a marker has no end, and where a command fails, with what it said.
    """
    text = path.read_text(encoding="utf-8")
    lines: list[str] = []
    command = None
    for line in text.splitlines():
        found = _OPEN.fullmatch(line.strip())
        if found:
            if command is not None:
                raise FileError(f"{path}: the part of {command!r} has no end; add a line {_CLOSE}")
            command = found[1]
            lines += [line, "", "```console", f"$ {command}", *_output(command, path.parent), "```", ""]
        elif line.strip() == _CLOSE:
            if command is None:
                raise FileError(f"{path}: {_CLOSE} without a marker before it; remove it")
            command = None
            lines.append(line)
        elif command is None:
            lines.append(line)
    if command is not None:
        raise FileError(f"{path}: the part of {command!r} has no end; add a line {_CLOSE}")
    new = "\n".join(lines) + "\n"
    if new == text:
        return False
    write_whole(path, new.encode())
    return True


def _output(command: str, folder: Path) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)], capture_output=True, text=True, cwd=folder, check=False
    )
    if run.returncode:
        raise FileError(f"{command} ended with {run.returncode}: {run.stderr.strip() or run.stdout.strip()}")
    return [line.rstrip() for line in run.stdout.rstrip().splitlines()]


if __name__ == "__main__":
    for name in sys.argv[1:] or ["docs/questions.md"]:
        print(f"{name}: {'written' if fill(Path(name)) else 'nothing changed'}")
