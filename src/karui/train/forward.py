"""The computation of one update as a module, so that wrappers (precision, processes) see all of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from karui.errors import NeedError, TrainingError, require
from karui.model import Task
from karui.train.influence import Influence, Moment
from karui.train.teaching import of_labels
from karui.train.turn import Turn


class Forward(nn.Module):
    """From a batch to the loss of a turn, under an influence.

    Gradients are averaged between processes by wrapping a module's forward: a loss that calls parts of the network, or
    an influence with layers of its own, must happen inside of it. `seen` holds the outputs of tapped layers; `moment`
    is the last one, for the constraints.
    """

    def __init__(
        self,
        module: nn.Module,
        turns: tuple[Turn, ...],
        task: Task | None,
        influence: Influence,
        seen: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.module = module
        self.turns = turns
        self.task = task
        self.influence = influence
        self.moment: Moment | None = None
        self.seen = seen
        needs_task = [turn.name for turn in turns if turn.objective is None]
        require(
            task is not None or not needs_task,
            "The model has no task, so there is no loss to train with.",
            "Give Model(..., task=karui.Classification()), or another task.",
            NeedError,
        )

    def forward(self, number: int, inputs: tuple[Any, ...], targets: Any, position: dict[str, int]) -> Tensor:
        """The loss of turn `number`; `position` tells the step and the epoch."""
        objective, ahead = self.turns[number].objective, self.influence.ahead(inputs)
        if objective is None:
            assert self.task is not None  # noqa: S101  (checked when this was made)
            outputs = self.module(*inputs)
            loss = self.task.loss(outputs, targets)
        else:
            outputs, loss = objective(self.module, inputs, targets)
        loss = of_labels(loss, outputs, targets, self.task)
        self.moment = Moment(
            module=self.module,
            inputs=inputs,
            targets=targets,
            outputs=outputs,
            taps=self.seen,
            turn=self.turns[number].name,
            ahead=ahead,
            plain=loss,
            task=self.task,
            **position,
        )
        loss = self.influence.objective(loss, self.moment)
        require(
            isinstance(loss, Tensor) and loss.ndim == 0,
            f"The loss of turn '{self.turns[number].name}' is "
            f"{f'of shape {tuple(loss.shape)}' if isinstance(loss, Tensor) else f'a {type(loss).__name__}'}.",
            "Give one number, for example the mean over the batch.",
            TrainingError,
        )
        return loss
