"""Losses and scores of targets that are no labels."""

from __future__ import annotations

import torch
from torch.nn import functional

from karui.model import Classification, Regression
from karui.model.task import judged, labelled


def test_an_ignored_class_and_minus_100_count_for_nothing_side_by_side() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 255, 3, -100, 1, 2])
    known = labelled(y, Classification(ignore=255))
    assert known.tolist() == [True, False, True, False, True, True]
    for smoothing in (0.0, 0.2):
        task = Classification(ignore=255, label_smoothing=smoothing)
        wanted = functional.cross_entropy(logits[known], y[known], label_smoothing=smoothing)
        torch.testing.assert_close(task.loss(logits, y), wanted)
    of_class_0 = Classification(ignore=0).loss(logits, torch.tensor([0, 1, 3, -100, 1, 2]))
    torch.testing.assert_close(of_class_0, functional.cross_entropy(logits[[1, 2, 4, 5]], torch.tensor([1, 3, 1, 2])))


def test_positions_without_label_are_not_scored() -> None:
    logits = torch.eye(3)[torch.tensor([[0, 1, 2, 2]])].transpose(1, 2)
    for task, void in ((Classification(), -100), (Classification(ignore=9), 9), (Classification(ignore=9), -100)):
        assert task.scores(logits, torch.tensor([[0, 0, void, void]])).tolist() == [0.5]


def test_bytes_are_class_numbers_all() -> None:
    assert labelled(torch.tensor([156, 0], dtype=torch.uint8)).all()  # -100 as a byte is 156


def test_numbers_that_are_none_are_left_out_of_the_mean() -> None:
    y, x = torch.tensor([[1.0, -torch.inf], [-torch.inf, 4.0]]), torch.zeros(2, 2, requires_grad=True)
    loss = Regression().loss(x, y)
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(17 / 2))
    torch.testing.assert_close(x.grad, torch.tensor([[-1.0, 0.0], [0.0, -4.0]]))


def test_squared_error_is_of_the_numbers_that_are_there() -> None:
    y = torch.tensor([[1.0, -torch.inf], [3.0, 1.0], [-torch.inf, -torch.inf]])
    assert Regression().scores(torch.zeros(3, 2), y).tolist() == [1.0, 5.0, 0.0]
    assert judged(y, 3).tolist() == [True, True, False]


def test_a_sample_is_judged_where_any_part_of_its_target_is_a_label() -> None:
    tags, numbers = torch.tensor([[9, -100], [-100, -100], [1, 9]]), torch.tensor([-torch.inf, -torch.inf, -torch.inf])
    assert judged({"tags": tags, "numbers": numbers}, 3, Classification(ignore=9)).tolist() == [False, False, True]
    assert judged((tags, torch.ones(3)), 3).all()
    assert judged(torch.zeros(2, 0, 5), 2).all()  # pictures in which there is nothing
