"""CPU seconds to analyse and cut CIFAR ResNets of 20, 56 and 110 layers, beside Torch-Pruning, in turns, in one run.

Each takes 30 % of the filters of every group by L1 norm. Torch-Pruning works in place and proves nothing; here the cut
model is a new one. So three are timed: Torch-Pruning, analysis and cut, and analysis and cut with the proof. The
networks have projection shortcuts, and the zero-padded ones of the paper, where Torch-Pruning's result does not run and
here the model takes its graph form. The aims, on the former: analysis and cut no slower than Torch-Pruning; with the
proof, no worse than linear in the depth.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning
from torch import nn
from torch.nn import functional

from _common import publish, table
from karui.architectures.cifar_resnet import BasicBlock, cifar_resnet
from karui.model import Model, coupled_groups, remove_units

DEPTHS = (20, 56, 110)
AIMED = "projection"
RATIO = 0.3
ROUNDS = 7


class ProjectedBlock(nn.Module):
    """A basic block whose shortcut is a 1x1 convolution."""

    def __init__(self, plain: BasicBlock) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = plain.conv1, plain.bn1, plain.conv2, plain.bn2
        inputs, outputs = plain.conv1.in_channels, plain.conv1.out_channels
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, plain.stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's ReLU comes after the sum."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + self.shortcut(x))


def projected(depth: int) -> nn.Module:
    """The CIFAR ResNet whose blocks have a projection where channels change."""
    net = cifar_resnet(depth)
    for stage in (net.layer2, net.layer3):
        stage[0] = ProjectedBlock(stage[0])
    return net


NETWORKS: dict[str, Callable[[int], nn.Module]] = {"projection": projected, "zero-padded": cifar_resnet}


def ours(net: nn.Module, example: torch.Tensor, *, prove: bool) -> nn.Module:
    """Analysis, L1 norms, cut."""
    model = Model(net, example=(example,))
    found = coupled_groups(model)
    scores = {g.name: sum(g.rows(net, source).abs().sum(1) for source in g.sources) for g in found}
    chosen = {name: score.argsort()[: int(RATIO * len(score))] for name, score in scores.items()}
    return remove_units(model, chosen, analysis=found, prove=prove).module


def theirs(net: nn.Module, example: torch.Tensor) -> nn.Module:
    """The same with Torch-Pruning."""
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


CONTESTANTS: dict[str, Callable[[nn.Module, torch.Tensor], nn.Module]] = {
    "Torch-Pruning": theirs,
    "analysis and cut": lambda net, x: ours(net, x, prove=False),
    "with the proof": lambda net, x: ours(net, x, prove=True),
}


def timed(build: Callable[[int], nn.Module], depth: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; the order turns with every round."""
    example = torch.randn(1, 3, 32, 32)
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for number in range(-1, ROUNDS):  # the first round warms up
        order = list(CONTESTANTS)
        for name in order if number % 2 == 0 else reversed(order):
            net = build(depth).eval()
            started = time.process_time()
            CONTESTANTS[name](net, example)
            if number >= 0:
                times[name].append(time.process_time() - started)
    return times


def runs(build: Callable[[int], nn.Module], depth: int) -> bool:
    """Whether Torch-Pruning's result takes an input."""
    example = torch.randn(1, 3, 32, 32)
    try:
        theirs(build(depth).eval(), example)(example)
    except RuntimeError:
        return False
    return True


def main() -> int:
    """Measure, print, keep; 1 where an aim is missed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    told: dict[str, dict[str, Any]] = {}
    rows = []
    for kind, build in NETWORKS.items():
        for depth in DEPTHS:
            times = timed(build, depth)
            base = times["Torch-Pruning"]
            here = told.setdefault(kind, {}).setdefault(str(depth), {"torch_pruning_runs": runs(build, depth)})
            for name, values in times.items():
                ratios = sorted(a / b for a, b in zip(values, base, strict=True))
                ratio = statistics.median(values) / statistics.median(base)
                low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
                here[name] = {"seconds": statistics.median(values), "ratio": ratio, "quartiles": [low, high]}
                told_ratio = f"{ratio:.2f} [{low:.2f}, {high:.2f}]"
                works = "yes" if name != "Torch-Pruning" or here["torch_pruning_runs"] else "no"
                rows.append([kind, str(depth), name, f"{statistics.median(values):.3f}", told_ratio, works])
    aimed = told[AIMED]
    blocks = (DEPTHS[-1] - 2) / (DEPTHS[0] - 2)
    growth = {
        name: aimed[str(DEPTHS[-1])][name]["seconds"] / aimed[str(DEPTHS[0])][name]["seconds"] / blocks
        for name in CONTESTANTS
    }
    lines = [
        "# Surgery: CPU seconds of one thread, and the ratio to Torch-Pruning in the same rounds",
        table(
            ["shortcut", "layers", "what", "seconds (median)", "ratio of medians [quartiles of the rounds]", "runs"],
            rows,
        ),
        "Growth from 20 to 110 layers over that of the number of blocks, with projections (1 is linear): "
        + ", ".join(f"{name} {value:.2f}" for name, value in growth.items())
        + ".",
    ]
    values = {"share_cut": RATIO, "rounds": ROUNDS, "networks": told, "growth": growth}
    publish("surgery_speed", values, "\n\n".join(lines))
    slower = [depth for depth in DEPTHS if aimed[str(depth)]["analysis and cut"]["ratio"] > 1]
    return int(bool(slower) or growth["with the proof"] > 1.1)


if __name__ == "__main__":
    sys.exit(main())
