"""The generated table and page: complete, current, and kind where the marks are missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from karui.index import Entry
from karui.survey import catalogue
from karui.survey.docs import END, PAGE, START, main, page, stale, table, write
from karui.survey.findings import KEPT, Finding

ROOT = Path(__file__).parents[2]
SOURCE = '''"""DEPARTURE: we score groups.

More.
"""

class L1Filters:
    """Cut.

    Settings:
        ratio: share cut
    """

    ratio: float | None = 0.3
'''
CUT = Entry(
    room="sparsify",
    module="karui.sparsify.l1_filters",
    name="L1Filters",
    card={"survey": 62, "slug": "l1_filter_pruning", "title": "t", "kind": "cut", "pays": "Wide layers."},
    source=SOURCE,
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(f"# karui\n\n{START}\n{END}\n\nEnd.\n")
    return tmp_path


def test_table_has_every_paper_and_links_the_techniques():
    text = table(catalogue((CUT,)))
    assert text.startswith("1 of the 80 papers have a technique.")
    assert sum(line.startswith("| ") and not line.startswith(("| no.", "| ---")) for line in text.splitlines()) == 80
    assert "[`l1_filter_pruning`](docs/catalogue.md#l1_filter_pruning)" in text


def test_page_tells_the_card():
    found = {"l1_filter_pruning": (Finding(text="twice as fast", source="results/one.md"),)}
    text = page(catalogue((CUT,)), (CUT,), found)
    for words in (
        "### l1_filter_pruning",
        "pays: Wide layers.",
        "departs from the paper: we score groups.",
        "measured: twice as fast ([table](../results/one.md))",
    ):
        assert words in text
    assert "| `ratio` | `float \\| None` | `0.3` | share cut |" in text


def test_write_then_check(checkout: Path):
    assert main(["--check", "--root", str(checkout)]) == 1
    assert {path.name for path in write(checkout)} == {"README.md", PAGE.name, KEPT.name}
    assert main(["--check", "--root", str(checkout)]) == 0
    assert write(checkout) == []
    readme = checkout / "README.md"
    assert readme.read_text().startswith("# karui\n")
    assert readme.read_text().endswith(f"{END}\n\nEnd.\n")
    readme.write_text(readme.read_text().replace("| 62 |", "| 63 |"))
    assert [path.name for path in stale(checkout)] == ["README.md"]


def test_missing_marks_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--check", "--root", str(tmp_path)]) == 2
    (tmp_path / "README.md").write_text("# karui\n")
    assert main(["--check", "--root", str(tmp_path)]) == 2
    assert START in capsys.readouterr().err


@pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="runs in a checkout with its README")
def test_the_projects_own_pages_are_current():
    assert stale(ROOT) == [], "run python -m karui.survey.docs --write"
