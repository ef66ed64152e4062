"""Batches: the fast path gives what the slow one gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from karui.data import Batches, targets_of, tensors_of
from karui.errors import DataError
from karui.model.task import split_sample


class Slow(Dataset[object]):
    """Samples one by one, as a user's own data set gives them."""

    def __init__(self, samples: list[object]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> object:
        return self.samples[number]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.lists(st.integers(0, 6), min_size=1, max_size=7))
def test_tensors_and_samples_give_the_same_batches(numbers: list[int], subset: list[int]) -> None:
    x, y = torch.arange(20.0).reshape(10, 2), torch.arange(10)
    whole = TensorDataset(x, y)
    index = torch.tensor(numbers)
    for fast, slow in (
        (Batches(whole).fetch(index), Batches(Slow(list(whole))).fetch(index)),
        (
            Batches(Subset(whole, [3] * 7)).fetch(torch.tensor(subset)),
            Batches(Slow([whole[3]] * 7)).fetch(torch.tensor(subset)),
        ),
    ):
        assert torch.equal(fast[0][0], slow[0][0])
        assert torch.equal(fast[1], slow[1])


def test_inputs_and_targets_of_every_form_of_sample() -> None:
    a, b, c = torch.zeros(1), torch.ones(1), torch.tensor(2)
    assert split_sample((a, c)) == ((a,), c)
    assert split_sample([a, c]) == ((a,), c)
    assert split_sample((a, b, c)) == ((a, b), c)
    assert split_sample(((a, b), c)) == ((a, b), c)
    assert split_sample(a) == ((a,), None)
    assert split_sample((a,)) == ((a,), None)


def test_targets_are_had_without_reading_inputs() -> None:
    class Own(Dataset[tuple[Tensor, int]]):
        targets = (4, 5, 6)

        def __len__(self) -> int:
            return 3

        def __getitem__(self, number: int) -> tuple[Tensor, int]:
            raise AssertionError("no sample is read")

    assert targets_of(Own()).tolist() == [4, 5, 6]
    assert targets_of(Subset(Own(), [2, 0])).tolist() == [6, 4]
    assert targets_of(Slow([1, 2])) is None
    maps = Own()
    maps.targets = ("a.png", "b.png", "c.png")
    assert targets_of(maps) is None
    assert targets_of(TensorDataset(torch.zeros(3))) is None
    assert tensors_of(Own()) is None


def test_samples_that_do_not_fit_together_are_named() -> None:
    with pytest.raises(DataError, match=r"Samples \[0, 1\]... of the data set cannot be put in one batch"):
        Batches(Slow([(torch.zeros(2), 0), (torch.zeros(3), 0)])).fetch(torch.tensor([0, 1]))
