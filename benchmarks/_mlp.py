"""What the benchmarks of fully-connected networks share: the network, its bench, and accuracy in percent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from karui.architectures.perceptron import perceptron
from karui.data import Splits, hold_out, tensors_of
from karui.measuring import evaluate
from karui.model import Classification, Model
from karui.technique import Bench
from karui.train import Adam, Constant, Training

torch.set_num_threads(1)


def mlp(*sizes: int, seed: int, dropout: float = 0.0, glorot: bool = False) -> Model:
    """A network of linear layers and ReLU on square gray pictures."""
    torch.manual_seed(seed)
    net = perceptron(sizes, dropout)
    if glorot:
        for layer in net:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
    side = round(sizes[0] ** 0.5)
    return Model(net, example=(torch.zeros(1, 1, side, side),), task=Classification())


def bench_of(splits: Splits, epochs: int, seed: int, *, lr: float = 3e-3, batch: int = 64, **training: Any) -> Bench:
    """Adam at a constant rate."""
    settings = Training(epochs=epochs, batch_size=batch, optimizer=Adam(lr=lr), schedule=Constant(), **training)
    return Bench(train=splits.train, validation=splits.validation, test=splits.test, training=settings, seed=seed)


def few_of(splits: Splits, samples: int, seed: int, wrong: float = 0.0) -> Splits:
    """So many of the training samples, a share of them with a label drawn at random."""
    x, y = tensors_of(hold_out(splits.train, samples / len(splits.train), seed)[1])
    draw = torch.Generator().manual_seed(seed)
    hit = torch.rand(len(y), generator=draw) < wrong
    drawn = torch.randint(int(y.max()) + 1, (len(y),), generator=draw)
    return replace(splits, train=TensorDataset(x, torch.where(hit, drawn, y)))


def accuracy(model: Model, splits: Splits) -> float:
    """On the test split, in percent."""
    return 100 * evaluate(model, splits.test).value
