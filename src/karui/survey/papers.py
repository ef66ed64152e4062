"""The catalogue: the papers of the survey, joined with the techniques that the rooms hold.

`papers.json` tells of every paper, with or without a technique; a technique's own card goes before it. Nothing is
imported to read a card, and JSON is read in no time, so that `karui list` answers at once.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from karui.errors import UsageError, did_you_mean, require
from karui.index import Entry, techniques

LISTING = "See what there is with: karui list"
CHAPTERS: dict[str, str] = {
    "architectures": "Fast architectures",
    "lowrank": "Low-rank approximation",
    "distill": "Distillation",
    "quantize": "Binary and low-bit networks",
    "search": "Architecture search",
    "sparsify": "Pruning and sparsity",
    "structured": "Structured matrices",
    "convolution": "Fast convolution",
    "survey": "Surveys",
}


@dataclass(frozen=True, kw_only=True)
class Paper:
    """One paper of the survey: the slugs of the techniques it describes, and how each is expected to work."""

    survey: int
    slugs: tuple[str, ...]
    title: str
    authors: str
    venue: str
    year: int
    chapter: str
    kind: str
    needs: tuple[str, ...]
    gist: str
    arxiv: str | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the catalogue: a technique, or a paper that has none yet (`technique` is None)."""

    survey: int
    slug: str
    title: str
    chapter: str
    kind: str
    needs: tuple[str, ...]
    technique: str | None
    authors: str
    venue: str
    year: int
    arxiv: str | None
    gist: str

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values."""
        return {**asdict(self), "needs": list(self.needs)}


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Which papers have a technique, by survey number."""

    done: tuple[int, ...]
    missing: tuple[int, ...]

    @property
    def share(self) -> str:
        """For a person: "10 of 80 papers"."""
        return f"{len(self.done)} of {len(self.done) + len(self.missing)} papers"


@cache
def papers() -> tuple[Paper, ...]:
    """The papers by survey number."""
    text = Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
    return tuple(
        Paper(**{**values, "slugs": tuple(values["slugs"]), "needs": tuple(values["needs"])})
        for values in json.loads(text)
    )


def catalogue(entries: tuple[Entry, ...] | None = None) -> tuple[Row, ...]:
    """A row for each technique, and one for each paper that has none yet, by survey number.

    Args:
        entries: the techniques; None walks the rooms.

    Example:
        >>> rows = catalogue(entries=())
        >>> len(rows), rows[61].slug, rows[61].technique
        (80, 'l1_filter_pruning', None)
    """
    found = techniques() if entries is None else entries
    rows: list[Row] = []
    for paper in papers():
        mine = [entry for entry in found if entry.card["survey"] == paper.survey]
        rows += [_row(paper, entry) for entry in mine] or [_row(paper, None)]
    return tuple(rows)


def _row(paper: Paper, entry: Entry | None) -> Row:
    card = {} if entry is None else entry.card
    return Row(
        survey=paper.survey,
        slug=card.get("slug", paper.slugs[0]),
        title=paper.title,
        chapter=paper.chapter if entry is None else entry.room,
        kind=card.get("kind", paper.kind),
        needs=tuple(paper.needs if entry is None else card.get("needs", ())),
        technique=None if entry is None else entry.path,
        authors=paper.authors,
        venue=paper.venue,
        year=paper.year,
        arxiv=paper.arxiv,
        gist=paper.gist,
    )


def coverage(entries: tuple[Entry, ...] | None = None) -> Coverage:
    """Which of the papers have a technique.

    Example:
        >>> coverage(entries=()).share
        '0 of 80 papers'
    """
    rows = catalogue(entries)
    done = {row.survey for row in rows if row.technique is not None}
    return Coverage(done=tuple(sorted(done)), missing=tuple(sorted({row.survey for row in rows} - done)))


def find(word: str) -> tuple[Row, ...]:
    """The rows of a slug (as in the catalogue, or of a technique still to come) or of a survey number.

    Raises:
        UsageError: there is none; the message names the closest slugs.

    Example:
        >>> find("25")[0].slug
        'svd_softmax'
    """
    rows = catalogue()
    numbers = {slug: paper.survey for paper in papers() for slug in paper.slugs}
    numbers |= {row.slug: row.survey for row in rows} | {str(row.survey): row.survey for row in rows}
    if word.isdecimal():
        require(word in numbers, f"There is no paper {word}.", "The survey's papers are numbered 1 to 80.", UsageError)
    if word not in numbers:
        did_you_mean(word, [*numbers], "Technique or survey number", listing=LISTING)
    return tuple(row for row in rows if row.slug == word) or tuple(row for row in rows if row.survey == numbers[word])


def find_technique(slug: str) -> Entry:
    """The technique of a slug, read from its source and not imported.

    Raises:
        UsageError: there is no such technique, or its paper has none yet; the message names the closest slugs.
    """
    known = {entry.slug: entry for entry in techniques()}
    planned = {name: paper for paper in papers() for name in paper.slugs}
    if slug not in known and slug in planned:
        raise UsageError(f"Paper {planned[slug].survey} ('{slug}') has no technique yet.", LISTING)
    if slug not in known:
        did_you_mean(slug, [*known], "Technique", listing=LISTING)
    return known[slug]
