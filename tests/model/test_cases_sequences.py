"""How the features of sequences, words and vectors couple, on a small network for each case; every cut is proved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional


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


class GroupedQueries(nn.Module):
    """Four heads of queries share two of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(5, 16), nn.Linear(5, 8), nn.Linear(5, 8)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, 4, 4).transpose(1, 2)
        k, v = (part(x).view(batch, length, 2, 4).transpose(1, 2).repeat_interleave(2, 1) for part in (self.k, self.v))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


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


SEQUENCE, WORDS = torch.randn(1, 5, 5), torch.randint(11, (1, 4))
CASES = {
    "fused attention": (Attention(fused=True), (SEQUENCE,), {"embed": 12, "qkv": 4, "qkv#2": 3}),
    "plain attention": (Attention(fused=False), (SEQUENCE,), {"embed": 12, "qkv": 4, "qkv#2": 3}),
    "grouped queries": (GroupedQueries(), (SEQUENCE,), {"q": 4, "q#2": 2, "q#3": 2, "v": 4}),
    "torch attention": (TorchAttention(), (SEQUENCE,), {"embed": 12, "attention": 4, "attention#2": 3}),
    "LSTM": (Recurrent(nn.LSTM), (WORDS,), {"words": 6, "cells": 5}),
    "GRU": (Recurrent(nn.GRU), (WORDS,), {"words": 6, "cells": 5}),
    "RNN": (Recurrent(nn.RNN), (WORDS,), {"words": 6, "cells": 5}),
    "tied weights": (Tied(), (WORDS,), {"b": 6, "a": 7}),
    "raw parameters": (Raw(), (torch.randn(2, 4),), {"weight": 6}),
    "several inputs and outputs": (TwoByTwo(), (torch.randn(2, 4), torch.randn(2, 5)), {"a": 6, "c": 7}),
    "mixer": (Mixer(), (torch.randn(1, 5, 4),), {"embed": 6, "up": 7}),
    "auxiliary head": (Auxiliary(), (torch.randn(2, 4),), {"a": 6, "b": 5, "aux": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_groups_are_cut_and_proved(case: str, cut_and_proved: Callable[..., None]) -> None:
    net, example, expected = CASES[case]
    cut_and_proved(net, example, expected)
