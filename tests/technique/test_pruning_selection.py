"""How many units go, and which."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from karui.errors import SettingError
from karui.technique.pruning.selection import removed_count, weakest


@given(size=st.integers(1, 600), ratio=st.floats(0, 0.999))
def test_a_share_is_rounded_and_takes_hardly_more_than_was_asked(size: int, ratio: float) -> None:
    removed = removed_count(size, ratio)
    assert removed <= size * (ratio + 1 / 16) + 1e-9
    assert size * ratio - removed < 1 or removed == size - 1
    assert abs(removed - size * ratio) <= 0.5 or size < 8 or removed == size - 1
    assert 0 <= removed < size


@pytest.mark.parametrize("size", [2, 3, 10, 100])
def test_a_share_that_is_a_whole_number_of_units_is_that_number(size: int) -> None:
    assert [removed_count(size, units / size) for units in range(size)] == list(range(size))


def test_of_a_pair_less_than_half_is_nobody() -> None:
    assert [removed_count(2, ratio) for ratio in (0.3, 0.4, 0.5, 0.99)] == [0, 0, 1, 1]


@given(size=st.integers(1, 600), ratio=st.floats(0, 0.999), multiple=st.integers(1, 32))
def test_a_multiple_keeps_more_and_never_less(size: int, ratio: float, multiple: int) -> None:
    removed = removed_count(size, ratio, multiple)
    kept = size - removed
    assert 0 <= removed <= removed_count(size, ratio)
    assert kept == size or kept % multiple == 0


def test_ratio_zero_removes_nothing() -> None:
    assert [removed_count(size, 0.0, multiple) for size in (1, 7, 16) for multiple in (1, 8)] == [0] * 6


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_a_ratio_out_of_range_is_refused(ratio: float) -> None:
    with pytest.raises(SettingError, match="ratio"):
        removed_count(8, ratio)


def test_the_weakest_go_and_ties_are_settled_by_order() -> None:
    assert weakest(torch.tensor([2.0, 1.0, 1.0, 1.0, 0.5]), 3).tolist() == [1, 2, 4]


def test_a_score_that_is_not_finite_is_refused() -> None:
    with pytest.raises(SettingError, match="finite"):
        weakest(torch.tensor([1.0, float("nan")]), 1)
