"""Companions train with the network and are gone afterwards."""

from __future__ import annotations

import torch
from torch import nn

from karui.train.companion import Companion, companion_of


def test_it_takes_the_type_of_the_network_and_is_taken_off():
    net = nn.Linear(2, 2).to(torch.float64)
    part = Companion("_extra", lambda _: nn.Linear(2, 3))
    part.attach(net)
    assert companion_of(net, "_extra").weight.dtype == torch.float64
    assert len(list(net.parameters())) == 4
    assert part.finish(net) is net
    assert [name for name, _ in net.named_parameters()] == ["weight", "bias"]


def test_a_network_that_calls_its_children_in_turn_runs_as_without_it():
    net, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(5, 4)
    before = net(x)
    part = Companion("_extra", lambda _: nn.Linear(9, 2))
    part.attach(net)
    assert torch.equal(net(x), before)
    assert companion_of(net, "_extra")(torch.zeros(1, 9)).shape == (1, 2)
    assert len(list(net.parameters())) == 4
    assert torch.equal(part.finish(net)(x), before)


def test_a_network_without_parameters_takes_one_too():
    net = nn.Sequential(nn.ReLU())
    Companion("_extra", lambda _: nn.Linear(2, 3)).attach(net)
    assert len(list(net.parameters())) == 2
