"""The command `groupnorm`. Here: which commands there are, and how errors look; each has a file of its own.

A command's own imports happen when it runs, so that `groupnorm --help` answers at once. Exit codes: 0 well, 1 a check
found something wrong, 2 the user or the machine has to change something (one line on stderr, never a traceback), 130
interrupted.
"""

import os
import sys
from importlib import import_module, util
from typing import Annotated, Any

import typer

from groupnorm._version import __version__
from groupnorm.errors import GroupNormError

__all__ = ["app", "main"]

_COMMANDS = ("demo", "run", "check", "bench", "info", "roofline", "advise", "style", "compare")
# each is groupnorm.cli.<name>.<name>, in the order of --help

app = typer.Typer(
    name="groupnorm",
    help="Group Normalization for arrays: try it, run it on files, check its promises, measure it.",
    epilog="Example: groupnorm demo",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help and usage errors without boxes: an error is one line
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"groupnorm {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _register() -> None:
    for name in _COMMANDS:
        module = f"{__name__}.{name}"
        if util.find_spec(module) is not None:
            function = getattr(import_module(module), name)
            example = f"Example: {getattr(import_module(module), 'EXAMPLE', f'groupnorm {name} --help')}"
            app.command(name, epilog=example, context_settings={"help_option_names": ["-h", "--help"]})(function)


_register()

# typer may bring its own click, so the base of all usage errors is found through one of them.
_USAGE: type[Any] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line (of this process, or `arguments`) and exit with its code."""
    sys.exit(_exit_code(arguments))


def _exit_code(arguments: list[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what the terminal has no characters for
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(args=arguments, prog_name="groupnorm", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader left, as `groupnorm info | head -1` does
        _give_up_stdout()
        return 0
    except SystemExit as leaving:  # how typer and rich leave when the reader has left
        if not isinstance(leaving.__context__, BrokenPipeError):
            raise
        return 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except GroupNormError as error:
        return _fail(str(error))
    except OSError as error:
        name = f": {error.filename}" if error.filename else ""
        try:
            sys.stdout.flush()
        except OSError:  # a full disk
            _give_up_stdout()
        return _fail(f"{error.strerror or error}{name}")
    except MemoryError as error:
        return _fail(f"not enough memory ({error}); use smaller arrays")
    except Exception as error:
        if isinstance(error, _USAGE):
            return _fail(error.format_message(), hint=True)
        raise  # an error of ours in the program: the traceback is the report
    return code if isinstance(code, int) else 0


def _give_up_stdout() -> None:
    """What is left to be written goes nowhere; Python would complain once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, *, hint: bool = False) -> int:
    line = " ".join(message.split())
    print(f"groupnorm: {line}{' (see groupnorm --help)' if hint else ''}", file=sys.stderr)
    return 2
