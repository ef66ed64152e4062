"""Walks see what those of `torch.nn` see; tensors that are lent come back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from karui.model.walking import layers, lent, named_buffers, named_parameters


class Shared(nn.Module):
    """A layer and a weight at two places, a place without a layer, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.two = nn.Linear(3, 3)
        self.two.weight = self.one[0].weight
        self.again = self.one
        self.none = None
        self.register_module("nothing", None)
        self.register_buffer("empty", None)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x)) * self.scale


@pytest.mark.parametrize("kind", [Shared, lambda: nn.TransformerEncoderLayer(8, 2), lambda: nn.LSTM(3, 4, 2)])
def test_walks_are_those_of_torch(kind: type[nn.Module]) -> None:
    net = kind()
    assert list(layers(net).items()) == list(net.named_modules())
    assert [(n, id(p)) for n, p in named_parameters(net).items()] == [(n, id(p)) for n, p in net.named_parameters()]
    assert [(n, id(b)) for n, b in named_buffers(net).items()] == [(n, id(b)) for n, b in net.named_buffers()]


def test_lent_tensors_are_used_wherever_theirs_are_and_come_back() -> None:
    net = Shared().eval()
    x = torch.randn(2, 3)
    weight, expected = net.two.weight, net(x)
    with lent(net, {id(weight): torch.zeros(3, 3)}):
        assert not net.one[0].weight.any()
        assert not net.two.weight.any()
        assert torch.equal(net(torch.zeros(2, 3)), net(x))
        net.one[0].weight = nn.Parameter(torch.ones(3, 3))
    assert net.one[0].weight is net.two.weight is weight
    assert torch.equal(net(x), expected)
