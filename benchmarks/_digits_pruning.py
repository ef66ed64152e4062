"""What the benchmarks of pruning on the digits share: the network, its training, and how results are written."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from karui.data import load_data
from karui.measuring import this_machine
from karui.model import Classification, Model
from karui.technique import Bench
from karui.technique.pruning.harness import Trials
from karui.train import Adam, Constant, Training

RESULTS = Path(__file__).parent.parent / "results"
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
    for row in told.summary():
        before, after = (
            f"{100 * row[f'{when}_mean']:5.1f} +- {100 * (row[f'{when}_half_interval'] or 0):4.1f}"
            for when in ("before", "after")
        )
        print(f"  {row['criterion']:16} {row['ratio']:.2f}  before {before}  after {after}  ({row['trials']} trials)")


def write(name: str, values: dict[str, Any]) -> None:
    """`results/NAME.json`, with the machine it was measured on."""
    RESULTS.mkdir(exist_ok=True)
    values = {"machine": dataclasses.asdict(this_machine()), **values}
    (RESULTS / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
