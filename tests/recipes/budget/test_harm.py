"""Harms: what is put right by normalisations that see what comes to them now does not count."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from karui.model import Classification, Model
from karui.recipes.budget import harm
from karui.recipes.budget.harm import harms, seen_anew
from karui.recipes.budget.recover import settled
from karui.recipes.budget.skips import LeaveOut
from karui.technique import Bench, Candidate


@pytest.fixture
def normalised() -> Model:
    """A classifier whose normalisation has seen its layer's outputs."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    module.train()
    for _ in range(200):
        module(torch.randn(64, 6))
    return Model(module.eval(), example=(torch.zeros(2, 6),), task=Classification())


def scaled(model: Model, scale: float) -> nn.Linear:
    """The first layer with weights and bias this many times as large; a normalisation that sees it undoes that."""
    old = model.module.get_submodule("0")
    assert isinstance(old, nn.Linear)
    new = nn.Linear(6, 8)
    with torch.no_grad():
        new.weight.copy_(old.weight * scale)
        new.bias.copy_(old.bias * scale)
    return new


def exchanged(model: Model, scale: float) -> Candidate:
    new = scaled(model, scale)
    return Candidate(place="0", technique=LeaveOut(part="0"), text=f"{scale:g} times", layers=lambda: {"0": new})


def test_what_normalisations_put_right_is_little_harm(normalised: Model) -> None:
    """A layer ten times as large moves the output far, and hardly at all once the normalisation has seen it."""
    before = {name: value.clone() for name, value in normalised.module.state_dict().items()}
    bench = Bench(train=TensorDataset(torch.randn(128, 6), torch.zeros(128, dtype=torch.long)))
    same, large = harms(normalised, [exchanged(normalised, 1.0), exchanged(normalised, 10.0)], None, bench)
    assert same == pytest.approx(0.0, abs=1e-9)
    [inputs] = next(iter(bench.calibration(128, 128)))
    with torch.no_grad():
        module = normalised.copy().module
        plain = module(inputs).log_softmax(1)
        module.set_submodule("0", scaled(normalised, 10.0))
        moved = (plain.exp() * (plain - module(inputs).log_softmax(1))).sum(1).mean()
    assert large < 0.2 * float(moved)
    assert all(torch.equal(value, before[name]) for name, value in normalised.module.state_dict().items())


def test_seeing_anew_leaves_statistics_as_they_are(normalised: Model) -> None:
    """Running statistics, their count and the mode come back untouched."""
    norm = normalised.module.get_submodule("1")
    assert isinstance(norm, nn.BatchNorm1d)
    kept = {name: value.clone() for name, value in norm.state_dict().items()}
    with torch.no_grad(), seen_anew(normalised.module) as norms:
        normalised.module(torch.randn(32, 6) * 5)
    assert norms == [norm]
    assert not norm.training
    assert norm.track_running_stats
    assert len(kept) == 5
    assert all(torch.equal(value, kept[name]) for name, value in norm.state_dict().items())


def test_without_training_normalisations_are_seen_anew_where_that_helps(normalised: Model) -> None:
    """A layer ten times as large is put right; the network as it was stays the very same."""
    bench = Bench(train=TensorDataset(torch.randn(512, 6), torch.zeros(512, dtype=torch.long)))
    assert settled(normalised, normalised, bench) is normalised
    light = normalised.copy()
    light.module.set_submodule("0", scaled(normalised, 10.0))
    mended = settled(light, normalised, bench)
    x = torch.randn(256, 6)
    with torch.no_grad():
        wanted, before, after = (m.module(x) for m in (normalised, light, mended))
    assert (after - wanted).square().mean() < 0.1 * (before - wanted).square().mean()
    norms = [model.module.get_submodule("1") for model in (normalised, mended)]
    assert norms[0].momentum == norms[1].momentum
    assert not norms[1].training


def test_a_layer_that_is_held_twice_is_exchanged_in_both_places():
    layer = nn.Linear(4, 4)
    net = nn.Sequential(layer, nn.Tanh(), layer)
    other = nn.Linear(4, 4)
    with harm._swapped(net, {"0": other}):
        assert net[0] is net[2] is other
    assert net[0] is net[2] is layer
