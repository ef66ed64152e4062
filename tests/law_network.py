"""The network that the laws hold every technique against: one of each kind of layer that techniques work on."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class LawNetwork(nn.Module):
    """Convolutions, a residual sum, a flatten, a hidden linear layer and a head; input 1x8x8, ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        self.first = nn.Conv2d(16, 24, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(24)
        self.second = nn.Conv2d(24, 16, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.hidden = nn.Linear(16 * 2 * 2, 48)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem_norm(self.stem(x)))
        y = functional.relu(self.first_norm(self.first(x)))
        x = functional.max_pool2d(functional.relu(x + self.second_norm(self.second(y))), 2)
        x = functional.relu(self.last(x)).flatten(1)
        return self.head(functional.relu(self.hidden(x)))


def network() -> nn.Module:
    """The factory that a lineage names."""
    return LawNetwork()
