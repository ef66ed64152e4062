"""Decompositions that take a while: a bar that tells how they fare, and results that outlive a killed run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from karui.train.checkpoint import read, write
from karui.train.fingerprint import fingerprint

if TYPE_CHECKING:
    from karui.numerics.cp import Watch
    from karui.technique import Bench

Report = Callable[[int, str], "Watch"]
"""Called with the number of layers done and the name of the next; gives what its solver reports to."""


@contextmanager
def watched(text: str, layers: int, *, shown: bool, console: Console | None = None) -> Iterator[Report]:
    """A bar over layers that tells each step of the solver at work; silent where no person is looking.

    Args:
        text: what is done to the layers.
        layers: how many there are.
        shown: whether a bar is wanted; it also needs a terminal.
        console: where to draw; the standard error by default, so that results can be piped.
    """
    console = console or Console(stderr=True)
    if not (shown and console.is_terminal):
        yield _unheard
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        line = progress.add_task(text, total=layers)

        def report(done: int, name: str) -> Watch:
            def told(solver: str, step: int, error: float) -> None:
                progress.update(line, description=f"{text} {name}: {solver} {step}, error {error:.4f}")

            progress.update(line, completed=done, description=f"{text} {name}")
            return told

        yield report


def _unheard(done: int, name: str) -> Watch:
    del done, name
    return _silent


def _silent(solver: str, step: int, error: float) -> None:
    """What is reported where no person is looking."""
    del solver, step, error


def kept(bench: Bench, label: str, decisive: Any, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors that `make` gives, from the bench's folder of checkpoints if an earlier run has left them there.

    Args:
        bench: where its `checkpoints` is None nothing is kept.
        label: begins the file's name.
        decisive: all that decides the result; the name holds its fingerprint.
        make: the work.
    """
    if bench.checkpoints is None:
        return make()
    file = bench.checkpoints / f"{label}-{fingerprint(label, decisive)}.safetensors"
    if not file.is_file():
        write(file, make(), {"label": label})
    return read(file)[0]
