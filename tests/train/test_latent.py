"""Latent weights: what trains is real, what computes is quantised, and afterwards nothing is left of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from karui.errors import SettingError
from karui.model import Classification, Model
from karui.numerics.straight_through import InputGrid, WeightGrid
from karui.train import SGD, Constant, Influence, Moment, Together, Training, fit
from karui.train.latent import Grids, LatentWeights

pytestmark = pytest.mark.paper(38)
DATA = TensorDataset(torch.rand(64, 6, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3)


def network(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return Model(net, example=(torch.zeros(1, 6),), task=Classification())


GRIDS = {"0": Grids(WeightGrid(2), InputGrid(3)), "2": Grids(WeightGrid(1))}


def test_attached_and_taken_off_nothing_has_changed() -> None:
    net = network().module
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.rand(4, 6)
    latent = LatentWeights(GRIDS)
    plain = net(x)
    latent.attach(net)
    assert not torch.allclose(net(x), plain)
    net = latent.finish(net)
    assert torch.equal(net(x), plain)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert list(net.state_dict()) == list(before)
    assert type(net[0]) is nn.Linear  # pyright: ignore
    assert not net[0]._forward_pre_hooks  # pyright: ignore


def test_the_layer_computes_with_quantised_weights_and_inputs() -> None:
    net = nn.Linear(6, 4)
    x = torch.randn(5, 6)
    expected = nn.functional.linear(InputGrid(2)(x), WeightGrid(2)(net.weight), net.bias)
    LatentWeights({"": GRIDS["0"]}).attach(net)
    assert not torch.equal(net(x), expected)  # 3 bits of inputs, not 2
    net = nn.Linear(6, 4)
    expected = nn.functional.linear(InputGrid(2)(x), WeightGrid(2)(net.weight), net.bias).detach()
    LatentWeights({"": Grids(WeightGrid(2), InputGrid(2))}).attach(net)
    assert torch.equal(net(x), expected)
    assert torch.equal(net(input=x), expected)


def test_small_updates_add_up_in_the_latent_weight() -> None:
    net = nn.Linear(1, 2, bias=False)
    net.weight.data = torch.tensor([[-0.5], [1.0]])
    LatentWeights({"": Grids(WeightGrid(1))}).attach(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(700):
        optimizer.zero_grad()
        (-net(torch.ones(1, 1))[0, 0]).backward()
        optimizer.step()
    assert net.weight[0, 0] == 1  # the sign has flipped, by steps that no quantised weight would have felt


def test_a_training_that_was_killed_goes_on(tmp_path: Path) -> None:
    training = Training(epochs=3, batch_size=16, optimizer=SGD(lr=0.1), schedule=Constant(), checkpoint_seconds=0.0)
    whole = fit(network(), DATA, training=training, influence=LatentWeights(GRIDS))

    class Killed(Influence):
        def constraints(self, module: nn.Module, moment: Moment) -> None:
            del module
            if moment.step == 5 and not done:
                done.append(True)
                raise KeyboardInterrupt

    done: list[Any] = []
    both = Together(LatentWeights(GRIDS), Killed())
    with pytest.raises(KeyboardInterrupt):
        fit(network(), DATA, training=training, influence=both, checkpoints=tmp_path)
    again = fit(network(), DATA, training=replace(training), influence=both, checkpoints=tmp_path)
    for a, b in zip(whole.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_layer_without_a_weight_is_refused() -> None:
    with pytest.raises(SettingError, match="'1' \\(ReLU\\) has no weight"):
        LatentWeights({"1": GRIDS["2"]}).attach(network().module)
