"""Copies are what `copy.deepcopy` makes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from karui.model.copying import copied


class Odd(nn.Module):
    """Attributes of every kind, a shared weight, a module held in a list, one without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.aside = [self.one]
        self.sizes, self.names, self.rate = (3, [4]), {"a": {1: torch.ones(2)}}, 0.5
        self.register_buffer("kept", torch.arange(3), persistent=False)
        self.register_buffer("none", None)
        self.act = nn.ReLU()


NETS = {
    "odd": Odd,
    "lstm": lambda: nn.LSTM(3, 4),
    "normalised": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2),
    "parametrised": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
}


@pytest.mark.parametrize("name", NETS)
def test_copies_hold_equal_values_and_share_none(name: str) -> None:
    net = NETS[name]()
    net.train()
    next(iter(net.children()), net).eval()
    twin, deep = copied(net), copy.deepcopy(net)
    assert [type(m) for m in twin.modules()] == [type(m) for m in deep.modules()]
    assert [m.training for m in twin.modules()] == [m.training for m in net.modules()]
    assert list(twin.state_dict()) == list(deep.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), deep.state_dict().values(), strict=True))
    assert not {t.data_ptr() for t in twin.state_dict().values()} & {t.data_ptr() for t in net.state_dict().values()}
    assert [sorted(vars(m)) for m in twin.modules()] == [sorted(vars(m)) for m in deep.modules()]


def test_shared_and_nested_parts_stay_shared_within_the_copy() -> None:
    net = Odd()
    twin = copied(net)
    assert twin.two.weight is twin.one.weight
    assert twin.aside[0] is twin.one
    assert twin.names["a"][1] is not net.names["a"][1]
    assert twin.sizes[1] is not net.sizes[1]
    assert set(twin.state_dict()) == set(net.state_dict())


def test_hooks_are_copied() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    seen: list[int] = []
    net[1].register_forward_hook(lambda *_: seen.append(1))
    copied(net)(torch.ones(1, 3))
    assert seen == [1]


def test_a_memo_puts_smaller_tensors_in_their_place() -> None:
    net = nn.GRU(3, 4)
    small = nn.Parameter(torch.zeros(12, 2))
    twin = copied(net, {id(net.weight_ih_l0): small})
    assert twin.weight_ih_l0 is small
    assert any(weight is small for weight in twin._flat_weights)
