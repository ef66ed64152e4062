"""What the record says of a result: whether it is met, what it was measured at, where its time goes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import karui
from karui.errors import NeedError
from karui.model import Model, Regression
from karui.technique import Bench
from karui.train import SGD, Training


@pytest.fixture
def dense() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 4)).eval()
    return Model(net, example=(torch.zeros(2, 16),), task=Regression())


@pytest.fixture
def bench(dense: Model) -> Bench:
    x = torch.randn(96, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        data = TensorDataset(x, dense.module(x))
    training = Training(epochs=1, batch_size=32, optimizer=SGD(lr=0.05))
    return Bench(train=data, validation=data, test=data, training=training)


def test_without_a_budget_there_must_be_something_to_judge_by(dense: Model, bench: Bench):
    """All points would lose nothing, and the lightest of them be the best compromise."""
    with pytest.raises(NeedError, match="neither a budget nor a floor, and nothing to judge") as refused:
        karui.compress(Model(dense.module, example=dense.example), bench, epochs=0, int8=False)
    assert "State a budget" in str(refused.value)
