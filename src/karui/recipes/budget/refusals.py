"""What is left out of a menu because it fails, and why: one technique's mistake does not end a run of hours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from karui.errors import KaruiError
from karui.technique import card_of

if TYPE_CHECKING:
    from karui.technique import Candidate, Technique

SHOWN = 3
"""Places that a note names."""


class Refusals:
    """Candidates that cannot be made, measured or tried.

    A technique is somebody's code, and so are its layers; engines raise classes of their own. So any exception counts,
    but nothing that stops a process. It is told with its class, as it may be a mistake in the technique.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[str, str], list[str]] = {}
        self._out: set[int] = set()

    @contextmanager
    def trying(self, candidate: Candidate) -> Iterator[None]:
        """Leave the candidate out if what is done with it meanwhile fails."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  (it is told; see above)
            self._out.add(id(candidate))
            places = self._places.setdefault((slug_of(candidate.technique), reason(error)), [])
            places.append(f"{candidate.place} ({candidate.text})")

    def left(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those that have not failed."""
        return [candidate for candidate in candidates if id(candidate) not in self._out]

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for each technique and reason."""
        return tuple(
            f"{slug} is left out at {', '.join(places[:SHOWN])}"
            f"{f' and {len(places) - SHOWN} more' if len(places) > SHOWN else ''}: {why}"
            for (slug, why), places in self._places.items()
        )


def reason(error: Exception) -> str:
    """Class and text of an error in one line.

    Example:
        >>> reason(ValueError("no kernel of 3 x 3"))
        'ValueError: no kernel of 3 x 3'
    """
    text = error.message if isinstance(error, KaruiError) else str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def slug_of(technique: Technique) -> str:
    """The name of a technique; of one without a card, that of its class."""
    card = card_of(technique)
    return card.slug if card is not None else type(technique).__name__
