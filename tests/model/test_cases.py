"""Every way in which channels couple, on a small network written for it; each cut is proved on the spot."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from karui.errors import CaptureError, SurgeryError
from karui.model import Analysis, Model, coupled_groups, edit_from_json, edit_to_json, remove_units


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


class Attention(nn.Module):
    """Merged qkv, heads frozen in Python."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.embed, self.qkv, self.out, self.head = (
            nn.Linear(5, 12),
            nn.Linear(12, 36),
            nn.Linear(12, 12),
            nn.Linear(12, 3),
        )
        self.heads, self.width, self.fused = 3, 4, fused

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        x = self.embed(x)
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = functional.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q @ k.transpose(-2, -1)) * self.width**-0.5).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, self.heads * self.width))
        return self.head(x.mean(1))


class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(5, 12), nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.words, self.cells, self.head = nn.Embedding(11, 6), kind(6, 5, 2, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(self.words(x))[0][:, -1])


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


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.a, self.b = nn.Embedding(11, 6), nn.Linear(6, 7), nn.Linear(7, 6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.words(x)
        return self.out(y + self.b(functional.relu(self.a(y))))


class Raw(nn.Module):
    """Parameters of the network itself, in no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))
        self.scale, self.head = nn.Parameter(torch.randn(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.gelu(x @ self.weight.t() + self.bias) * self.scale)


class TwoByTwo(nn.Module):
    """Two inputs, two outputs in a nested structure."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(5, 6), nn.Linear(6, 7)
        self.one, self.two = nn.Linear(7, 2), nn.Linear(7, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, object]:
        z = functional.gelu(self.c(functional.gelu(self.a(x)) + functional.gelu(self.b(y))))
        return {"one": self.one(z), "two": (self.two(z),)}


class Mixer(nn.Module):
    """Two free dimensions in one tensor: channels, and the hidden units over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down, self.head = nn.Linear(4, 6), nn.Linear(5, 7), nn.Linear(7, 5), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(functional.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)
        return self.head(x.mean(1))


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


class Auxiliary(nn.Module):
    """A head that only training has."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head, self.aux = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2), nn.Linear(6, 3)
        self.aux_head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.a(x))
        out = self.head(functional.relu(self.b(x)))
        return out + self.aux_head(self.aux(x)) if self.training else out


IMAGE, SEQUENCE, WORDS = torch.randn(1, 3, 6, 6), torch.randn(1, 5, 5), torch.randint(11, (1, 4))
CASES = {
    "padded shortcut": (PaddedShortcut(), (IMAGE,), {"stem": 4, "one": 6, "two": 4}),
    "nested concatenation": (Nested(), (IMAGE,), {"a": 4, "b": 3, "c": 5, "d": 6}),
    "shuffle": (Shuffle(), (IMAGE,), {"a": 4, "a#2": 2, "g": 4, "b": 6}),
    "frozen shuffle": (Shuffle(frozen=True), (IMAGE,), {"a": 4, "a#2": 2, "g": 4, "b": 6}),
    "fused attention": (Attention(fused=True), (SEQUENCE,), {"embed": 12, "qkv": 4, "qkv#2": 3}),
    "plain attention": (Attention(fused=False), (SEQUENCE,), {"embed": 12, "qkv": 4, "qkv#2": 3}),
    "torch attention": (TorchAttention(), (SEQUENCE,), {"embed": 12, "attention": 4, "attention#2": 3}),
    "LSTM": (Recurrent(nn.LSTM), (WORDS,), {"words": 6, "cells": 5}),
    "GRU": (Recurrent(nn.GRU), (WORDS,), {"words": 6, "cells": 5}),
    "RNN": (Recurrent(nn.RNN), (WORDS,), {"words": 6, "cells": 5}),
    "squeeze and excite": (Squeeze(), (IMAGE,), {"a": 8, "down": 4}),
    "upscaling": (Upscale(), (IMAGE,), {"a": 4, "b": 4, "wise": 2, "t": 3, "t#2": 2, "grouped": 2}),
    "tied weights": (Tied(), (WORDS,), {"b": 6, "a": 7}),
    "raw parameters": (Raw(), (torch.randn(2, 4),), {"weight": 6}),
    "several inputs and outputs": (TwoByTwo(), (torch.randn(2, 4), torch.randn(2, 5)), {"a": 6, "c": 7}),
    "mixer": (Mixer(), (torch.randn(1, 5, 4),), {"embed": 6, "up": 7}),
    "layer normalisation": (Normalised(), (torch.randn(2, 6),), {"a": 10}),
    "group normalisation": (Grouped(), (IMAGE,), {"a": 4, "a#2": 2}),
    "weight standardisation": (Standardised(), (IMAGE,), {"a": 6, "b": 8}),
    "mean over channels": (ChannelMean(), (IMAGE,), {"a": 6}),
    "auxiliary head": (Auxiliary(), (torch.randn(2, 4),), {"a": 6, "b": 5, "aux": 3}),
}


def sizes(found: Analysis) -> dict[str, int]:
    return {group.name: group.size for group in found}


@pytest.mark.parametrize("case", CASES)
def test_groups_of_each_case_are_cut_and_proved(case: str) -> None:
    net, example, expected = CASES[case]
    dense = Model(net.eval(), example=example)
    found = coupled_groups(dense)
    assert sizes(found) == expected
    for group in found:
        light = remove_units(dense, {group.name: torch.tensor([0])}, allow_normalisation=True, analysis=found)
        assert light.parameters < dense.parameters
    everything = {group.name: torch.tensor([group.size - 1]) for group in found}
    light = remove_units(dense, everything, allow_normalisation=True, analysis=found)
    again = edit_from_json(edit_to_json(light.lineage[0])).replay(copy.deepcopy(net), example)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in light.module.state_dict().items()
    }
    again.load_state_dict(light.module.state_dict())
    for one, other in zip(flat(again.eval()(*example)), flat(light.module.eval()(*example)), strict=True):
        torch.testing.assert_close(one, other)


def flat(value: object) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]


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


def test_chunks_that_part_ways_are_groups_of_their_own() -> None:
    found = coupled_groups(Model(Halves(), example=(IMAGE,)))
    assert sizes(found) == {"a": 4, "a#2": 4, "b": 4}


def test_unequal_chunks_take_the_graph_form() -> None:
    dense = Model(Halves().eval(), example=(IMAGE,))
    light = remove_units(dense, {"a": torch.tensor([0, 2])})
    assert light.lineage[0].programs is not None
    assert light.module(torch.randn(5, 3, 6, 6)).shape == (5, 2)


def test_control_flow_on_data_cannot_be_captured() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return y if y.sum() > 0 else -y

    with pytest.raises(CaptureError, match="takes a number out of a tensor"):
        coupled_groups(Model(Branching(), example=(torch.randn(1, 4),)))


def test_an_example_that_does_not_fit_is_said_plainly() -> None:
    with pytest.raises(CaptureError, match="does not run on its example"):
        coupled_groups(Model(nn.Linear(4, 2), example=(torch.randn(1, 3),)))


def test_capture_leaves_the_model_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Auxiliary2())
    net.train()
    net[1].eval()
    before = copy.deepcopy(net.state_dict())
    coupled_groups(Model(net, example=(IMAGE,)))
    assert [m.training for m in net] == [True, False, True]
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


class Auxiliary2(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, 0.5, self.training)
