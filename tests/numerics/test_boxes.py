"""Boxes: overlaps, offsets, assignment, suppression, and average precision against cases done by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karui.numerics.boxes import (
    Found,
    assigned,
    average_precision,
    boxes_at,
    hits,
    mean_average_precision,
    offsets_from,
    overlaps,
    suppressed,
)

ALL = torch.ones(1, 2, dtype=torch.bool)
UNIT = torch.tensor([[0.0, 0.0, 10.0, 10.0]])


def boxes(seed: int, count: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=draw) * 20
    return torch.cat([low, low + 1 + torch.rand(count, 2, generator=draw) * 20], 1)


def found(*rows: tuple[float, ...]) -> Found:
    """Rows of class, left, top, right, bottom, score."""
    table = torch.tensor(rows).reshape(-1, 6)
    return Found(table[:, 1:5], table[:, 0].long(), table[:, 5])


def test_overlaps_by_hand():
    other = torch.tensor([[5.0, 0, 15, 10], [0, 0, 10, 5], [20, 20, 30, 30], [0, 0, 10, 10], [3, 3, 3, 3]])
    assert overlaps(UNIT, other)[0].tolist() == pytest.approx([1 / 3, 0.5, 0.0, 1.0, 0.0])


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_offsets_there_and_back(seed: int):
    anchors, wanted = boxes(seed, 6), boxes(seed + 1, 6)
    torch.testing.assert_close(boxes_at(anchors, offsets_from(anchors, wanted)), wanted, atol=1e-3, rtol=1e-4)
    shared = overlaps(anchors, wanted)
    torch.testing.assert_close(shared, overlaps(wanted, anchors).T)
    assert bool(((shared >= 0) & (shared <= 1 + 1e-6)).all())


def test_each_object_has_an_anchor_and_what_lies_between_counts_for_nothing():
    anchors = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10], [0, 4, 10, 14], [40, 40, 50, 50]])
    objects = torch.tensor([[[0.0, 0, 10, 10], [18, 0, 28, 10]]])
    assert assigned(anchors, objects, ALL, 0.5, 0.4).tolist() == [[0, 1, -2, -1]]
    there = torch.tensor([[True, False]])
    assert assigned(anchors, objects, there, 0.5, 0.4).tolist() == [[0, -1, -2, -1]]
    assert assigned(anchors, objects, ~ALL, 0.5, 0.4).tolist() == [[-1, -1, -1, -1]]


def test_the_best_of_overlapping_boxes_stays():
    some = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [30, 0, 40, 10]])
    assert suppressed(some, torch.tensor([0.5, 0.9, 0.1]), 0.5) == [1, 2]
    assert suppressed(some[:0], torch.zeros(0), 0.5) == []


def test_an_object_is_found_once_and_by_its_class():
    truth = found((1, 0, 0, 10, 10, 1), (2, 20, 0, 30, 10, 1))
    seen = found((1, 0, 0, 10, 9, 0.6), (1, 0, 0, 10, 10, 0.9), (1, 20, 0, 30, 10, 0.8), (2, 26, 0, 36, 10, 0.7))
    assert hits(seen, truth).tolist() == [False, True, False, False]
    assert hits(seen, found()).tolist() == [False] * 4


@pytest.mark.parametrize(
    ("right", "scores", "objects", "area"),
    [
        ([True, True], [0.9, 0.8], 2, 1.0),
        ([True, False, True], [0.9, 0.8, 0.7], 2, (1 + 2 / 3) / 2),
        ([False, True], [0.9, 0.8], 1, 0.5),
        ([False, True], [0.8, 0.9], 1, 1.0),
        ([True, False, False, True, True], [5, 4, 3, 2, 1], 4, (1 + 3 / 5 + 3 / 5) / 4),
        ([], [], 3, 0.0),
    ],
)
def test_average_precision_by_hand(right: list[bool], scores: list[float], objects: int, area: float):
    told = average_precision(torch.tensor(right, dtype=torch.bool), torch.tensor(scores), objects)
    assert told == pytest.approx(area)


def test_the_mean_is_over_the_classes_there_are():
    truth = [found((1, 0, 0, 10, 10, 1)), found((1, 0, 0, 10, 10, 1), (2, 20, 0, 30, 10, 1))]
    seen = [found((1, 0, 0, 10, 10, 0.9), (3, 0, 0, 10, 10, 0.9)), found((2, 20, 0, 30, 10, 0.5))]
    assert mean_average_precision(seen, truth) == pytest.approx((0.5 + 1.0) / 2)
    assert mean_average_precision(truth, truth) == 1.0
    assert mean_average_precision([found()], [found()]) == 0.0
