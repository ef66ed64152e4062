"""Splits and hold_out: disjoint, complete, in proportion, repeatable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from karui.data import Splits, hold_out, load_data
from karui.errors import DataError, SettingError


def numbered(labels: list[int]) -> TensorDataset:
    return TensorDataset(torch.arange(len(labels)), torch.tensor(labels))


@given(st.lists(st.integers(0, 4), min_size=4, max_size=60), st.floats(0.2, 0.8), st.integers(0, 9))
def test_every_class_gives_its_share_to_within_one_sample(labels: list[int], share: float, seed: int) -> None:
    rest, held = hold_out(numbered(labels), share, seed)
    assert sorted([*rest.tensors[0].tolist(), *held.tensors[0].tolist()]) == list(range(len(labels)))
    assert len(held) == round(share * len(labels))
    for label in set(labels):
        got = held.tensors[1].tolist().count(label)
        assert abs(got - share * labels.count(label)) <= 1.5


def test_the_seed_decides() -> None:
    data = numbered([0, 1] * 20)
    draws = [hold_out(data, 0.3, seed)[1].tensors[0].tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_data_without_cheap_targets_is_drawn_at_random() -> None:
    class Own(Dataset[tuple[Tensor, int]]):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, number: int) -> tuple[Tensor, int]:
            raise AssertionError("splitting must not read samples")

    rest, held = hold_out(Own(), 0.25, 0)
    assert isinstance(rest, Subset)
    assert (len(rest), len(held)) == (15, 5)
    assert not set(rest.indices) & set(held.indices)


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(SettingError, match="share is 1"):
        hold_out(numbered([0, 1]), 1.0, 0)
    with pytest.raises(DataError, match="cannot be held out of 2 samples"):
        hold_out(numbered([0, 1]), 0.1, 0)
    with pytest.raises(DataError, match="to train on are empty"):
        hold_out(numbered([]), 0.1, 0)


def test_digits_are_split_once_and_for_all(digits: Splits) -> None:
    other = load_data("digits", seed=3)
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1080, 120, 597)
    assert torch.equal(digits.test.tensors[0], other.test.tensors[0])
    assert not torch.equal(digits.validation.tensors[0], other.validation.tensors[0])
    assert digits.classes == tuple("0123456789")
    assert digits.train.tensors[0].min() == 0
    assert digits.train.tensors[0].max() == 1
    counts = torch.bincount(digits.test.tensors[1])
    assert counts.min() >= 57
    assert counts.max() <= 62
