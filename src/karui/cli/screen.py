"""What a person sees: results on stdout, everything else on stderr, and numbers as people read them."""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TextIO

import typer

from karui.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

DEBUG: ContextVar[bool] = ContextVar("debug", default=False)
WIDTH = 80
_RESULTS: ContextVar[TextIO | None] = ContextVar("results", default=None)
# typer carries its own copy of click since 0.2x and used the package before: the class is reached through typer's.
ParserError: type[Exception] = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


class MisuseError(UsageError):
    """The command line itself was used wrongly."""


@contextmanager
def results_alone() -> Iterator[None]:
    """Whatever is printed by others goes to stderr: a network or a data set is foreign code, and JSON may be due."""
    before = _RESULTS.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _RESULTS.reset(before)


def _results() -> TextIO:
    """Where results go: stdout, also while prints of others are led elsewhere."""
    return _RESULTS.get() or sys.stdout


def out(text: str) -> None:
    """A line of the result."""
    _results().write(f"{text}\n")


def say(text: str) -> None:
    """A line about the work, which is not part of the result."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def out_json(value: Any) -> None:
    """The result as JSON; stdout then holds nothing else."""
    out(json.dumps(value, indent=2, ensure_ascii=False))


def progress_to_stderr() -> None:
    """Bars and all else that rich shows on its own go to stderr: stdout is for results."""
    import rich

    rich.reconfigure(stderr=True)


def watched() -> bool:
    """Whether a person sees bars move: not where stderr is a file or a pipe."""
    return sys.stderr.isatty()


def complain(message: str, hint: str = "", code: int = 2) -> int:
    """Tell an error, and its traceback where `--debug` asks for it; the exit code."""
    if DEBUG.get() and sys.exc_info()[0] is not None:
        traceback.print_exc()
    say(f"error: {' '.join(message.split())}")
    if hint:
        say(f"hint: {' '.join(hint.split())}")
    return code


def usage(error: Any) -> tuple[str, str]:
    """Message and remedy of an error of the command line's parser."""
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "karui"
    message = error.format_message()
    return (message if message.endswith((".", "?")) else f"{message}."), f"See: {where} --help"


def width() -> int:
    """Columns of the terminal; 80 where there is none."""
    return shutil.get_terminal_size((WIDTH, 24)).columns if _results().isatty() else WIDTH


def show(table: Table) -> None:
    """Print a table: as wide as a terminal is, and 80 columns where there is none."""
    from rich.console import Console

    console = Console(file=_results())
    if not console.is_terminal:
        console = Console(file=_results(), width=WIDTH, color_system=None)
    console.print(table)


def table(*columns: str, title: str | None = None, right: tuple[str, ...] = (), wrap: tuple[str, ...] = ()) -> Table:
    """A table of the house: light lines; numbers to the right; a long text is cut unless its column may wrap."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, title_style="bold")
    for name in columns:
        made.add_column(
            name,
            justify="right" if name in right else "left",
            overflow="fold" if name in wrap else "ellipsis",
            no_wrap=name not in wrap,
        )
    return made


def where(engine: str, batch: int, threads: int) -> str:
    """How a time was taken.

    Example:
        >>> where("onnxruntime", 1, 2)
        'time, onnxruntime, batch 1, 2 threads'
    """
    return f"time, {engine}, batch {batch}, {threads} thread{'' if threads == 1 else 's'}"
