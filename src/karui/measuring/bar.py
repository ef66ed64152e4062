"""A progress bar over counted work; nothing where it is not wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Moves a bar on."""

    def __call__(self, count: int = 1, text: str = "") -> None:
        """Say that `count` more are done, and what is being done now."""
        ...


@contextmanager
def bar(name: str, total: int, shown: bool) -> Iterator[Advance]:
    """A bar that is gone afterwards; it is given `total` in all.

    Example:
        >>> with bar("evaluate", 3, shown=False) as advance:
        ...     advance(2)
        ...     advance()
    """
    from rich import get_console
    from rich.progress import Progress

    # Where nobody watches, a bar that is gone afterwards would leave an empty line.
    with Progress(disable=not (shown and get_console().is_terminal), transient=True) as screen:
        task = screen.add_task(name, total=total)

        def advance(count: int = 1, text: str = "") -> None:
            screen.update(task, description=f"{name}: {text}" if text else name, advance=count)

        yield advance
