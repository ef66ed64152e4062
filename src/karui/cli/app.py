"""The application: its commands, and the one place where an error becomes a line on the screen."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from karui.cli import benching, compressing, listing, planning, profiling, screen
from karui.errors import KaruiError

app = typer.Typer(
    name="karui",
    help="Make trained neural networks smaller and, by measurement, faster.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from karui import __version__

        screen.out(f"karui {__version__}")
        raise typer.Exit


FAILED = 3
"""Exit code where something went wrong that no command foresees: not 1, which says that a goal was missed."""


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[  # noqa: ARG001  (typer calls `_version`)
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Make trained neural networks smaller and, by measurement, faster."""
    screen.DEBUG.set(debug)
    if context.invoked_subcommand is None:
        screen.out(context.get_help())
        raise screen.MisuseError("No command was given.", "Start with: karui list")


for group in (listing, profiling, planning, compressing, benching):
    group.register(app)


def run(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code. Every error is one line and its remedy on stderr; `--debug` adds a traceback."""
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="karui", standalone_mode=False)
    except KaruiError as error:
        return screen.complain(error.message, error.hint)
    except screen.ParserError as error:
        return screen.complain(*screen.usage(error))
    except (KeyboardInterrupt, typer.Abort):
        return screen.complain("Stopped.", "compress goes on where it was with --resume.", code=130)
    except BrokenPipeError:
        # The reader (head, less) has gone; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001  (foreign code, a network or a data set, may raise anything)
        told = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".removesuffix(": ").rstrip(".")
        return screen.complain(f"{told}.", _unexpected(error), code=FAILED)
    return code if isinstance(code, int) else 0


def _unexpected(error: Exception) -> str:
    """Where an unforeseen error came from, and how to see more of it."""
    if isinstance(error, OSError):
        return "Check the disk's free space and the permissions; with karui --debug ... the traceback is shown."
    frames = traceback.extract_tb(error.__traceback__)
    place = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    return f"It came up{place}; karui --debug ... shows the whole traceback."
