"""Calibration batches: seeded, distinct samples, inputs only."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

from karui.data import calibration_batches
from karui.errors import DataError, SettingError

DATA = TensorDataset(torch.arange(50.0), torch.zeros(50))


def drawn(**settings: int) -> list[float]:
    return torch.cat([x for (x,) in calibration_batches(DATA, **settings)]).tolist()


def test_the_seed_draws_distinct_samples() -> None:
    first = drawn(samples=20, batch=7, seed=1)
    assert len(first) == len(set(first)) == 20
    assert first == drawn(samples=20, batch=20, seed=1)
    assert first != drawn(samples=20, batch=7, seed=2)
    assert sorted(drawn(samples=500)) == DATA.tensors[0].tolist()


def test_models_of_several_inputs_get_them_all() -> None:
    x = torch.zeros(4, 3)
    assert [len(batch) for batch in calibration_batches(TensorDataset(x, x, x), samples=4, batch=4)] == [2]


def test_nonsense_is_refused_at_the_call() -> None:
    with pytest.raises(SettingError, match="samples is 0"):
        calibration_batches(DATA, samples=0)
    with pytest.raises(SettingError, match="batch is 0"):
        calibration_batches(DATA, batch=0)
    with pytest.raises(DataError, match="no samples"):
        calibration_batches(TensorDataset(torch.zeros(0)))
