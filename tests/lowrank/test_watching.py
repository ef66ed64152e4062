"""Bars over decompositions, and results that are kept."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from karui.lowrank import (
    AsymmetricNonlinear,
    BiclusteredCp,
    LowRankAndSparse,
    LowRankExpansion,
    ProductQuantization,
    SeparableFilters,
)
from karui.lowrank._choice import Choice
from karui.lowrank._scan import scan
from karui.lowrank._watching import Shelf, kept, watched
from karui.model import Model
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


QUICK: dict[str, Any] = {"images": 30, "skip": ("conv1", "linear")}
STEPS = [
    (AsymmetricNonlinear(ratio=0.4, sweeps=2, **QUICK), "_made"),
    (BiclusteredCp(metric="datacov", ranks=(("conv2", 2), ("conv3", 2)), iterations=2, restarts=1, **QUICK), "_build"),
    (LowRankAndSparse(rank=2, density=0.05, sweeps=2, **QUICK), "_summed"),
    (LowRankExpansion(iterations=2, **QUICK), "_made"),
    (ProductQuantization(conv_codewords=8, sweeps=1, turns=1, **QUICK), "_build"),
    (SeparableFilters(method="comb", speedup=1.2, **QUICK), "_made"),
]


@pytest.mark.parametrize(("step", "work"), STEPS, ids=[type(step).__name__ for step, _ in STEPS])
def test_a_killed_fit_goes_on_where_it_was(
    step: Any, work: str, small_cnn: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls, real = small_cnn(widths=(8, 12, 16)), [], getattr(type(step), work)
    data = TensorDataset(torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(60))
    straight = step.apply(model, Bench(train=data))

    def killed(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(type(step), work, killed)
    bench = Bench(train=data, checkpoints=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        step.apply(model, bench)
    light = step.apply(model, bench)
    assert len(calls) == 3, "the first layer was fitted again, or there was no second"
    state = straight.module.state_dict()
    assert {name: value.dtype for name, value in light.module.state_dict().items()} == {
        name: value.dtype for name, value in state.items()
    }
    assert all(torch.equal(value, state[name]) for name, value in light.module.state_dict().items())
    assert light.lineage == straight.lineage
    assert [m.training for m in light.module.modules()] == [m.training for m in straight.module.modules()]
    step.apply(model, Bench(train=data, seed=1, checkpoints=tmp_path))
    assert len(calls) == 5, "another seed is another question"


def test_what_is_kept_takes_mode_and_frozenness_of_the_layer(tmp_path: Path) -> None:
    model = Model(nn.Linear(6, 4).requires_grad_(False).eval(), example=(torch.zeros(1, 6),))
    ((one,), _), shelf = scan(model, lambda _: ""), Shelf(tmp_path, "question")
    made = [shelf.layer(one, lambda: (nn.Linear(6, 4), Choice("", ranks=(2,), remark="as told"))) for _ in range(2)]
    assert made[0][1] == made[1][1]
    assert not made[1][0].training
    assert not any(p.requires_grad for p in made[1][0].parameters())
    other, _ = shelf.layer(one, lambda: (nn.Linear(6, 4), Choice("")), "trained since")
    assert not torch.equal(next(other.parameters()), next(made[0][0].parameters()))
