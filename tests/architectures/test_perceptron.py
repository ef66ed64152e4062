"""Perceptrons: the layers asked for, in order, and kind errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from karui.architectures.perceptron import perceptron
from karui.errors import SettingError


def test_layers_are_those_asked_for() -> None:
    net = perceptron((64, 100, 50, 10), dropout=0.5)
    kinds = [type(layer) for layer in net]
    hidden = [nn.Linear, nn.ReLU, nn.Dropout]
    assert kinds == [nn.Flatten, *hidden, *hidden, nn.Linear]
    assert sum(p.numel() for p in net.parameters()) == 64 * 100 + 100 + 100 * 50 + 50 + 50 * 10 + 10
    assert net(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    assert not any(isinstance(layer, nn.Dropout) for layer in perceptron((4, 3, 2)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": (64,)}, r"sizes is \(64,\)"),
        ({"sizes": (64, 0, 10)}, r"sizes\[1\] is 0"),
        ({"sizes": (64, 10), "dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        perceptron(**settings)
