"""The sensitivity scan and the plan that follows."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from karui.errors import NeedError
from karui.model import Classification, Model, coupled_groups
from karui.technique import Bench
from karui.technique.pruning.criteria import L1
from karui.technique.pruning.schedule import cut_once
from karui.technique.pruning.scope import map_sizes
from karui.technique.pruning.selection import removed_count
from karui.technique.pruning.sensitivity import Sensitivity, scan, stage_ratios

pytestmark = pytest.mark.paper(62)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4),
    )  # fmt: skip
    return Model(net, example=(torch.rand(2, 1, 8, 8),), task=Classification())


@pytest.fixture
def bench() -> Bench:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.rand(64, 1, 8, 8, generator=generator), torch.randint(4, (64,), generator=generator))
    return Bench(train=data, validation=data)


def test_the_scan_judges_each_layer_alone_without_retraining(
    model: Model, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(*_: object, **__: object) -> None:
        raise AssertionError("the scan must not train")

    monkeypatch.setattr(Bench, "fit", trained)
    groups, ratios = coupled_groups(model).groups, (0.25, 0.5, 0.75)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    told = scan(model, bench, groups, L1, ratios)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert told.base == bench.evaluate(model).value
    for group in groups:
        for ratio, value in zip(ratios, told.curves[group.name], strict=True):
            cut = cut_once(model, bench, L1, {group.name: removed_count(group.size, ratio)}, label="l1")
            assert value == pytest.approx(bench.evaluate(cut).value, abs=1 / 64)


def test_without_labels_it_is_refused(model: Model) -> None:
    with pytest.raises(NeedError, match="labels"):
        scan(model, Bench(), coupled_groups(model).groups, L1, (0.5,))


def test_layers_whose_maps_are_of_equal_size_are_a_stage(model: Model) -> None:
    assert map_sizes(model) == {"0": (8, 8), "2": (8, 8), "6": (4, 4), "9": ()}


def curves(**drops: tuple[float, ...]) -> Sensitivity:
    return Sensitivity(
        base=0.9,
        higher_is_better=True,
        ratios=(0.1, 0.5, 0.9),
        curves={name: tuple(0.9 - drop for drop in values) for name, values in drops.items()},
    )


def test_one_ratio_a_stage_and_steep_layers_are_left_whole() -> None:
    told = curves(a=(0.0, 0.01, 0.3), b=(0.0, 0.0, 0.0), steep=(0.2, 0.3, 0.5), far=(0.0, 0.5, 0.0))
    stages = {"a": (8, 8), "b": (8, 8), "steep": (8, 8), "far": (4, 4)}
    assert stage_ratios(told, stages, max_drop=0.02) == {"a": 0.5, "b": 0.5, "steep": 0.0, "far": 0.1}


def test_a_larger_drop_allows_no_less() -> None:
    told = curves(a=(0.0, 0.01, 0.3), b=(0.0, 0.05, 0.06))
    plans = [stage_ratios(told, {"a": 1, "b": 2}, drop) for drop in (0.0, 0.02, 0.1, 0.5)]
    for one, next_ in pairwise(plans):
        assert all(next_[name] >= share for name, share in one.items())


def test_where_lower_is_better_a_rise_is_the_loss() -> None:
    told = Sensitivity(base=0.1, higher_is_better=False, ratios=(0.5,), curves={"a": (0.3,)})
    assert told.losses("a") == (pytest.approx(0.2),)
