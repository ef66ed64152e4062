"""How the channels of pictures couple, on a small network for each case; every cut is proved on the spot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from karui.model import Model, coupled_groups, remove_units


class PaddedShortcut(nn.Module):
    """The shortcut of CIFAR ResNets: every second pixel, zeros for the new channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.one = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.two = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        y = self.two(functional.relu(self.one(x)))
        x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.head(functional.relu(x + y).mean((2, 3)))


class Nested(nn.Module):
    """Concatenations of concatenations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)
        self.c, self.d = nn.Conv2d(7, 5, 1), nn.Conv2d(19, 6, 1)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = functional.relu(self.a(x))
        ab = torch.cat([a, functional.relu(self.b(a))], 1)
        return self.head(self.d(torch.cat([torch.cat([self.c(ab), ab], 1), ab], 1)).mean((2, 3)))


class Halves(nn.Module):
    """Chunks that go different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.a(x).chunk(2, 1)
        return self.head(torch.cat([functional.relu(two), self.b(torch.sigmoid(one))], 1).amax((2, 3)))


class Windows(nn.Module):
    """Windows told by their length, copies by the size that they have then."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.a(x))
        x = torch.cat([x.narrow(1, 4, 4), -x.narrow(1, 0, 4)], 1)
        return self.b((x[:, :, None].broadcast_to(x.shape[0], 8, 3) * torch.arange(1.0, 4)).flatten(1))


class Shuffle(nn.Module):
    """A channel shuffle after a grouped convolution; `frozen` writes the number of channels into the reshape."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.a, self.g = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.b, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 3)
        self.channels = 8 if frozen else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.g(functional.relu(self.a(x)))
        batch, channels, height, width = x.shape
        channels = self.channels or channels
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return self.head(functional.relu(self.b(functional.relu(x))).mean((2, 3)))


class ShuffleUnits(nn.Module):
    """Two units of ShuffleNet v2: split, work on one half, join, shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.units = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 5, 3, padding=1, groups=5), nn.Conv2d(5, 4, 1), nn.ReLU()
            )
            for _ in range(2)
        )
        self.shuffle, self.head = nn.ChannelShuffle(2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for unit in self.units:
            one, two = x.chunk(2, 1)
            x = self.shuffle(torch.cat([one, unit(two)], 1))
        return self.head(x.mean((2, 3)))


class Squeeze(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.up = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.a(x))
        gate = torch.sigmoid(self.up(functional.silu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.head((x * gate).mean((2, 3)))


class Upscale(nn.Module):
    """Pixel shuffle, transposed convolutions (one grouped), grouped convolution with a multiplier."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.wise = nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.t, self.grouped = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ConvTranspose2d(6, 4, 2, groups=2)
        self.c = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wise(functional.relu(self.b(functional.pixel_shuffle(self.a(x), 2))))
        return self.c(self.grouped(functional.relu(self.t(x))))


class Twins(nn.Module):
    """One tower for two inputs, which are then compared: equal ones tell nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3)
        self.far = nn.Linear(8, 2)

    def tower(self, x: Tensor) -> Tensor:
        return self.b(functional.relu(self.a(x))).mean((2, 3))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        apart = self.tower(x) - self.tower(y)
        return self.far(apart.abs()), apart.square().sum(1)


IMAGE = torch.randn(1, 3, 6, 6)
CASES = {
    "padded shortcut": (PaddedShortcut(), (IMAGE,), {"stem": 4, "one": 6, "two": 4}),
    "nested concatenation": (Nested(), (IMAGE,), {"a": 4, "b": 3, "c": 5, "d": 6}),
    "windows": (Windows(), (torch.randn(2, 4),), {"a": 8}),
    "shuffle": (Shuffle(), (IMAGE,), {"a": 4, "a#2": 2, "g": 4, "b": 6}),
    "frozen shuffle": (Shuffle(frozen=True), (IMAGE,), {"a": 4, "a#2": 2, "g": 4, "b": 6}),
    "squeeze and excite": (Squeeze(), (IMAGE,), {"a": 8, "down": 4}),
    "twins": (Twins(), (IMAGE, torch.zeros(1, 3, 6, 6)), {"a": 6, "b": 8}),
    "upscaling": (Upscale(), (IMAGE,), {"a": 4, "b": 4, "wise": 2, "t": 3, "t#2": 2, "grouped": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_groups_are_cut_and_proved(case: str, cut_and_proved: Callable[..., None]) -> None:
    net, example, expected = CASES[case]
    cut_and_proved(net, example, expected)


def test_chunks_that_part_ways_are_groups_of_their_own() -> None:
    found = coupled_groups(Model(Halves(), example=(IMAGE,)))
    assert {group.name: group.size for group in found} == {"a": 4, "a#2": 4, "b": 4}


def test_unequal_chunks_take_the_graph_form() -> None:
    dense = Model(Halves().eval(), example=(IMAGE,))
    light = remove_units(dense, {"a": torch.tensor([0, 2])})
    assert light.lineage[0].programs is not None
    assert light.module(torch.randn(5, 3, 6, 6)).shape == (5, 2)


def test_a_window_of_which_nothing_is_left_is_empty() -> None:
    dense = Model(Windows().eval(), example=(torch.randn(2, 4),))
    light = remove_units(dense, {"a": torch.arange(4)})
    assert light.module.a.out_features == 4
    assert light.module(torch.randn(5, 4)).shape == (5, 3)
