"""Selection over a model, and the two schedules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from karui.model import Model, Note, coupled_groups
from karui.technique import Bench
from karui.technique.pruning.criteria import L1, Uniform
from karui.technique.pruning.masking import silence, silenced
from karui.technique.pruning.schedule import cut_layer_by_layer, cut_once, select


def network() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Sigmoid(), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 10), nn.Tanh(), nn.Linear(10, 4),
    )  # fmt: skip
    model = Model(net.eval(), example=(torch.rand(3, 1, 8, 8),))
    with torch.no_grad():
        net[1].running_mean.normal_()
        net[1].bias.normal_()
    return model


COUNTS = {"0": 3, "3": 4, "6": 5}


@dataclass(frozen=True, kw_only=True)
class Recorder(Bench):
    """A bench that trains nothing and remembers what it was asked."""

    asked: list[dict[str, Any]] = field(default_factory=list)

    def fit(self, model: Model, **settings: Any) -> Model:  # pyright: ignore
        self.asked.append({"widths": widths(model), "seed": self.seed, **settings})
        return model.copy()


def widths(model: Model) -> list[int]:
    return [layer.weight.shape[0] for layer in model.module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


@pytest.mark.paper(62)
def test_the_masked_network_computes_what_the_cut_one_does() -> None:
    model = network()
    units, _ = select(model, Bench(), L1, coupled_groups(model).groups, COUNTS)
    cut, masked = cut_once(model, Bench(), L1, COUNTS, label="l1"), model.copy()
    for group in coupled_groups(model).groups:
        silence(masked.module, group, units[group.name])
    x = torch.rand(16, 1, 8, 8)
    assert widths(cut) == [3, 4, 5, 4]
    torch.testing.assert_close(cut.module.eval()(x), masked.module.eval()(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(cut.module(x), model.module(x), atol=1e-3)


def test_silenced_gives_every_value_back() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    with silenced(model.module, coupled_groups(model).groups[0], torch.tensor([0, 2])) as module:
        assert not torch.equal(module.state_dict()["0.weight"], before["0.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())


@pytest.mark.paper(62)
def test_greedy_is_independent_at_the_first_layer_and_never_exceeds_it() -> None:
    model = network()
    groups = coupled_groups(model).groups
    greedy_units, _ = select(model, Bench(), L1, groups, COUNTS, greedy=True)
    units, _ = select(model, Bench(), L1, groups, COUNTS)
    assert torch.equal(units["0"], greedy_units["0"])
    independent = L1(model, groups, Bench())
    working = model.copy()
    silence(working.module, groups[0], greedy_units["0"])
    greedy = L1(working, groups[1:], Bench())
    for name in ("3", "6"):
        assert (greedy[name] <= independent[name] + 1e-6).all()
    assert (greedy["3"] < independent["3"]).all()
    kept = [unit for unit in range(6) if unit not in greedy_units["0"].tolist()]
    torch.testing.assert_close(greedy["3"], model.module.get_parameter("3.weight")[:, kept].abs().sum((1, 2, 3)))


@pytest.mark.paper(62)
def test_greedy_and_independent_give_networks_of_one_shape_and_may_differ_in_choice() -> None:
    model = network()
    with torch.no_grad():  # filter 0 of the second layer hears only what the first layer loses
        model.module.get_parameter("0.weight")[:3] *= 0.01
        weight = model.module.get_parameter("3.weight")
        weight.copy_(torch.full_like(weight, 0.1))
        weight[0, :3], weight[0, 3:] = 1.0, 0.0
    one, other = (cut_once(model, Bench(), L1, COUNTS, label="l1", greedy=greedy) for greedy in (False, True))
    assert widths(one) == widths(other)
    groups = coupled_groups(model).groups
    assert 0 not in select(model, Bench(), L1, groups, COUNTS)[0]["3"]
    assert 0 in select(model, Bench(), L1, groups, COUNTS, greedy=True)[0]["3"]


def test_the_given_model_stays_and_the_lineage_tells_the_choice() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    light = cut_once(model, Bench(), L1, COUNTS, label="l1")
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert model.lineage == ()
    note = light.lineage[-1]
    assert isinstance(note, Note)
    told = note.settings["groups"]["3"]
    assert (told["units"], told["removed"], told["ratio"]) == (8, 4, 0.5)
    assert told["strongest_removed"] <= told["weakest_kept"]


@pytest.mark.paper(69)
def test_layer_by_layer_goes_from_the_input_on_with_equal_training_after_each() -> None:
    model, bench, seen = network(), Recorder(seed=4), []
    light = cut_layer_by_layer(
        model, bench, Uniform(), COUNTS, label="random", epochs=1, after=lambda name, _: seen.append(name)
    )
    assert seen == ["0", "3", "6"]
    assert [asked["widths"] for asked in bench.asked] == [[3, 8, 10, 4], [3, 4, 10, 4], [3, 4, 5, 4]]
    assert {(asked["epochs"], asked["seed"]) for asked in bench.asked} == {(1, 4)}
    note = light.lineage[-1]
    assert isinstance(note, Note)
    assert (note.settings["order"], note.settings["epochs_each"]) == (["0", "3", "6"], 1)


@pytest.mark.paper(69)
def test_budget_epochs_and_seed_are_the_same_for_every_criterion() -> None:
    asked = []
    for criterion in (L1, Uniform(), Uniform(1)):
        bench = Recorder(seed=4)
        cut_layer_by_layer(network(), bench, criterion, COUNTS, label="any", epochs=2)
        asked.append(bench.asked)
    assert asked[0] == asked[1] == asked[2]


class Frozen(nn.Module):
    """Sizes frozen in Python: after a cut the model takes its graph form."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shortcut = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(1, 8, 1)
        self.hidden, self.head = nn.Linear(8 * 16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(torch.relu(self.conv(x) + self.shortcut(x)), 2)
        return self.head(torch.relu(self.hidden(x.view(-1, 8 * 16))))


def test_a_model_in_graph_form_is_scored_and_cut_again() -> None:
    torch.manual_seed(0)
    dense = Model(Frozen().eval(), example=(torch.rand(2, 1, 8, 8),))
    light = cut_layer_by_layer(dense, Recorder(), L1, {"conv": 4, "hidden": 6}, label="l1", epochs=0)
    assert light.module.get_parameter("hidden.weight").shape == (6, 64)
    projection = dense.module.get_parameter("shortcut.weight").flatten(1).abs().sum(1)
    keep = projection.topk(4).indices.sort().values
    assert torch.equal(light.module.get_parameter("conv.weight"), dense.module.get_parameter("conv.weight")[keep])
