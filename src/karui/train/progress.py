"""The progress bar of a training, with a remaining time that is not guessed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

Report = Callable[[int, int, float], None]
REFRESH_SECONDS = 0.1


class Pace:
    """The remaining time of a job of many like steps, from the pace of its last half minute.

    Says nothing (None) until it has seen a second of work: the first steps carry one-time costs.

    Example:
        >>> pace = Pace(steps=10)
        >>> [pace.remaining(done, now) for done, now in ((0, 0.0), (1, 0.5), (4, 2.0), (5, 2.5))]
        [None, None, 3.0, 2.5]
    """

    def __init__(self, steps: int, window: float = 30.0) -> None:
        self.steps = steps
        self.window = window
        self._seen: deque[tuple[float, int]] = deque()

    def remaining(self, done: int, now: float) -> float | None:
        """Seconds left when `done` steps are done at time `now`."""
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] > self.window:
            self._seen.popleft()
        began, before = self._seen[0]
        if now - began < 1.0 or done == before:
            return None
        return (self.steps - done) * (now - began) / (done - before)


def spoken(seconds: float | None) -> str:
    """A remaining time as a person says it.

    Example:
        >>> spoken(None), spoken(4.2), spoken(130), spoken(7400)
        ('', '5 s left', '2 min 10 s left', '2 h 3 min left')
    """
    if seconds is None:
        return ""
    whole = int(-(-seconds // 1))
    if whole < 60:
        return f"{whole} s left"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s left"
    return f"{whole // 3600} h {whole % 3600 // 60} min left"


def _nothing(step: int, epoch: int, loss: float) -> None:
    """What is reported where no person is looking."""
    del step, epoch, loss


@contextmanager
def bar(
    label: str, steps: int, epochs: int, *, shown: bool, done: int = 0, console: Console | None = None
) -> Iterator[Report]:
    """A function `report(step, epoch, loss)` that moves a bar; it does nothing where no person is looking.

    Args:
        label: what is trained.
        steps: number of steps in all.
        epochs: number of epochs in all.
        shown: whether a bar is wanted; it also needs a terminal.
        done: steps that an earlier run has done already.
        console: where to draw; the standard error by default, so that results can be piped.
    """
    console = console or Console(stderr=True)
    if not (shown and console.is_terminal):
        yield _nothing
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}  loss {task.fields[loss]}  {task.fields[left]}"),
    )
    pace, drawn = Pace(steps), 0.0
    pace.remaining(done, time.monotonic())
    with Progress(*columns, console=console, transient=True) as progress:
        line = progress.add_task(label, total=steps, completed=done, epoch=1, epochs=epochs, loss="-", left="")

        def report(step: int, epoch: int, loss: float) -> None:
            nonlocal drawn
            now = time.monotonic()
            if now - drawn < REFRESH_SECONDS and step + 1 < steps:
                return
            drawn = now
            left = spoken(pace.remaining(step + 1, now))
            progress.update(line, completed=step + 1, epoch=epoch + 1, loss=f"{loss:.4f}", left=left)

        yield report
