"""`karui list` and `karui show`: the catalogue, read without importing a technique."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from karui.cli import completing, screen
from karui.cli.options import JSON
from karui.errors import did_you_mean
from karui.index import KINDS
from karui.survey import CHAPTERS, Row, catalogue, coverage, find, find_technique, measured

if TYPE_CHECKING:
    from karui.index import Entry


def list_(
    chapter: Annotated[
        str | None,
        typer.Option(
            "--chapter",
            "-c",
            autocompletion=completing.chapters,
            help=f"One chapter only: {', '.join(CHAPTERS)}.",
        ),
    ] = None,
    json: JSON = False,
) -> None:
    """The 80 papers of the survey and their techniques."""
    if chapter is not None and chapter not in CHAPTERS:
        did_you_mean(chapter, list(CHAPTERS), "Chapter")
    rows = [row for row in catalogue() if chapter in (None, row.chapter)]
    if json:
        screen.out_json([row.to_json() for row in rows])
        return
    width = screen.width()
    for name, title in CHAPTERS.items():
        mine = [row for row in rows if row.chapter == name]
        if mine:
            screen.out(f"{title} ({name})")
            for row in mine:
                screen.out(_line(row, width))
            screen.out("")
    screen.out(f"{coverage().share} have a technique. More on one: karui show SLUG (or its number)")


def _line(row: Row, width: int) -> str:
    # Plain text: rich would take longer to load and to lay out nine tables than all else together.
    line = f"{row.survey:4}  {row.slug if row.technique else '(not yet)':29}  {row.title}"
    return line if len(line) <= width else f"{line[: width - 1]}…"


def show(
    slug: Annotated[
        str,
        typer.Argument(
            help="A technique's slug, or a paper's number.", metavar="SLUG|NUMBER", autocompletion=completing.papers
        ),
    ],
    json: JSON = False,
) -> None:
    """One card: the paper, when it pays and when not, what was measured, its settings."""
    rows = find(slug)
    told = [_told(row) for row in rows]
    if json:
        screen.out_json(told if len(told) > 1 else told[0])
        return
    for row in rows:
        _print(row, find_technique(row.slug) if row.technique else None)


def _told(row: Row) -> dict[str, Any]:
    if row.technique is None:
        return row.to_json()
    entry = find_technique(row.slug)
    names = ("reduces", "exact", "pays", "costs", "identity")
    return {
        **row.to_json(),
        **{name: entry.card[name] for name in names if name in entry.card},
        "text": entry.text,
        "departures": list(entry.departures),
        "measured": [{"text": line.text, "source": line.source} for line in measured(entry.slug)],
        "settings": [{"name": s.name, "type": s.type, "default": s.default, "text": s.text} for s in entry.settings],
    }


def _print(row: Row, entry: Entry | None) -> None:
    card = {} if entry is None else entry.card
    where = f", arxiv.org/abs/{row.arxiv}" if row.arxiv else ""
    facts = {
        "paper": f"{row.authors}: {row.title}. {row.venue} {row.year}{where}",
        "in short": row.gist,
        "chapter": f"{CHAPTERS[row.chapter]} ({row.chapter})",
        "how": KINDS[row.kind],
        "needs": ", ".join(row.needs) or "nothing beside the model",
        "reduces": ", ".join(card.get("reduces", ())),
        "pays": card.get("pays", ""),
        "does not pay": card.get("costs", ""),
        "measured": "" if entry is None else _measured(entry),
        "departs": " / ".join(entry.departures) if entry else "",
        "class": row.technique or "There is no technique for this paper yet.",
    }
    from rich.markup import escape

    made = screen.table("", "", title=f"{row.survey}. {row.slug}", wrap=("",))
    made.show_header = False
    made.columns[0].no_wrap = True
    for name, text in facts.items():
        if text:
            made.add_row(name, escape(text))
    screen.show(made)
    if entry is not None:
        _print_settings(entry)


def _measured(entry: Entry) -> str:
    lines = measured(entry.slug)
    told = [f"- {line.text}" for line in lines]
    pages = dict.fromkeys(line.source for line in lines)
    return "\n".join((*told, f"(tables and machine: {', '.join(pages)})")) if told else "nothing yet"


def _print_settings(entry: Entry) -> None:
    made = screen.table("setting", "type", "default", "what", title="Settings", wrap=("type", "default", "what"))
    for setting in entry.settings:
        made.add_row(setting.name, setting.type, setting.default, setting.text)
    screen.show(made)
    example = next(
        (f":{s.name}={s.default}" for s in entry.settings if "float" in s.type and s.default[:1].isdigit()), ""
    )
    command = f"  karui compress MODEL -d DATA -o DIR -r {entry.slug}"
    # A command cannot be broken into lines: the example of a setting goes where it would not fit.
    screen.out(f"Use it:\n{command}{example if len(command + example) <= screen.width() else ''}")
