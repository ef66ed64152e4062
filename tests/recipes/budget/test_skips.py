"""Parts to leave out: which are offered, what they save, and that a choice with them is carried out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from karui.model import Model, coupled_groups, replace_layers
from karui.recipes.budget import timing
from karui.recipes.budget.blocks import Block, blocks_of
from karui.recipes.budget.cache import Measured, TimingCache
from karui.recipes.budget.cells import Cells
from karui.recipes.budget.choice import Problem
from karui.recipes.budget.recorder import ROUNDS, Network, Rounds
from karui.recipes.budget.skips import skips
from karui.recipes.budget.tables import Coster
from karui.recipes.budget.timing import Stopwatch
from karui.sparsify import L1Filters
from karui.technique import Bench, Candidate


class Branch(nn.Module):
    """A residual block; wider on the way out where it is told to be."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(channels, 24, 3, padding=1), nn.Conv2d(24, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        left = self.two(torch.relu(self.one(x)))
        return torch.relu(left + x) if left.shape == x.shape else left


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.plain, self.twice = nn.Conv2d(3, 16, 3, padding=1), Branch(16, 16), Branch(16, 16)
        self.wider, self.head = Branch(16, 32), nn.Sequential(nn.Flatten(), nn.Linear(32 * 16, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wider(self.twice(self.twice(self.plain(self.stem(x))))))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model(Net().eval(), example=(torch.randn(2, 3, 4, 4),))


def test_parts_that_keep_their_shape_and_run_once_are_offered(model: Model):
    offered = list(skips(model))
    assert [candidate.place for candidate in offered] == ["plain"]
    light = offered[0].technique.apply(model, Bench())
    x = torch.randn(3, 3, 4, 4)
    stem, net = model.module.get_submodule("stem"), model.module
    assert torch.equal(light.module(x), net.head(net.wider(net.twice(net.twice(stem(x))))))


def test_what_is_left_out_saves_its_layers_whatever_their_width(model: Model, monkeypatch: pytest.MonkeyPatch):
    """The tables' sum is the time of the network that comes out, with and without a cut inside the part."""
    blocks = [block for found in blocks_of(model, 1).blocks.values() for block in found]
    within = {block.nodes[0].name: np.full(ROUNDS, 1e-9 * block.bytes) for block in blocks}
    whole = sum(block.bytes for block in blocks)

    def profiled(blocks: Mapping[str, Block], threads: int) -> dict[str, Rounds]:
        del threads
        return {name: Rounds(np.full(ROUNDS, 1e-9 * block.bytes)) for name, block in blocks.items()}

    monkeypatch.setattr(timing, "profiled", profiled)
    monkeypatch.setattr(timing, "network", lambda *_: Network(within, np.zeros(ROUNDS)))
    monkeypatch.setattr(timing, "head_to_head", lambda *_: Measured(1.0))
    [skip] = skips(model)
    cut = Candidate(technique=L1Filters(), place="plain.one", text="", cut={"plain.one": torch.arange(8)})
    coster = Coster(Cells(model, coupled_groups(model), Stopwatch(cache=TimingCache()), seconds=1e-9 * whole))
    coster.alone([skip, cut])
    menu = {"layer plain": [skip], "units of plain.one": [cut]}
    problem = Problem(harms={place: [0.0, 1.0] for place in menu}, tables=coster.tables(menu))
    gone = replace_layers(model, {"plain": nn.Identity()})
    saved = 4.0 * (model.parameters - gone.parameters)
    for setting in (0, 1):
        chosen = {"layer plain": 1, "units of plain.one": setting}
        assert problem.total(chosen, "bytes") == pytest.approx(-saved)
        assert problem.total(chosen, "time") == pytest.approx(-1e-9 * saved)
    alone = {"layer plain": 0, "units of plain.one": 1}
    assert problem.total(alone, "bytes") == pytest.approx(-4 * 8 * (9 * 16 + 1 + 9 * 16))
