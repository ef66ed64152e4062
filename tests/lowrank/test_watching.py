"""Bars over decompositions, and results that are kept."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from karui.lowrank._watching import kept, watched
from karui.technique import Bench


def test_a_bar_tells_layer_and_error_on_a_terminal_only() -> None:
    for shown, terminal in ((True, True), (True, False), (False, True)):
        screen = io.StringIO()
        with watched("CP", 2, shown=shown, console=Console(file=screen, force_terminal=terminal, width=120)) as report:
            report(0, "conv1")("alternating", 3, 0.25)
            report(1, "conv2")("least squares", 1, 0.125)
        told = screen.getvalue()
        assert bool(told) == (shown and terminal)
        if told:
            assert "conv2: least squares 1, error 0.1250" in told


def test_results_are_made_once_for_the_same_question(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, Tensor]:
        made.append(1)
        return {"x": torch.arange(3.0)}

    bench = Bench(checkpoints=tmp_path)
    for question in ("a", "a", "b"):
        assert torch.equal(kept(bench, "cp", question, make)["x"], torch.arange(3.0))
    assert len(made) == 2
    kept(Bench(), "cp", "a", make)
    assert len(made) == 3
