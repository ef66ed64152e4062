"""Settings of a budget of another kind than the one that is asked for: refused at once, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import karui
from karui.errors import UsageError
from karui.model import Classification, Model
from karui.technique import Bench


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ({"budget": 0.5}, "The budget is 0.5", "time=0.5"),
        ({"budget": [("time", 0.5)]}, "The budget is [('time', 0.5)]", "time=0.5"),
        ({"budget": "bytes=1e999B"}, "bytes=1e999B is no limit", "bytes=200KB"),
        ({"max_drop": "1"}, "--max-drop is '1'", "from 0 to 100"),
        ({"batch": "4"}, "--batch is '4'", "whole number from 1"),
        ({"batch": 2.5}, "--batch is 2.5", "whole number from 1"),
        ({"epochs": 1.5}, "--epochs is 1.5", "whole number"),
        ({"minutes": float("inf")}, "--minutes is inf", "above 0"),
        ({"minutes": "3"}, "--minutes is '3'", "above 0"),
    ],
)
def test_settings_of_another_kind(given: dict[str, Any], message: str, hint: str, tmp_path: Path):
    model = Model(nn.Linear(16, 4).eval(), example=(torch.zeros(2, 16),), task=Classification())
    with pytest.raises(UsageError) as refused:
        karui.compress(model, Bench(), out=tmp_path / "light", **given)
    assert message in refused.value.message
    assert hint in refused.value.hint
    assert not (tmp_path / "light").exists()


def test_an_example_of_another_rank_than_the_data(tmp_path: Path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
    model = Model(net, example=(torch.zeros(2, 64),), task=Classification())
    data = TensorDataset(torch.randn(40, 1, 8, 8), torch.randint(4, (40,)))
    with pytest.raises(UsageError) as refused:
        karui.compress(model, Bench(train=data, validation=data), budget="bytes=0.5", out=tmp_path / "light")
    assert "example has shape [2, 64], and one sample of the data [1, 1, 8, 8]" in refused.value.message
    assert "Model(example=...)" in refused.value.hint
    assert not (tmp_path / "light").exists()
