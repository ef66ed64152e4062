"""The catalogue: complete, consistent with the cards, and read without torch."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest

from karui.errors import UsageError
from karui.index import ROOMS, Entry, techniques
from karui.survey import CHAPTERS, catalogue, coverage, find, find_technique
from karui.survey.papers import papers

SPANS = {
    "architectures": (1, 10),
    "lowrank": (11, 29),
    "distill": (30, 41),
    "quantize": (42, 44),
    "search": (45, 51),
    "sparsify": (52, 71),
    "structured": (72, 75),
    "convolution": (76, 78),
    "survey": (79, 80),
}


def entry(survey: int, slug: str, room: str = "sparsify", **card: object) -> Entry:
    values = {"survey": survey, "slug": slug, "title": "t", "kind": "cut", **card}
    return Entry(room=room, module=f"karui.{room}.x", name="X", card=values, source="")


def test_eighty_papers_each_once():
    assert [paper.survey for paper in papers()] == list(range(1, 81))
    slugs = [slug for paper in papers() for slug in paper.slugs]
    assert len(slugs) == len(set(slugs)) == 84
    assert find("svd_softmax")[0].survey == 25
    assert find("group_brain_damage")[0].survey == 26


def test_papers_use_the_words_of_the_card():
    from karui.technique import card

    for paper in papers():
        assert paper.kind in card.KINDS
        assert set(paper.needs) <= set(get_args(card.Need))
        assert SPANS[paper.chapter][0] <= paper.survey <= SPANS[paper.chapter][1]
        assert paper.gist.endswith(".")
        assert 1980 < paper.year < 2020
    assert list(CHAPTERS) == list(ROOMS) == list(SPANS)


def test_rows_tell_what_the_specification_asks():
    for row in catalogue():
        values = row.to_json()
        assert isinstance(values["survey"], int)
        assert isinstance(values["needs"], list)
        assert {"survey", "slug", "title", "chapter", "kind", "needs", "technique"} <= set(values)


def test_a_technique_takes_its_papers_row():
    rows = catalogue((entry(18, "biclustered_cp", "lowrank"), entry(18, "monochromatic", "lowrank", needs=("labels",))))
    mine = [(row.slug, row.needs, row.technique) for row in rows if row.survey == 18]
    assert mine == [
        ("biclustered_cp", (), "karui.lowrank.x:X"),
        ("monochromatic", ("labels",), "karui.lowrank.x:X"),
    ]
    assert len(rows) == 81
    assert coverage((entry(18, "monochromatic"),)).done == (18,)
    assert len(coverage((entry(18, "monochromatic"),)).missing) == 79


def test_techniques_lie_in_their_papers_chapter():
    by_number = {paper.survey: paper for paper in papers()}
    for found in techniques():
        paper = by_number[found.card["survey"]]
        second = found.slug.startswith(tuple(f"{slug}_" for slug in paper.slugs))  # a second technique of one paper
        assert found.slug in paper.slugs or second, found.path
        assert found.room == paper.chapter, found.path
        assert found.card["title"] == paper.title, found.path


def test_find_takes_slugs_of_papers_still_to_come():
    assert {row.survey for row in find("biclustered_svd")} == {18}
    assert find("7")[0].slug == "wide_resnet"


@pytest.mark.parametrize(
    ("word", "hint"),
    [("l1_filter_prunning", "l1_filter_pruning"), ("81", "1 to 80"), ("0", "1 to 80"), ("²", "karui list")],
)
def test_find_names_the_closest(word: str, hint: str):
    with pytest.raises(UsageError) as caught:
        find(word)
    assert hint in caught.value.hint


def test_find_technique_tells_a_typo_from_a_paper_without_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("karui.survey.papers.techniques", lambda: (entry(62, "l1_filter_pruning"),))
    assert find_technique("l1_filter_pruning").name == "X"
    with pytest.raises(UsageError, match=r"Paper 17 .* has no technique yet"):
        find_technique("cp_decomposition")
    with pytest.raises(UsageError, match="Did you mean l1_filter_pruning"):
        find_technique("l1_filter_prunning")


def test_the_catalogue_does_not_import_torch():
    code = "import sys, karui.survey as s; s.catalogue(); s.find('62'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
