"""A folder with a small network and a recipe that measures briefly."""

from __future__ import annotations

from pathlib import Path

import pytest

NET = """
import torch
from torch import nn


def net():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(72, 10),
    )


def grouped():
    class Grouped(nn.Module):
        # Eight heads of queries on two of keys and values; the number of heads is written in the forward. What comes
        # out does not tell of the units of one layer, so that a cut of them cannot be proved.
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, n) for n in (32, 8, 8))
            self.head, self.unseen = nn.Linear(32, 10), nn.Linear(8, 16)

        def forward(self, x):
            x = x.flatten(1, 2)
            q = self.q(x).view(-1, 8, 8, 4).transpose(1, 2)
            k, v = (f(x).view(-1, 8, 2, 4).transpose(1, 2).repeat_interleave(4, 1) for f in (self.k, self.v))
            mixed = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
            told = self.head(mixed.transpose(1, 2).reshape(-1, 8, 32).mean(1))
            return told + 0 * self.unseen(x).sum((1, 2))[:, None]

    return Grouped()


def wordy():
    class Wordy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def forward(self, x):
            x = x.flatten(1)
            return self.layer(x) if x.sum() > 0 else self.layer(-x)

    return Wordy()
"""

RECIPE = """
[training]
epochs = 1
batch_size = 128

[clock]
batches = [1]
threads = [1]
rounds = 5
seconds = 0.5
engines = [{ kind = "OnnxRuntime" }]

[[step]]
technique = "l1_filter_pruning"
ratio = 0.5
epochs = 0

[[step]]
technique = "knowledge_distillation"
epochs = 1
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path
