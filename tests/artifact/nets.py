"""Networks that tests of saved models build by their factories, also in fresh processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Small(nn.Module):
    """A convolution with normalisation, a tied pair of linear layers, a buffer that no state dict holds."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.down = nn.Linear(width, width)
        self.up = nn.Linear(width, width, bias=False)
        self.up.weight = self.down.weight
        self.head = nn.Linear(width, 3)
        self.register_buffer("shift", torch.zeros(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3)) + self.shift
        return self.head(self.up(torch.relu(self.down(x))))


class Frozen(nn.Module):
    """Reshapes to numbers written in Python, so that a cut needs its graph form."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 6, 1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x))).reshape(x.shape[0], 8, 4, 4)
        return self.head(self.drop(torch.relu(self.second(x)).reshape(-1, 96)))


def frozen() -> nn.Module:
    return Frozen()


def small(width: int = 6) -> nn.Module:
    return Small(width)
