"""The application: its commands, and the one place where an error becomes a line on the screen."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from karui.cli import screen
from karui.cli.lazy import Command, LazyGroup
from karui.errors import KaruiError


class Commands(LazyGroup):
    """What karui can do, in the order of the help."""

    COMMANDS: ClassVar[dict[str, Command]] = {
        "list": Command("karui.cli.listing:list_", "The 80 papers of the survey and their techniques.", plain=True),
        "show": Command(
            "karui.cli.listing:show",
            "One card: the paper, when it pays and when not, what was measured, its settings.",
            plain=True,
        ),
        "profile": Command(
            "karui.cli.profiling:profile",
            "Parameters, MACs, bytes, time and memory of a model; a line for each layer.",
        ),
        "plan": Command(
            "karui.cli.planning:plan",
            "Look before anything runs: what can be cut, what cannot and why, what a recipe would gain.",
        ),
        "compress": Command(
            "karui.cli.compressing:compress",
            "Make a trained network lighter, by a recipe or to a budget; measure, verify and save it.",
        ),
        "report": Command("karui.cli.compressing:report", "Write the HTML page of a run, and say where it is."),
        "bench": Command(
            "karui.cli.benching:bench",
            "Compare recipes on one model and data, each over several seeds, against the dense model.",
        ),
    }


app = typer.Typer(
    name="karui",
    cls=Commands,
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
