"""Runs in double precision: a network's parameters are widened one after the other, and stay as they are."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from karui.model import doubled
from karui.model.running import double_precision, widened

WIDTH = 128


class Plain(nn.Module):
    """Parameters of its own, a buffer, tensors made on the way and written into."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(5))
        self.register_buffer("shift", torch.rand(5))
        self.words = nn.Embedding(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        made = torch.zeros(x.shape)
        made[:, 1:] = (x * self.scale + self.shift)[:, 1:]
        return made.to(x.dtype) @ self.words.weight.T + self.words(torch.arange(2)).sum()


def images() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 2))
    net(torch.randn(8, 3, 8, 8))
    return net, torch.randn(2, 3, 8, 8)


def attention() -> tuple[nn.Module, Tensor]:
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), torch.randn(2, 5, 16)


@pytest.mark.parametrize("make", [images, attention, lambda: (Plain(), torch.randn(3, 5))])
def test_a_widened_network_computes_what_its_double_does(make: Any):
    torch.manual_seed(0)
    net, x = make()
    net.eval()
    with torch.no_grad():
        plain = net(x)
        with widened(net):
            made = net(x.double())
        with double_precision():
            exact = doubled(net)(x.double())
        again = net(x)
    assert made.dtype == torch.float64
    assert torch.allclose(made, exact, rtol=1e-12, atol=1e-12)
    assert not torch.equal(made, plain.double())
    assert torch.equal(plain, again)
    assert all(t.dtype == torch.float32 for t in net.state_dict().values() if t.is_floating_point())


def test_what_a_forward_says_is_of_32_bits_is_widened_too():
    class Rounds(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    net = Rounds(4, 2)
    x = torch.randn(3, 4)
    with torch.no_grad():
        with widened(net):
            made = net(x.double())
        assert torch.allclose(made, net(x).double(), rtol=1e-5, atol=1e-6)
    assert made.dtype == torch.float64


def test_one_layer_is_wide_at_a_time():
    net = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(6)])
    most = []

    def look(*_: Any) -> None:
        wide = [t for t in gc.get_objects() if type(t) in {Tensor, nn.Parameter} and t.dtype == torch.float64]
        most.append(sum(t.numel() for t in wide if t.numel() >= WIDTH**2))

    for layer in net:
        layer.register_forward_hook(look)
        layer.register_forward_pre_hook(look)
    with torch.no_grad(), widened(net):
        net(torch.randn(2, WIDTH).double())
    assert len(most) == 12
    assert max(most) <= 2 * WIDTH**2, "a weight and its transpose"


def test_what_would_be_lost_is_refused():
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            self.weight.add_(1)
            return x * self.weight

    net = Writes()
    with torch.no_grad(), widened(net), pytest.raises(RuntimeError, match="writes into a tensor"):
        net(torch.ones(2).double())
    assert torch.equal(net.weight, torch.ones(2))
    recurrent = nn.LSTM(2, 3)
    with torch.no_grad(), widened(recurrent), pytest.raises(ValueError, match="dtype"):
        recurrent(torch.ones(1, 2).double())


def test_buffers_may_be_written_into():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.seen[1:] += x[1:]
            return x * self.seen

    net = Counts()
    with widened(net):
        made = net(torch.ones(3).double())
    assert made.tolist() == [0.0, 1.0, 1.0]
    assert net.seen.tolist() == [0.0, 0.0, 0.0]
