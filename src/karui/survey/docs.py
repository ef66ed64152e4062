"""What is generated from cards and results: `python -m karui.survey.docs --write | --check`.

The README's table, the catalogue page, and what was measured of each technique, as the package carries it.

What is generated stands in the README between two HTML comments; the rest of that page is written by people.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from karui.errors import UsageError, require
from karui.index import Entry, Setting, techniques
from karui.survey.findings import KEPT, Findings, gathered, written
from karui.survey.papers import CHAPTERS, Row, catalogue, coverage

START, END = "<!-- catalogue -->", "<!-- /catalogue -->"
PAGE = Path("docs") / "catalogue.md"
README = Path("README.md")


def table(rows: tuple[Row, ...]) -> str:
    """The README's table: a line for each row, by chapter."""
    done = {row.survey for row in rows if row.technique}
    total = {row.survey for row in rows}
    lines = [f"{len(done)} of the {len(total)} papers have a technique.", ""]
    for chapter, title in CHAPTERS.items():
        lines += [f"**{title}** (`{chapter}`)", "", "| no. | paper | technique |", "| ---: | --- | --- |"]
        lines += [f"| {row.survey} | {_paper(row)} | {_technique(row)} |" for row in rows if row.chapter == chapter]
        lines.append("")
    return "\n".join(lines).rstrip()


def _paper(row: Row) -> str:
    title = f"[{row.title}](https://arxiv.org/abs/{row.arxiv})" if row.arxiv else row.title
    return f"{title} ({row.year})"


def _technique(row: Row) -> str:
    return f"[`{row.slug}`](docs/catalogue.md#{row.slug})" if row.technique else "not yet"


def page(rows: tuple[Row, ...], entries: tuple[Entry, ...], findings: Findings) -> str:
    """The catalogue page: every technique with its card, results and settings; then what is still to come."""
    known = {entry.path: entry for entry in entries}
    lines = ["# Catalogue", "", "Generated from the cards by `python -m karui.survey.docs --write`.", ""]
    lines += [f"{coverage(entries).share} have a technique.", ""]
    for chapter, title in CHAPTERS.items():
        mine = [row for row in rows if row.chapter == chapter]
        lines += [f"## {title}", ""]
        for row in mine:
            if row.technique:
                lines += _section(row, known[row.technique], findings)
        missing = [f"{row.survey} {row.title}" for row in mine if not row.technique]
        lines += ["Not yet: " + "; ".join(missing) + ".", ""] if missing else []
    return "\n".join(lines).rstrip() + "\n"


def _section(row: Row, entry: Entry, findings: Findings) -> list[str]:
    card = entry.card
    lines = [f"### {row.slug}", "", f"{row.survey}. {row.authors}: {_paper(row)}. {row.gist}", ""]
    facts = {
        "class": f"`{row.technique}`",
        "kind": row.kind,
        "needs": ", ".join(row.needs) or "nothing beside the model",
        "reduces": ", ".join(card.get("reduces", ())),
        "pays": card.get("pays", ""),
        "does not pay": card.get("costs", ""),
    }
    lines += [f"- {name}: {text}" for name, text in facts.items() if text]
    lines += [f"- departs from the paper: {text}" for text in entry.departures]
    lines += [f"- measured: {line.text} ([table](../{line.source}))" for line in findings.get(row.slug, ())]
    lines += ["", *_settings(entry.settings), ""] if entry.settings else [""]
    return lines


def _settings(settings: tuple[Setting, ...]) -> list[str]:
    head = ["| setting | type | default | what |", "| --- | --- | --- | --- |"]
    cells = [(f"`{s.name}`", f"`{s.type}`", f"`{s.default}`" if s.default else "", s.text) for s in settings]
    return head + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


def fill(text: str, generated: str) -> str:
    """`text` with the part between the two marks replaced.

    Raises:
        UsageError: the marks are missing.

    Example:
        >>> fill("a <!-- catalogue -->old<!-- /catalogue --> b", "new").splitlines()
        ['a <!-- catalogue -->', 'new', '<!-- /catalogue --> b']
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    require(
        bool(start and end),
        f"{README} has no part for the catalogue.",
        f"Put the two lines {START} and {END} where the table belongs.",
        UsageError,
    )
    return f"{before}{START}\n{generated}\n{END}{after}"


def wanted(root: Path) -> dict[Path, str]:
    """What each generated file should hold.

    Raises:
        UsageError: the README is missing, or its marks are.
    """
    readme = root / README
    require(readme.is_file(), f"There is no {readme}.", "Run this in the checkout, or give --root.", UsageError)
    rows, entries = catalogue(), techniques()
    filled = fill(readme.read_text(encoding="utf-8"), table(rows))
    findings = gathered(root, tuple(entry.slug for entry in entries))
    return {readme: filled, root / PAGE: page(rows, entries, findings), root / KEPT: written(findings)}


def stale(root: Path) -> list[Path]:
    """The generated files that do not hold what the cards say."""
    return [
        path for path, text in wanted(root).items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def write(root: Path) -> list[Path]:
    """Bring the generated files up to date; returns those that changed."""
    changed = stale(root)
    for path, text in wanted(root).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return changed


def main(arguments: list[str] | None = None) -> int:
    """Write or check; 0 when current, 1 when `--check` finds a stale file, 2 on wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m karui.survey.docs", description=__doc__)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument(
        "--write", action="store_true", help="bring README.md, docs/catalogue.md and findings.json up to date"
    )
    choice.add_argument("--check", action="store_true", help="fail where they are not")
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout (default: this folder)")
    asked = parser.parse_args(arguments)
    try:
        files = write(asked.root) if asked.write else stale(asked.root)
    except UsageError as error:
        sys.stderr.write(f"error: {error.message}\nhint: {error.hint}\n")
        return 2
    for path in files:
        sys.stderr.write(f"{'written' if asked.write else 'stale'}: {path}\n")
    if asked.check and files:
        sys.stderr.write("hint: run python -m karui.survey.docs --write\n")
    return 1 if asked.check and files else 0


if __name__ == "__main__":
    raise SystemExit(main())
