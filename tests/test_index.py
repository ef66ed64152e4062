"""The catalogue reads from the source what importing it would give."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from karui import index

ENTRIES = index.techniques()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.slug)
def test_card_in_the_source_is_the_card_of_the_class(entry: index.Entry) -> None:
    card = entry.load().card
    told = {f.name: getattr(card, f.name) for f in dataclasses.fields(card)}
    assert {name: told[name] for name in entry.card} == entry.card


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.slug)
def test_every_setting_is_told(entry: index.Entry) -> None:
    fields = [f for f in dataclasses.fields(entry.load()) if f.init]
    assert [s.name for s in entry.settings] == [f.name for f in fields]
    silent = [s.name for s in entry.settings if not s.text]
    assert not silent, f"{entry.path}: the docstring's Settings do not tell of {silent}"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.slug)
def test_every_technique_has_its_test_file(entry: index.Entry) -> None:
    here = Path(__file__).parent / entry.room
    text = "".join(file.read_text(encoding="utf-8") for file in here.glob("test_*.py"))
    assert entry.name in text, f"no test in tests/{entry.room} names {entry.name}"
    assert f"paper({entry.card['survey']})" in text


def test_slugs_are_unique() -> None:
    slugs = [entry.slug for entry in ENTRIES]
    assert len(slugs) == len(set(slugs))


def test_departures_are_read_as_paragraphs() -> None:
    entry = index.Entry(
        room="lowrank",
        module="karui.lowrank.x",
        name="X",
        card={"slug": "x"},
        source='"""Title.\n\nDEPARTURE: one thing\nfor a reason.\n\nMore.\n\nDEPARTURE: another.\n"""\n',
    )
    assert entry.departures == ("one thing for a reason.", "another.")


def test_settings_of_a_docstring() -> None:
    told = index._told(
        "X.\n\nSettings:\n    ratio: share\n        of filters.\n    epochs: passes.\n\nRaises:\n    x: y"
    )
    assert told == {"ratio": "share of filters.", "epochs": "passes."}


def test_defaults_are_told_as_a_person_writes_them() -> None:
    source = "class X:\n    a: float = 0.5\n    b: dict = field(default_factory=dict, hash=False)\n    c: int\n"
    entry = index.Entry(room="lowrank", module="karui.lowrank.x", name="X", card={"slug": "x"}, source=source)
    assert [setting.default for setting in entry.settings] == ["0.5", "{}", ""]


def test_unknown_technique_of_a_room_names_the_known_ones() -> None:
    import karui

    with pytest.raises(AttributeError, match="L1Filters"):
        _ = karui.sparsify.Nonsense


def test_the_index_does_not_import_torch() -> None:
    code = "import sys, karui.index; karui.index.techniques(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
