"""Completion: what a shell is told for the beginning of a word, and that it is told quickly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from karui.cli import completing
from karui.index import techniques


@pytest.mark.parametrize(
    ("complete", "start", "found"),
    [
        (completing.papers, "tuck", [("tucker2", "Compression of Deep Convolutional Neural Networks for Fast")]),
        (completing.papers, "62", [("62", "Pruning Filters for Efficient ConvNets")]),
        (completing.chapters, "distil", [("distill", "")]),
    ],
)
def test_names_come_with_their_titles(complete: object, start: str, found: list[tuple[str, str]]):
    told = complete(start)  # pyright: ignore[reportCallIssue]
    assert [name for name, _ in told] == [name for name, _ in found]
    assert all(title.startswith(begin) and title for (_, title), (_, begin) in zip(told, found, strict=True))


def test_every_technique_is_offered_for_a_recipe_and_after_a_plus():
    slugs = {entry.slug for entry in techniques()}
    assert slugs <= set(completing.recipes(""))
    assert {f"tucker2:ratio=0.5+{slug}" for slug in slugs} == set(completing.recipes("tucker2:ratio=0.5+"))


def test_settings_are_offered_once():
    assert "tucker2:ratio=" in completing.recipes("tucker2:")
    assert completing.recipes("tucker2:rat") == ["tucker2:ratio="]
    told = completing.recipes("l1_filter_pruning+tucker2:ratio=0.5,")
    assert "l1_filter_pruning+tucker2:ratio=0.5,ranks=" in told
    assert not any(name.endswith(",ratio=") for name in told)


def test_files_of_the_right_kind_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for name in ("net.py", "steps.toml", "samples.npz", ".hidden.py"):
        (tmp_path / name).touch()
    assert completing.models("n") == ["net.py"]
    assert completing.models("resnet11") == ["resnet110"]
    assert ".hidden.py" not in completing.models("")
    assert completing.recipes("ste") == ["steps.toml"]
    assert completing.data("npz:s") == ["npz:samples.npz"]
    assert completing.data("folder:") == ["folder:pictures/"]
    assert completing.data("di") == ["digits"]
    assert completing.models(f"{tmp_path}/p") == [f"{tmp_path}/pictures/"]
    assert completing.models("nowhere/n") == []
    assert completing.tasks("reg") == ["regression"]


def test_a_shell_is_answered_without_torch():
    code = "import sys; from karui.cli import main; sys.exit(main())"
    asked = {"_KARUI_COMPLETE": "complete_bash", "COMP_WORDS": "karui show svd_r", "COMP_CWORD": "2"}
    environment = {**os.environ, **asked, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["svd_restructuring"], done.stderr[-500:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert "torch" not in imported
