"""Statistics across the channels that are cut: exact up to normalisation, with an opt-in; whole groups are exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from karui.errors import SurgeryError
from karui.model import Model, coupled_groups, remove_units


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(functional.gelu(self.norm(self.a(x))))


class Grouped(nn.Module):
    """Group normalisation: whole groups go exactly, channels within groups up to normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(functional.relu(self.norm(self.a(x)))).mean((2, 3))


class Standardised(nn.Module):
    """Weight standardisation: the filter's statistics count its input channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b):
            w = layer.weight
            w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
            x = functional.relu(functional.conv2d(x, w, layer.bias))
        return self.head(x.mean((2, 3)))


class ChannelMean(nn.Module):
    """Spatial attention from the mean over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.look, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(1, 1, 3, padding=1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head((x * torch.sigmoid(self.look(x.mean(1, keepdim=True)))).mean((2, 3)))


IMAGE = torch.randn(1, 3, 6, 6)
CASES = {
    "layer normalisation": (Normalised(), (torch.randn(2, 6),), {"a": 10}),
    "group normalisation": (Grouped(), (IMAGE,), {"a": 4, "a#2": 2}),
    "weight standardisation": (Standardised(), (IMAGE,), {"a": 6, "b": 8}),
    "mean over channels": (ChannelMean(), (IMAGE,), {"a": 6}),
}


@pytest.mark.parametrize("case", CASES)
def test_groups_are_cut_and_proved(case: str, cut_and_proved: Callable[..., None]) -> None:
    net, example, expected = CASES[case]
    cut_and_proved(net, example, expected)


@pytest.mark.parametrize("case", ["layer normalisation", "weight standardisation", "mean over channels"])
def test_normalisation_needs_an_opt_in(case: str) -> None:
    net, example, _ = CASES[case]
    dense = Model(net, example=example)
    group = next(iter(coupled_groups(dense)))
    assert not group.exact
    with pytest.raises(SurgeryError, match="allow_normalisation=True"):
        remove_units(dense, {group.name: torch.tensor([0])})


def test_whole_normalisation_groups_are_exact() -> None:
    found = coupled_groups(Model(Grouped(), example=(IMAGE,)))
    assert [(group.size, group.exact) for group in found] == [(4, False), (2, True)]


def test_maximum_over_channels_is_refused_with_its_reason() -> None:
    class Largest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Conv2d(3, 6, 1), nn.Linear(36, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(x).amax(1).flatten(1))

    found = coupled_groups(Model(Largest(), example=(IMAGE,)))
    assert not found.groups
    assert ("a", 6, "amax is taken over it") in [(place.name, place.size, place.reason) for place in found.locked]
