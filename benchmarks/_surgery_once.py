"""What a process that cuts one network does, from the import to a forward of the result: `_surgery_once.py WHO DEPTH`.

WHO is `Torch-Pruning`, `karui` or `karui, not proved`, and nothing is imported but what it needs: the network is plain
torch. It has the layers of `surgery_speed`'s, with projections.
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn import functional

RATIO = 0.3


class Block(nn.Module):
    """A basic block; its shortcut is a 1x1 convolution where channels change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        same = inputs == outputs
        projection = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if same else projection

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's ReLU comes after the sum."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + self.shortcut(x))


def network(depth: int) -> nn.Sequential:
    """A CIFAR ResNet of 6n + 2 layers."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inputs = 16
    for width in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            layers.append(Block(inputs, width, 1 if inputs == width else 2))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def ours(net: nn.Module, example: torch.Tensor, *, prove: bool) -> nn.Module:
    """Analysis, L1 norms, cut."""
    from karui.model import Model, coupled_groups, remove_units

    model = Model(net, example=(example,))
    found = coupled_groups(model)
    scores = {g.name: sum(g.rows(net, source).abs().sum(1) for source in g.sources) for g in found}
    chosen = {name: score.argsort()[: int(RATIO * len(score))] for name, score in scores.items()}
    return remove_units(model, chosen, analysis=found, prove=prove).module


def theirs(net: nn.Module, example: torch.Tensor) -> nn.Module:
    """The same with Torch-Pruning."""
    import torch_pruning

    last = next(layer for layer in net.modules() if isinstance(layer, nn.Linear))
    pruner = torch_pruning.pruner.MagnitudePruner(
        net,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        pruning_ratio=RATIO,
        ignored_layers=[last],
    )
    pruner.step()
    return net


def main(who: str, depth: int) -> None:
    """Build, cut, run once."""
    torch.set_num_threads(1)
    net, x = network(depth).eval(), torch.randn(1, 3, 32, 32)
    light = theirs(net, x) if who == "Torch-Pruning" else ours(net, x, prove=who == "karui")
    with torch.no_grad():
        light(x)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
