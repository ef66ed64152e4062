"""The application: its commands, and the one place where an error becomes a line on the screen."""

from __future__ import annotations

import os
import sys
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
    """Run one command; the exit code. Every error a person can mend is one line and its remedy on stderr."""
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
    return code if isinstance(code, int) else 0
