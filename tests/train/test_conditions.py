"""Penalties, rest and dropout rates hold for one training, and are gone after it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from karui.errors import SettingError
from karui.train import Moment
from karui.train.conditions import DropoutRates, Penalty, Resting, dropout_rates


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.4), nn.Linear(4, 2), nn.Dropout2d(0.2))


def test_penalties_have_the_gradient_they_say() -> None:
    net = network()
    penalty = Penalty(names=("0.weight",), l1=0.1, l2=0.3)
    penalty.objective(torch.tensor(0.0), Moment(net, (), None, None)).backward()
    weight = net.get_parameter("0.weight")
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, 0.1 * weight.detach().sign() + 0.3 * weight.detach())
    assert net.get_parameter("2.weight").grad is None
    with pytest.raises(SettingError, match="l2 is -1"):
        Penalty(names=(), l2=-1.0)


def test_what_rests_wakes_and_what_slept_before_sleeps_on() -> None:
    net = network()
    net.get_parameter("2.bias").requires_grad_(False)
    resting = Resting(("0.weight", "0.bias"))
    resting.attach(net)
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["2.weight"]
    resting.finish(net)
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["2.bias"]


def test_dropout_rates_come_back() -> None:
    net = network()
    own = dropout_rates(net)
    assert own == {"1": 0.4, "3": 0.2}
    rates = DropoutRates(own={"1": 0.4}, rates={"1": 0.1})
    rates.attach(net)
    assert dropout_rates(net) == {"1": 0.1, "3": 0.2}
    assert dropout_rates(rates.finish(net)) == own
