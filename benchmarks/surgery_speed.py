"""CPU seconds to analyse and cut CIFAR ResNets of 20, 56 and 110 layers, beside Torch-Pruning, in turns, in one run.

Each takes 30 % of the filters of every group by L1 norm. Torch-Pruning works in place and proves nothing; here the cut
model is a new one. So three are timed: Torch-Pruning, analysis and cut, and analysis and cut with the proof. The
networks have projection shortcuts, and the zero-padded ones of the paper, where Torch-Pruning's result does not run and
here the model takes its graph form. Beside these, the whole of a process that does it once: import, build, cut, one
forward; its CPU seconds are those of the interpreter and all that it loads, too. The aims, on the former: analysis and
cut no slower than Torch-Pruning; with the proof, no worse than linear in the depth, and no slower, which is told.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import _surgery_once
from _common import publish, run_installed, table
from _surgery_once import RATIO, ours, theirs
from karui.architectures.cifar_resnet import BasicBlock, cifar_resnet

DEPTHS = (20, 56, 110)
AIMED = "projection"
ROUNDS = 7
WHOLE = "from import to forward"
PROCESSES = 7


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


def whole(depth: int) -> dict[str, list[float]]:
    """CPU seconds of fresh processes, in turns: interpreter, imports, network, cut and a forward."""
    names = {"Torch-Pruning": "Torch-Pruning", "analysis and cut": "karui, not proved", "with the proof": "karui"}
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1, PROCESSES):  # the first round fills the disk's cache and compiles what pip would have
        for name in names if number % 2 == 0 else reversed(names):
            before = os.times()
            run_installed([sys.executable, _surgery_once.__file__, names[name], str(depth)])
            after = os.times()
            if number >= 0:
                used = after.children_user + after.children_system - before.children_user - before.children_system
                times[name].append(used)
    return times


def runs(build: Callable[[int], nn.Module], depth: int) -> bool:
    """Whether Torch-Pruning's result takes an input."""
    example = torch.randn(1, 3, 32, 32)
    try:
        theirs(build(depth).eval(), example)(example)
    except RuntimeError:
        return False
    return True


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """Median seconds, and the ratio to Torch-Pruning: of medians, with the quartiles of the rounds."""
    base, found = times["Torch-Pruning"], {}
    for name, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, base, strict=True))
        quartiles = [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]]
        ratio = statistics.median(values) / statistics.median(base)
        found[name] = {"seconds": statistics.median(values), "ratio": ratio, "quartiles": quartiles}
    return found


def row(kind: str, depth: int, name: str, told: dict[str, Any], works: bool) -> list[str]:
    """A row of the table."""
    low, high = told["quartiles"]
    ratio = f"{told['ratio']:.2f} [{low:.2f}, {high:.2f}]"
    return [kind, str(depth), name, f"{told['seconds']:.3f}", ratio, "yes" if works else "no"]


def main() -> int:
    """Measure, print, keep; 1 where an aim is missed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    told: dict[str, dict[str, Any]] = {}
    rows = []
    for kind, build in NETWORKS.items():
        for depth in DEPTHS:
            works = runs(build, depth)
            here = told.setdefault(kind, {}).setdefault(str(depth), {"torch_pruning_runs": works})
            here |= summary(timed(build, depth))
            rows += [row(kind, depth, name, here[name], works or name != "Torch-Pruning") for name in CONTESTANTS]
    for depth in DEPTHS:
        here = told.setdefault(WHOLE, {}).setdefault(str(depth), summary(whole(depth)))
        rows += [row(f"{AIMED}, {WHOLE}", depth, name, here[name], True) for name in CONTESTANTS]
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
    values = {"share_cut": RATIO, "rounds": ROUNDS, "processes": PROCESSES, "networks": told, "growth": growth}
    publish("surgery_speed", values, "\n\n".join(lines))
    slower = [depth for depth in DEPTHS if aimed[str(depth)]["analysis and cut"]["ratio"] > 1]
    return int(bool(slower) or growth["with the proof"] > 1.1)


if __name__ == "__main__":
    sys.exit(main())
