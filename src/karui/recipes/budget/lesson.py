"""What the dense network teaches one that recovers: its soft targets, its numbers, or nothing, and why.

Measured over three seeds, perceptrons of 12-64-64 units cut to 24, 100 to 2,000 samples with noise, 3 and 20 passes at
two rates: under the numbers of the dense network the squared error of regressions is 10 % lower (20 passes of large
steps, one output) to 0.2 % higher than on targets alone, in most cases lower. Losses of one's own over such numbers are
another matter: binary cross-entropy of labels was up to 3 % higher. So those learn from the targets alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from karui.data import Batches
from karui.distill import KnowledgeDistillation, LogitRegression
from karui.errors import told
from karui.measuring.inference import inference
from karui.model import Classification, Regression
from karui.model.task import labelled
from karui.train import Influence
from karui.train.teaching import MEMORY, answer_bytes

if TYPE_CHECKING:
    from typing import Any

    from karui.model import Model, Task
    from karui.technique import Bench

WEIGHT = 0.9
"""Share of the dense network's numbers in the loss, as of its soft targets; 0.5 and 1 ended at the same error."""
LOOKED_AT = 256
"""Samples whose targets tell whether they are numbers of classes."""
SOFT = "soft targets of the dense network [30]"
NUMBERS = "squared distance from the numbers of the dense network [31]"


@dataclass(frozen=True)
class Untaught(Influence):
    """Nothing, and the reason for the lineage.

    Settings:
        why: that reason.

    Example:
        >>> Untaught("it gives several tensors").remarks
        ('teacher: none, as it gives several tensors',)
    """

    why: str

    @property
    def remarks(self) -> tuple[str, ...]:
        """One line."""
        return (f"teacher: none, as {self.why}",)


def lesson(dense: Model, bench: Bench) -> str | Untaught:
    """What networks of this task learn from the dense one while they recover: `SOFT`, `NUMBERS`, or why nothing.

    Args:
        dense: the teacher.
        bench: its training data tell what the targets of a task of one's own are.
    """
    if isinstance(dense.task, Classification):
        return SOFT
    with inference(dense.module) as module:
        outputs = module(*dense.example)
    if not isinstance(outputs, Tensor):
        return Untaught(f"it gives {told(outputs)}, and a teacher's term is known for one tensor of outputs")
    if isinstance(dense.task, Regression):
        return NUMBERS
    name = type(dense.task).__name__
    if not _are_classes(outputs, _targets(bench), dense.task):
        return Untaught(
            f"targets of the task {name} are no numbers of classes, and how outputs are compared is its own"
        )
    if bool((outputs >= 0).all()) and torch.allclose(outputs.sum(1), torch.ones(())):
        return Untaught(f"outputs under the task {name} are probabilities, and soft targets are made of logits")
    return SOFT


def teaching(model: Model, dense: Model, bench: Bench, epochs: int) -> Influence:
    """The dense model as teacher, its answers kept; where there is nothing to teach, nothing.

    Args:
        model: the student.
        dense: the teacher. It is not copied: copies of the network are few in a budget, and nothing trains it.
        bench: training data and a folder for answers.
        epochs: passes for which answers are kept.
    """
    kind = lesson(dense, bench)
    if isinstance(kind, Untaught):
        return kind
    assert bench.train is not None  # noqa: S101  (who trains has data)
    room = 0
    if bench.checkpoints is not None:
        room = min(epochs * len(bench.train), MEMORY // max(answer_bytes(dense) or 0, 1))
    if kind == SOFT:
        soft = KnowledgeDistillation(teacher=dense, epochs=epochs, remember=room)
        return soft.influence(model, bench, shared=True)
    numbers = LogitRegression(teacher=dense, epochs=epochs, remember=room, normalise=False)
    return numbers.influence(model, bench, weight=WEIGHT, averaged=True, shared=True)


def _targets(bench: Bench) -> Any:
    """Targets of the first samples."""
    batches = Batches(bench.train)
    return batches.fetch(torch.arange(min(LOOKED_AT, len(batches))))[1]


def _are_classes(outputs: Tensor, targets: Any, task: Task | None) -> bool:
    """Whether outputs are scores of classes [batch, classes, ...], and targets the numbers of these."""
    if not isinstance(targets, Tensor) or outputs.ndim < 2 or outputs.shape[1] < 2:
        return False
    whole = not targets.is_floating_point() and targets.dtype != torch.bool
    if not whole or targets.shape[1:] != outputs.shape[2:]:
        return False
    counted = targets[labelled(targets, task)]
    return bool(((counted >= 0) & (counted < outputs.shape[1])).all())
