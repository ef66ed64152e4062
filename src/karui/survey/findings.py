"""What the benchmarks found of each technique, in a line each.

A benchmark keeps these lines beside its values in `results/NAME.json`. An installed package has no such folder, so
`python -m karui.survey.docs --write` gathers them in `findings.json`, which `karui show` reads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from karui.errors import UsageError, did_you_mean

RESULTS = Path("results")
KEPT = Path("src") / "karui" / "survey" / "findings.json"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One finding: the line, and the page of the checkout that has the whole table, with the machine."""

    text: str
    source: str


Findings = dict[str, tuple[Finding, ...]]


def gathered(root: Path, slugs: tuple[str, ...]) -> Findings:
    """The lines of all results of a checkout, by technique.

    Args:
        root: the checkout.
        slugs: the techniques that there are.

    Raises:
        UsageError: a file of results is no JSON, or tells of a technique that is not there.
    """
    found: dict[str, list[Finding]] = {slug: [] for slug in slugs}
    for file in sorted((root / RESULTS).glob("*.json")):
        source = (RESULTS / file.with_suffix(".md").name).as_posix()
        for slug, lines in _lines(file).items():
            if slug not in found:
                did_you_mean(slug, list(slugs), f"The technique of {file.name}")
            found[slug] += [Finding(text=line, source=source) for line in lines]
    return {slug: tuple(lines) for slug, lines in found.items() if lines}


def _lines(file: Path) -> dict[str, list[str]]:
    try:
        told: Any = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UsageError(f"{file} is no JSON: {error}.", "Run its benchmark again: make bench ONLY=NAME") from error
    return told.get("measured", {}) if isinstance(told, dict) else {}


def written(findings: Findings) -> str:
    """The content of `findings.json`."""
    told = {slug: [{"text": line.text, "source": line.source} for line in findings[slug]] for slug in sorted(findings)}
    return json.dumps(told, indent=1, ensure_ascii=False) + "\n"


@cache
def measured(slug: str) -> tuple[Finding, ...]:
    """What was measured of a technique, as shipped with the package; empty where nothing is kept.

    Example:
        >>> measured("lottery_ticket")[0].source
        'results/lottery_ticket.md'
    """
    text = Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
    return tuple(Finding(**line) for line in json.loads(text).get(slug, ()))
