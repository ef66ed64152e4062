"""Unfoldings: the right entry in the right place, and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karui.errors import SettingError
from karui.numerics.unfold import fold, split_groups, unfold


@settings(max_examples=50, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    order=st.randoms(use_true_random=False),
)
def test_fold_undoes_unfold(shape: list[int], order: object) -> None:
    dims = list(range(len(shape)))
    order.shuffle(dims)  # pyright: ignore[reportAttributeAccessIssue]
    rows = dims[: max(1, len(dims) // 2)]
    tensor = torch.randn(shape)
    matrix = unfold(tensor, rows)
    assert matrix.shape[0] == torch.tensor([shape[dim] for dim in rows]).prod()
    assert torch.equal(fold(matrix, rows, shape), tensor)


def test_unfoldings_of_a_kernel_hold_its_entries_where_the_papers_say() -> None:
    kernel = torch.randn(6, 4, 3, 2)
    n, c, i, j = 5, 2, 1, 1
    assert unfold(kernel, (0,))[n, c * 6 + i * 2 + j] == kernel[n, c, i, j]
    assert unfold(kernel, (1,))[c, n * 6 + i * 2 + j] == kernel[n, c, i, j]
    assert unfold(kernel, (1, 2))[c * 3 + i, n * 2 + j] == kernel[n, c, i, j]
    assert unfold(kernel, (2, 3))[i * 2 + j, n * 4 + c] == kernel[n, c, i, j]


def test_groups_are_blocks_of_filters() -> None:
    weight = torch.randn(6, 2, 3, 3)
    blocks = split_groups(weight, 3)
    assert blocks.shape == (3, 2, 2, 3, 3)
    assert torch.equal(blocks[1], weight[2:4])


@pytest.mark.parametrize("rows", [(0, 0), (4,), (-1,)])
def test_wrong_dimensions_are_refused(rows: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match="rows"):
        unfold(torch.zeros(2, 2, 3, 3), rows)
