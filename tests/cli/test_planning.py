"""`karui plan`: what can be cut, what cannot and why, and each step of a recipe, before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from karui.cli.app import run


def test_plan_of_a_model(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["plan", "net.py:net", "--input", "1x8x8"]) == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    assert "can be cut" in told
    assert "cannot be cut" in told
    assert "output" in told


def test_plan_of_a_recipe_predicts_the_cut(folder: Path, capsys: pytest.CaptureFixture[str]):
    command = [
        "plan",
        "net.py:net",
        "--data",
        "digits",
        "--recipe",
        "l1_filter_pruning:ratio=0.5+knowledge_distillation",
    ]
    assert run([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    first, second = told["steps"]
    assert told["parameters"] == 80 + 16 + 584 + 730
    assert first["parameters"] == 40 + 8 + 148 + 370
    assert first["macs"] < told["macs"]
    assert second["parameters"] is None
    assert {group["name"] for group in told["groups"]} == {"0", "3"}
    assert {row["name"] for row in told["locked"]} == {"6"}
    apart = [*command[:-1], "l1_filter_pruning:ratio=0.5", "-r", "knowledge_distillation", "--json"]
    assert run(apart) == 0
    assert json.loads(capsys.readouterr().out) == told
    assert run(command) == 0
    shown = capsys.readouterr().out
    for words in ("as it is", "1. l1_filter_pruning", "2. knowledge_distillation", "ready"):
        assert words in shown


def test_what_a_recipe_lacks_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["plan", "net.py:net", "--input", "1x8x8", "--recipe", "l1_filter_pruning"]) == 2
    told = capsys.readouterr()
    assert "REFUSED" in told.out
    assert told.err.splitlines()[0].startswith("error: Step 1: 'l1_filter_pruning' needs training data.")


def test_a_model_that_cannot_be_captured(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["plan", "net.py:wordy", "--input", "1x8x8"]) == 0
    assert "cannot be captured" in capsys.readouterr().out
    assert run(["plan", "net.py:wordy", "--input", "1x8x8", "--recipe", "l1_filter_pruning:epochs=0"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2
    assert "Step 1: 'l1_filter_pruning' cuts the graph" in err[0]


def test_a_typo_is_told_before_the_model_is_opened(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["plan", "nowhere.py:net", "--recipe", "l1_filter_prunning"]) == 2
    assert "Did you mean l1_filter_pruning" in capsys.readouterr().err


def test_what_a_step_leaves_whole_is_told_once_and_what_is_for_one_size_is_marked(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["plan", "net.py:grouped", "--input", "1x8x8", "-r", "l1_filter_pruning:ratio=0.5,tied=true,epochs=0"]
    assert run([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (step,) = told["steps"]
    names = [remark.partition(": ")[0] for remark in step["remarks"]]
    assert len(names) == len(set(names))
    whole = [remark for remark in step["remarks"] if "cannot be proved" in remark]
    assert whole
    assert not any("cut " in remark.partition("left whole")[0] for remark in whole)
    confirmed = {group["name"]: group["graph_form"] for group in told["groups"]}
    cut = {remark.partition(": ")[0] for remark in step["remarks"] if " units, cut " in remark}
    assert cut <= set(confirmed)
    assert any(confirmed.values())
    assert run(command) == 0
    assert "only for inputs of this size" in capsys.readouterr().out
