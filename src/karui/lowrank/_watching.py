"""Decompositions that take a while: a bar that tells how they fare, and results that outlive a killed run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from karui.lowrank._choice import Choice
from karui.lowrank._scan import Seen
from karui.model import build_layer, describe_layer
from karui.train.checkpoint import read, write
from karui.train.fingerprint import fingerprint

if TYPE_CHECKING:
    from karui.model import Model
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


Made = tuple[nn.Module, Choice]
"""A layer that takes the place of another, and what was done."""


@dataclass(frozen=True)
class Shelf:
    """Fitted layers that outlive a killed run: a repeated one takes them from the folder of checkpoints.

    Settings:
        folder: where they are kept; None keeps none.
        question: a fingerprint of all that decides them.
    """

    folder: Path | None
    question: str = ""

    @classmethod
    def of(cls, technique: Any, model: Model, bench: Bench) -> Shelf:
        """The shelf for this technique, model, data and seed; a training that follows the fit decides nothing."""
        if bench.checkpoints is None:
            return cls(None)
        fit = replace(technique, epochs=0, learning_rate=None) if hasattr(technique, "epochs") else technique
        return cls(bench.checkpoints, fingerprint(fit, model, bench.train, bench.seed))

    def layer(self, one: Seen, make: Callable[[], Made], *more: Any) -> Made:
        """The layer that `make` gives in place of one, or as it was kept.

        Args:
            one: the layer that is replaced; what is kept takes its device, mode and frozenness.
            make: the work.
            more: what decides the layer beside the question, as a network that has been trained since.
        """
        if self.folder is None:
            return make()
        file = self.folder / f"layer-{fingerprint(self.question, one.path, more)}.safetensors"
        if not file.is_file():
            layer, choice = make()
            write(file, layer.state_dict(), {"layer": describe_layer(layer), "choice": asdict(choice)})
            return layer, choice
        tensors, told = read(file)
        layer = build_layer(*told["layer"])
        layer.load_state_dict(tensors, assign=True)
        layer.to(one.layer.weight.device).requires_grad_(one.layer.weight.requires_grad).train(one.layer.training)
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in told["choice"].items()
        }
        return layer, Choice(**values)
