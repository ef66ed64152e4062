"""What the effect tests of pruning share: small networks trained on the digits, one a seed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from karui.data import Splits
from karui.model import Classification, Model
from karui.technique import Bench
from karui.train import Adam, Constant, Training


@pytest.fixture(scope="session")
def digits_bench(digits: Splits) -> Bench:
    return Bench(
        train=digits.train,
        validation=digits.validation,
        test=digits.test,
        training=Training(batch_size=64, optimizer=Adam(lr=1e-3), schedule=Constant()),
    )


@pytest.fixture(scope="session")
def digits_networks(digits_bench: Bench) -> dict[int, Model]:
    """Three convolutions of 16, 32 and 32 filters without normalisation, trained for 25 epochs, by seed."""

    def network(seed: int) -> Model:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
                nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Flatten(), nn.Linear(128, 10),
            )  # fmt: skip
        return Model(net, example=(torch.zeros(2, 1, 8, 8),), task=Classification())

    return {seed: replace(digits_bench, seed=seed).fit(network(seed), epochs=25) for seed in range(3)}
