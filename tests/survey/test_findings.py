"""What was measured gets from `results/` into the package, and is worded by the benchmarks as they stand."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from karui.errors import UsageError
from karui.index import techniques
from karui.survey import measured
from karui.survey.findings import RESULTS, Finding, gathered, written

ROOT = Path(__file__).parents[2]
SLUGS = tuple(entry.slug for entry in techniques())


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / RESULTS).mkdir()
    return tmp_path


def keep(checkout: Path, name: str, told: object) -> None:
    (checkout / RESULTS / f"{name}.json").write_text(json.dumps(told))


def test_lines_are_gathered_by_technique(checkout: Path) -> None:
    keep(checkout, "b", {"measured": {"tucker2": ["second"], "mobilenet": ["third"]}})
    keep(checkout, "a", {"machine": "x", "measured": {"tucker2": ["first"]}})
    keep(checkout, "c", [{"model": "of another shape"}])
    found = gathered(checkout, SLUGS)
    assert found == {
        "mobilenet": (Finding(text="third", source="results/b.md"),),
        "tucker2": (
            Finding(text="first", source="results/a.md"),
            Finding(text="second", source="results/b.md"),
        ),
    }
    assert list(json.loads(written(found))) == ["mobilenet", "tucker2"]


def test_results_that_cannot_be_read_are_told(checkout: Path) -> None:
    keep(checkout, "a", {"measured": {"tucker": ["first"]}})
    with pytest.raises(UsageError, match=r"technique of a.json 'tucker' is not known") as told:
        gathered(checkout, SLUGS)
    assert "tucker2" in told.value.hint
    (checkout / RESULTS / "a.json").write_text("{")
    with pytest.raises(UsageError, match="is no JSON"):
        gathered(checkout, SLUGS)


def test_the_package_carries_what_was_measured() -> None:
    assert measured("no such technique") == ()
    lines = measured("iterative_magnitude_pruning")
    assert any("78.69 %" in line.text and "1.22x slower" in line.text for line in lines)
    assert any(line.text.startswith("not shown:") for line in lines)


@pytest.mark.skipif(not (ROOT / RESULTS).is_dir(), reason="runs in a checkout with its results")
def test_sources_are_pages_of_the_checkout() -> None:
    for slug in SLUGS:
        for line in measured(slug):
            assert (ROOT / line.source).is_file(), line.source


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="runs in a checkout with its benchmarks")
def test_the_lines_are_those_that_the_benchmarks_word_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("run_benchmarks", ROOT / "benchmarks" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    runner = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "run_benchmarks", runner)
    spec.loader.exec_module(runner)
    stale = [file.name for file, text in runner.digests().items() if file.read_text("utf-8") != text]
    assert stale == [], "run python benchmarks/run.py --digest, then python -m karui.survey.docs --write"
