"""Networks of every kind that is quantised in the tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from karui.architectures.cifar_resnet import cifar_resnet
from karui.architectures.mobilenet import build_mobilenet


class Plain(nn.Module):
    """Convolutions with normalisation, pooling, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.head = nn.Linear(24 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 2)
        x = nn.functional.avg_pool2d(torch.relu(self.bn2(self.conv2(x))), 2)
        return self.head(x.flatten(1))


class Recurrent(nn.Module):
    """Token numbers, an embedding, a two-layer LSTM, and logits for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.lstm = nn.LSTM(24, 32, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])


class Transformer(nn.Module):
    """Token numbers, an embedding, two encoder layers, and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens)).mean(1))


class TwoWays(nn.Module):
    """Two inputs, of pictures and of numbers; two outputs, one of them grown by a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.grow = nn.ConvTranspose2d(16, 2, 4, stride=2, padding=1)
        self.left, self.right = nn.Linear(16, 12), nn.Linear(6, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, pictures: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        seen = torch.relu(self.conv(pictures))
        joined = torch.relu(self.left(seen.mean((2, 3))) + self.right(numbers))
        return {"class": self.head(joined), "map": self.grow(seen)}


def pictures(count: int, seed: int = 0) -> tuple[Tensor, ...]:
    return (torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)),)


def tokens(count: int, seed: int = 0) -> tuple[Tensor, ...]:
    return (torch.randint(50, (count, 7), generator=torch.Generator().manual_seed(seed)),)


def numbers(count: int, seed: int = 0) -> tuple[Tensor, ...]:
    return (torch.randn(count, 20, generator=torch.Generator().manual_seed(seed)),)


def both(count: int, seed: int = 0) -> tuple[Tensor, ...]:
    return (*pictures(count, seed), torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)))


def settled(module: nn.Module, draw) -> nn.Module:
    """With running statistics of such inputs, so that a normalisation is more than nothing."""
    module.train()
    with torch.no_grad():
        for seed in range(10):
            module(*draw(32, seed))
    return module.eval()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid(), nn.Linear(64, 3))


NETS = {
    "plain": (Plain, pictures),
    "resnet": (lambda: cifar_resnet(8), pictures),
    "mobilenet": (lambda: build_mobilenet(10, width=0.25, input_size=32), pictures),
    "mlp": (mlp, numbers),
    "lstm": (Recurrent, tokens),
    "transformer": (Transformer, tokens),
    "two ways": (TwoWays, both),
}


Draw = Callable[..., tuple[Tensor, ...]]


@pytest.fixture(scope="session")
def network() -> Callable[[str], tuple[nn.Module, Draw]]:
    """`network("lstm")`: an untrained network in evaluation mode, and what draws its inputs: `draw(count, seed)`."""

    def make(name: str) -> tuple[nn.Module, Draw]:
        build, draw = NETS[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return settled(build(), draw), draw

    return make
