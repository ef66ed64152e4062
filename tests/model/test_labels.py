"""Labels: folding, splitting, and what becomes of grids."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from karui.model import Model, coupled_groups
from karui.model.labels import Labels
from karui.model.solve import HELD, components, solve


def test_reshape_passes_what_it_does_not_touch() -> None:
    labels = Labels()
    channels, fixed = labels.fresh(6), labels.fixed(5, "input")
    out = labels.reshape((labels.fixed(2, "input"), channels, fixed), (2, 6, 5))
    assert out[1] is channels
    assert not labels.grids


def test_folding_with_fixed_dimensions_repeats_labels() -> None:
    labels = Labels()
    channels = labels.fresh(3)
    (flat,) = labels.reshape((channels, labels.fixed(2, "input"), labels.fixed(2, "input")), (12,))
    assert flat.tolist() == np.repeat(channels, 4).tolist()


def test_splitting_what_was_folded_finds_the_channels_again() -> None:
    labels = Labels()
    channels, row = labels.fresh(3), labels.fixed(4, "input")
    (flat,) = labels.reshape((channels, row), (12,))
    again, _ = labels.reshape((flat,), (3, 4))
    found = solve(labels)
    assert found.of(again).tolist() == found.of(channels).tolist()


def test_split_into_heads_leaves_both_axes_free() -> None:
    labels = Labels()
    width = labels.fresh(12)
    heads, each = labels.unfold(width, [3, 4])
    found = solve(labels)
    assert len({*found.of(heads).tolist(), *found.of(each).tolist()}) == 7
    assert (found.of(width) >= 0).all()
    assert len(found.grids) == 1


def test_two_splits_of_the_same_channels_agree() -> None:
    labels = Labels()
    width = labels.fresh(12)
    one, other = labels.unfold(width, [3, 4]), labels.unfold(width, [3, 4])
    found = solve(labels)
    assert [found.of(a).tolist() for a in one] == [found.of(a).tolist() for a in other]


def test_a_picked_axis_drops_out_of_its_grid() -> None:
    labels = Labels()
    qkv = labels.fresh(24)
    which, heads, each = labels.unfold(qkv, [3, 2, 4])
    labels.lock(which, "it is picked by its number")
    found = solve(labels)
    rows = found.of(qkv).reshape(3, 8)
    assert (rows[0] == rows[1]).all()
    assert (rows[0] == rows[2]).all()
    assert (found.of(heads) >= 0).all()
    assert (found.of(each) >= 0).all()


def test_splits_that_cannot_both_shrink_hold_the_shorter_axis() -> None:
    labels = Labels()
    width = labels.fresh(12)
    two, six = labels.unfold(width, [2, 6])
    three, four = labels.unfold(width, [3, 4])
    found = solve(labels)
    held = {labels.reasons[code] for code in found.locked if code >= 0}
    assert HELD in held
    for axis in (two, six, three, four):
        alive = found.of(axis)
        assert (alive < 0).all() or len(set(alive.tolist())) >= 1


def test_a_locked_cell_locks_its_row_and_column_only() -> None:
    labels = Labels()
    width = labels.fresh(6)
    rows, columns = labels.unfold(width, [2, 3])
    labels.lock(width[:1], "output")
    found = solve(labels)
    assert (found.of(rows) >= 0).tolist() == [False, True]
    assert (found.of(columns) >= 0).tolist() == [False, True, True]


def test_merging_with_a_fixed_label_locks_for_its_reason() -> None:
    labels = Labels()
    one = labels.fresh(3)
    labels.merge(one, labels.fixed(3, "the model's input keeps its size"))
    found = solve(labels)
    assert {labels.reasons[c] for c in found.locked} == {"the model's input keeps its size"}


def test_rows_and_columns_that_own_alike_slices_are_groups_of_their_own() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x.view(x.shape[0], 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2))

    found = coupled_groups(Model(Square(), example=(torch.randn(1, 3, 2, 2),)))
    assert [group.size for group in found] == [2, 2]


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))))
def test_connected_components_are_scipys(graph: tuple[int, list[tuple[int, int]]]):
    """The same classes under the same numbers, whatever the edges, loops and doubles among them."""
    count, edges = graph
    one, other = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    matrix = coo_matrix((np.ones(len(edges)), (one, other)), shape=(count, count))
    total, classes = connected_components(matrix, directed=False)
    found = components(count, one, other)
    assert found[0] == total
    assert found[1].tolist() == classes.tolist()
