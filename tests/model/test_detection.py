"""Detection as a task: anchors, what they stand for, the loss, the score, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from karui.artifact.describe import task_from_json, task_to_json
from karui.errors import KaruiError
from karui.model import Detection, Task, grid_anchors
from karui.numerics.boxes import boxes_at

TASK = Detection(anchors=grid_anchors((4, 4), 8, [(8, 8), (12, 12)]))


def targets() -> torch.Tensor:
    """Two pictures, with one and two objects."""
    rows = torch.zeros(2, 3, 5)
    rows[0, 0] = torch.tensor([3.0, 1, 1, 9, 9])
    rows[1, 1] = torch.tensor([2.0, 10, 10, 22, 22])
    rows[1, 2] = torch.tensor([1.0, 20, 2, 28, 10])
    return rows


def perfect(sure: float = 20.0) -> tuple[torch.Tensor, torch.Tensor]:
    labels, offsets = TASK.matched(targets())
    return functional.one_hot(labels.clamp(min=0), 4).transpose(1, 2).float() * sure, offsets


def test_it_is_a_task_that_can_be_saved():
    assert isinstance(TASK, Task)
    assert task_from_json(task_to_json(TASK)[0]) == TASK


def test_anchors_stand_for_the_objects_they_overlap():
    labels, offsets = TASK.matched(targets())
    anchors = torch.tensor(TASK.anchors)
    assert labels.shape == (2, 32)
    assert offsets.shape == (2, 4, 32)
    assert (labels[0] > 0).sum() == 1
    assert set(labels[1].tolist()) - {0, -1} == {1, 2}
    for picture, classes in ((0, (3,)), (1, (2, 1))):
        for number in classes:
            row = targets()[picture][targets()[picture][:, 0] == number][0]
            on = labels[picture] == number
            told = boxes_at(anchors[on], offsets[picture][:, on].T)
            torch.testing.assert_close(told, row[1:].expand_as(told), atol=1e-4, rtol=0)


def test_right_answers_cost_nothing_and_score_all():
    assert float(TASK.loss(perfect(50.0), targets())) < 1e-6
    assert TASK.scores(perfect(), targets()).tolist() == [1.0, 1.0]


def test_every_kind_of_mistake_costs():
    logits, offsets = perfect()
    nothing = torch.zeros_like(logits)
    nothing[:, 0] = 20
    assert TASK.scores((nothing, offsets), targets()).tolist() == [0.0, 0.0]
    moved = offsets.clone()
    moved[:, 0] += 1.0
    assert TASK.scores((logits, moved), targets()).tolist() == [0.0, 0.0]
    assert float(TASK.loss((logits, moved), targets())) > float(TASK.loss(perfect(), targets()))
    empty = torch.zeros(1, 3, 5)
    assert TASK.scores((nothing[:1], offsets[:1]), empty).tolist() == [1.0]
    assert TASK.scores((logits[:1], offsets[:1]), empty).tolist() == [0.0]
    assert torch.isfinite(TASK.loss((logits[:1], offsets[:1]), empty))


def test_objects_and_background_weigh_what_is_said():
    labels = torch.tensor([[2, 0, 0, -1], [0, 0, 1, -1]])
    weights = TASK.weights(labels)
    assert float(weights[labels > 0].sum()) == pytest.approx(0.25)
    assert float(weights[labels == 0].sum()) == pytest.approx(0.75)
    assert float(weights[labels < 0].sum()) == 0.0
    assert float(TASK.weights(torch.zeros(1, 3, dtype=torch.long)).sum()) == pytest.approx(0.75)


def test_boxes_of_another_class_are_not_struck_off():
    task = Detection(anchors=((0.0, 0.0, 8.0, 8.0), (0.0, 0.0, 8.0, 8.0)))
    logits = torch.tensor([[[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]]])
    assert sorted(task.found((logits, torch.zeros(1, 4, 2)))[0].classes.tolist()) == [1, 2]
    logits = torch.tensor([[[0.0, 0.0], [9.0, 8.0], [0.0, 0.0]]])
    assert task.found((logits, torch.zeros(1, 4, 2)))[0].classes.tolist() == [1]


@pytest.mark.parametrize(
    "bad",
    [
        {"anchors": ()},
        {"anchors": ((1.0, 1.0, 1.0, 2.0),)},
        {"positive": 0.3},
        {"overlap": 1.0},
        {"foreground": 0.0},
        {"weight": -1.0},
        {"confidence": 1.0},
    ],
)
def test_what_makes_no_sense_is_refused(bad: dict[str, object]):
    with pytest.raises(KaruiError):
        Detection(**{"anchors": TASK.anchors, **bad})  # pyright: ignore[reportArgumentType]


def test_a_picture_without_label_is_not_held_to_be_empty() -> None:
    task = Detection(anchors=grid_anchors((2, 2), 8, [(8, 8)]))
    boxes = torch.tensor([[[3.0, 0.0, 0.0, 8.0, 8.0]], [[0.0, 0.0, 0.0, 0.0, 0.0]]])
    silent = torch.full((1, 1, 5), -torch.inf)
    labels, wanted = task.matched(torch.cat([boxes, silent]))
    assert labels.tolist() == [[3, 0, 0, 0], [0, 0, 0, 0], [-1, -1, -1, -1]]
    assert bool(wanted.isfinite().all())
    outputs = torch.randn(1, 4, 4), torch.randn(1, 4, 4)
    assert task.loss(outputs, silent).item() == 0.0
