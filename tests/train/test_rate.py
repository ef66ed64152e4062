"""The range test finds a rate that trains well, again and again, and leaves the model alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from karui.data import Splits
from karui.errors import SettingError, TrainingError
from karui.model import Classification, Model
from karui.train import SGD, Adam, Influence, Moment, Training, fit, range_test, with_rate
from karui.train.rate import read_range, smoothed
from karui.train.training import Constant


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return Model(net.eval(), example=(torch.zeros(2, 1, 8, 8),), task=Classification())


def after_one_epoch(model: Model, digits: Splits, training: Training) -> float:
    """The loss on the training data; infinite where the training burst."""
    try:
        done = fit(model, digits.train, training=training, seed=1)
    except TrainingError:
        return float("inf")
    pictures, labels = zip(*(digits.train[k] for k in range(256)), strict=True)
    with torch.no_grad():
        logits = done.module(torch.stack(pictures))
        return float(nn.functional.cross_entropy(logits, torch.tensor([int(label) for label in labels])))


@pytest.mark.parametrize(("optimizer", "span"), [(SGD(lr=0.05), (1e-3, 100.0)), (Adam(lr=1e-3), (1e-2, 1e3))])
def test_the_rate_trains_better_than_ones_far_from_it(model: Model, digits: Splits, optimizer: Any, span: Any):
    training = Training(epochs=1, batch_size=32, optimizer=optimizer, schedule=Constant())
    found = range_test(model, digits.train, training=training, span=span)
    assert found.edge == pytest.approx(3 * found.rate)
    here = after_one_epoch(model, digits, with_rate(training, found.rate))
    assert here < after_one_epoch(model, digits, with_rate(training, found.rate / 30))
    assert here < after_one_epoch(model, digits, with_rate(training, found.rate * 30))


def test_where_the_user_looks_around_hardly_matters(model: Model, digits: Splits):
    """The rate that is given only centres the span."""
    rates = [range_test(model, digits.train, training=Training(optimizer=SGD(lr=lr))).rate for lr in (0.02, 0.1)]
    assert 1 / 3 < rates[0] / rates[1] < 3


def test_it_repeats_and_leaves_the_model_as_it_was(model: Model, digits: Splits):
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    one, two = (range_test(model, digits.train, steps=40) for _ in range(2))
    assert one == two
    assert one.rates == tuple(sorted(one.rates))
    assert len(one.rates) == len(one.losses) == len(one.smooth) <= 60
    assert all(torch.equal(before[name], value) for name, value in model.module.state_dict().items())


def test_few_data_are_gone_through_several_times(model: Model, digits: Splits):
    few = torch.utils.data.Subset(digits.train, range(48))
    assert len(range_test(model, few, training=Training(batch_size=16), span=(1e-3, 1.0), steps=40).rates) >= 40


def test_it_ends_where_the_loss_bursts(model: Model, digits: Splits):
    found = range_test(model, digits.train, steps=60, span=(1e-3, 1e6))
    assert len(found.losses) < 60
    assert found.edge < found.rates[-1]


class Broken(Influence):
    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        del moment
        return loss * float("nan")


def test_a_loss_that_is_never_finite_is_told(model: Model, digits: Splits):
    with pytest.raises(TrainingError, match="first step"):
        range_test(model, digits.train, influence=Broken())


@pytest.mark.parametrize("given", [{"span": (1.0, 1.0)}, {"span": (0.0, 1.0)}, {"steps": 10}])
def test_settings_out_of_range(model: Model, digits: Splits, given: dict[str, Any]):
    with pytest.raises(SettingError):
        range_test(model, digits.train, **given)


def test_a_curve_without_a_burst_ends_at_its_lowest_place():
    rates = [10 ** (k / 20 - 3) for k in range(60)]
    falling = read_range(rates, [1.0 - 0.01 * k for k in range(60)])
    assert falling.edge == rates[-1]
    assert smoothed(np.array([0.0, 1.0]), np.array([1.0, 1.0])).tolist() == pytest.approx([1.0, 1.0])


def test_a_rate_is_put_into_a_training_and_nothing_else():
    training = Training(epochs=3, optimizer=SGD(lr=0.1, momentum=0.5))
    changed = with_rate(training, 0.02)
    assert changed.optimizer == SGD(lr=0.02, momentum=0.5)
    assert changed.epochs == 3
