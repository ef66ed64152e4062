"""The control harness, and the bench of some classes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from karui.errors import DataError
from karui.measuring import count
from karui.model import Classification, Model
from karui.technique import Bench
from karui.technique.pruning.classes import of_classes
from karui.technique.pruning.criteria import L1, Uniform
from karui.technique.pruning.harness import Trial, Trials, compare_criteria
from karui.train import Training

pytestmark = pytest.mark.paper(69)


def data(samples: int = 48) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(samples, 1, 6, 6, generator=generator), torch.arange(samples) % 4)


@pytest.fixture
def bench() -> Bench:
    return Bench(train=data(), validation=data(), test=data(), training=Training(epochs=1, batch_size=16))


def network(seed: int) -> Model:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    return Model(net, example=(torch.rand(2, 1, 6, 6),), task=Classification())


def test_every_criterion_draw_ratio_and_seed_is_tried_with_one_budget(bench: Bench) -> None:
    models = {seed: network(seed) for seed in (0, 1)}
    told = compare_criteria(
        models, bench, {"random": [Uniform(0), Uniform(1)], "l1": [L1]}, (0.25, 0.5), epochs=1, layer_epochs=1
    )
    assert len(told.rows) == 2 * 2 * (2 + 1)
    for ratio in (0.25, 0.5):
        assert len({(row.parameters, row.macs) for row in told.rows if row.ratio == ratio}) == 1
    assert all(row.parameters < count(models[0]).parameters for row in told.rows)
    assert {row.base for row in told.rows if row.seed == 1} == {bench.evaluate(models[1], "test").value}
    assert json.loads(json.dumps(told.to_json()))["summary"][0]["trials"] == 4


def test_without_training_before_and_after_are_equal(bench: Bench) -> None:
    told = compare_criteria({0: network(0)}, bench, {"l1": [L1]}, (0.5,), epochs=0)
    assert told.values("l1", 0.5, "before") == told.values("l1", 0.5, "after")


def trial(criterion: str, before: float, after: float, draw: int = 0) -> Trial:
    return Trial(
        criterion=criterion, draw=draw, seed=0, ratio=0.5, base=1.0, before=before, after=after, parameters=1, macs=1
    )


def test_spread_and_gap_are_of_the_means() -> None:
    told = Trials(
        (trial("random", 0.2, 0.9), trial("random", 0.4, 0.8, 1), trial("l1", 0.5, 0.87), trial("x", 0.1, 0.8))
    )
    assert told.mean("random", 0.5, "before") == pytest.approx(0.3)
    assert told.spread(0.5, "before") == pytest.approx(0.4)
    assert told.gap(0.5, "after") == pytest.approx(0.02)
    assert told.summary()[0]["after_half_interval"] == pytest.approx(12.706 * 0.0707 / 2**0.5, abs=1e-3)
    assert told.summary()[1]["after_half_interval"] is None


def test_a_bench_of_some_classes_holds_these_only(bench: Bench) -> None:
    only = of_classes(bench, (1, 3))
    for split in (only.train, only.validation, only.test):
        assert {int(split[number][1]) for number in range(len(split))} == {1, 3}


def test_a_class_without_a_sample_is_told(bench: Bench) -> None:
    with pytest.raises(DataError, match="class"):
        of_classes(bench, (1, 9))
