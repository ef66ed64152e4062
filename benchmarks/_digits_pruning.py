"""What the benchmarks of pruning on the digits share: the network, its training, and its tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from _common import table
from karui.data import load_data
from karui.model import Classification, Model
from karui.technique import Bench
from karui.technique.pruning.harness import Trials
from karui.train import Adam, Constant, Training

BASE_EPOCHS = 25

torch.set_num_threads(1)


def digits_bench(epochs: int = BASE_EPOCHS) -> Bench:
    splits = load_data("digits")
    return Bench(
        train=splits.train,
        validation=splits.validation,
        test=splits.test,
        training=Training(epochs=epochs, batch_size=64, optimizer=Adam(lr=1e-3), schedule=Constant()),
    )


def network(seed: int, widths: tuple[int, int, int] = (16, 32, 32), *, normalised: bool = False) -> Model:
    """Three 3x3 convolutions, pooled after the second and third, and a linear layer; untrained."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        norm = [nn.BatchNorm2d(outputs)] if normalised else []
        return [nn.Conv2d(inputs, outputs, 3, padding=1), *norm, nn.ReLU()]

    first, second, third = widths
    torch.manual_seed(seed)
    net = nn.Sequential(
        *block(1, first), *block(first, second), nn.MaxPool2d(2), *block(second, third), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(4 * third, 10),
    )  # fmt: skip
    return Model(net, example=(torch.zeros(2, 1, 8, 8),), task=Classification())


def trained(bench: Bench, seeds: int, *, normalised: bool = False) -> dict[int, Model]:
    """Networks trained from nothing, by seed."""
    return {seed: replace(bench, seed=seed).fit(network(seed, normalised=normalised)) for seed in range(seeds)}


def show(title: str, told: Trials) -> None:
    print(f"{title}: accuracy in %, mean and half of its 95 % interval")
    print(trials_table(told.to_json()))


def trials_table(told: dict[str, Any]) -> str:
    """Every criterion at every ratio, before and after retraining."""
    rows = [
        [
            row["criterion"],
            f"{row['ratio']:.0%}",
            *(accuracy(row, when) for when in ("before", "after")),
            str(row["trials"]),
        ]
        for row in told["summary"]
    ]
    return table(["criterion", "cut", "before, %", "after, %", "trials"], rows)


def accuracy(row: dict[str, Any], when: str) -> str:
    """Mean and half of its 95 % interval, in percent."""
    mean, half = (row[f"{when}_{what}"] for what in ("mean", "half_interval"))
    return f"{100 * mean:.2f} +- {100 * (half or 0):.2f}"


def of_criterion(told: dict[str, Any], criterion: str, ratio: float, when: str = "after") -> str:
    """One of the accuracies of the table."""
    rows = (row for row in told["summary"] if (row["criterion"], row["ratio"]) == (criterion, ratio))
    return accuracy(next(rows), when)
