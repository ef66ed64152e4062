"""Influences that only watch: a snapshot of the weights at one step, the validation loss along the way.

What they have seen lies in buffers of the module while it trains, so that a resumed training has it too; `finish` takes
it off, into the influence that was given. Make a new one for each training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from karui.data import Batches
from karui.errors import NeedError
from karui.measuring.inference import inference
from karui.model import Task
from karui.train.influence import Influence, Moment

SUFFIX = "_snapshot"
CURVE = "validation_losses"


@dataclass(frozen=True, eq=False)
class Snapshot(Influence):
    """Keeps all parameters and buffers as they are after `step` steps; 0 is the start.

    Example:
        >>> net, snapshot = nn.Linear(2, 1), Snapshot(0)
        >>> snapshot.attach(net)
        >>> _ = snapshot.finish(net)
        >>> sorted(snapshot.state)
        ['bias', 'weight']
    """

    step: int
    state: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def attach(self, module: nn.Module) -> None:
        """Put a copy of each tensor beside it."""
        for name, value in list(module.state_dict().items()):
            owner, leaf = _owner(module, name)
            owner.register_buffer(leaf + SUFFIX, value.detach().clone())

    def constraints(self, module: nn.Module, moment: Moment) -> None:
        """Take the snapshot when its step has been done."""
        if moment.step + 1 == self.step:
            held = dict(module.state_dict())
            for name, value in held.items():
                if not name.endswith(SUFFIX) and name + SUFFIX in held:
                    held[name + SUFFIX].copy_(value)

    def finish(self, module: nn.Module) -> nn.Module:
        """Take the copies off the module."""
        for name in [name for name in module.state_dict() if name.endswith(SUFFIX)]:
            owner, leaf = _owner(module, name)
            self.state[name.removesuffix(SUFFIX)] = owner.get_buffer(leaf).clone()
            delattr(owner, leaf)
        return module


@dataclass(frozen=True, eq=False, kw_only=True)
class ValidationLosses(Influence):
    """The loss on other data at equal distances through a training.

    Settings:
        data: data set of (input, target) pairs.
        task: whose loss it is.
        points: how often it is measured.
    """

    data: Any
    task: Task | None
    points: int
    steps: list[int] = field(default_factory=list, init=False, repr=False)
    losses: list[float] = field(default_factory=list, init=False, repr=False)

    def attach(self, module: nn.Module) -> None:
        """Make room: a row of steps and one of losses."""
        module.register_buffer(CURVE, torch.zeros(2, self.points, dtype=torch.float64))

    def constraints(self, module: nn.Module, moment: Moment) -> None:
        """Measure, when it is time."""
        done = moment.step + 1
        due = [point for point in range(self.points) if round(moment.steps * (point + 1) / self.points) == done]
        if due:
            loss = mean_loss(module, self.data, self.task)
            for point in due:
                module.get_buffer(CURVE)[:, point] = torch.tensor([done, loss], dtype=torch.float64)

    def finish(self, module: nn.Module) -> nn.Module:
        """Take the curve off the module."""
        steps, losses = module.get_buffer(CURVE).tolist()
        self.steps[:], self.losses[:] = [int(step) for step in steps], losses
        delattr(module, CURVE)
        return module

    @property
    def best_step(self) -> int:
        """The step of the smallest loss: where early stopping would have stopped. 0 before the training."""
        return self.steps[self.losses.index(min(self.losses))] if self.losses else 0


def mean_loss(module: nn.Module, data: Any, task: Task | None, batch: int = 256) -> float:
    """The task's loss over a whole data set, in evaluation mode.

    Raises:
        NeedError: there is no task.
    """
    if task is None:
        raise NeedError("The model has no task to take a loss from.", "Give Model(..., task=karui.Classification()).")
    batches, total = Batches(data), 0.0
    with inference(module):
        for index in torch.arange(len(batches)).split(batch):
            inputs, targets = batches.fetch(index)
            total += float(task.loss(module(*inputs), targets)) * len(index)
    return total / len(batches)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
