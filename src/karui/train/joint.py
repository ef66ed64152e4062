"""Several networks trained together: on the same batches, by turns, each seeing what the others say.

The networks are members of one module, so that devices, processes and checkpoints need not know of them. A member's
gradient moves that member alone; the others' answers are given without gradient and leave no trace in their running
statistics, which each network takes from its own forward passes. What is random in a step is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from karui.errors import NeedError, require
from karui.model import Model, Task, copied, taps
from karui.train.guide import statistics_kept
from karui.train.influence import Influence, Moment
from karui.train.randomness import undisturbed
from karui.train.teaching import of_labels
from karui.train.turn import Turn


class Joint(nn.Module):
    """Networks side by side that take the same inputs; called, the first one answers.

    Example:
        >>> Joint([nn.Linear(4, 3), nn.Linear(4, 2)])(torch.zeros(1, 4)).shape
        torch.Size([1, 3])
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, *inputs: Any) -> Any:
        """The first member's answer."""
        return self.members[0](*inputs)


@dataclass(frozen=True)
class Answer:
    """What a member says of a batch.

    Settings:
        outputs: of the network.
        layers: outputs of those of its layers that were asked for, by path.
    """

    outputs: Any
    layers: Mapping[str, Any] = field(default_factory=dict)


Pull = Callable[[int, Tensor, Any, Answer, tuple[Answer, ...]], Tensor]
"""The loss of a member: `(number, hard loss, targets, own answer with gradient, the others' without) -> loss`."""


def joined(models: Sequence[Model]) -> Model:
    """The networks as one model, with the first one's example and task. They are not copied; `fit` does that.

    A network that is given twice becomes two of the same values, each of which goes its own way.

    Raises:
        NeedError: the first one has no task.
    """
    first = models[0]
    require(
        first.task is not None,
        "The model has no task, so there is no loss to train with.",
        "Give Model(..., task=karui.Classification()), or another task.",
        NeedError,
    )
    members: list[nn.Module] = []
    for model in models:
        known = any(model.module is member for member in members)
        members.append(copied(model.module) if known else model.module)
    return Model(Joint(members), example=first.example, task=first.task)


def member_turns(
    task: Task, members: int, pull: Pull, *, layers: Sequence[str] = (), alternating: bool = True
) -> tuple[Turn, ...]:
    """The turns of a joint training: each member's own update, with an optimizer of its own.

    Args:
        task: gives the hard loss of every member.
        members: how many there are.
        pull: makes a member's loss of the hard one and of what all say.
        layers: paths, in each member, of the layers whose outputs are shown.
        alternating: whether a member is told what the others say after the updates that they have had in this step,
            rather than what all said before the first of them.
    """
    start = None if alternating else _Start([])
    return tuple(
        Turn(
            name=_name(number),
            parameters=_Own(number),
            objective=_Objective(number, task, pull, tuple(layers), start),
        )
        for number in range(members)
    )


def _name(number: int) -> str:
    return f"member {number}"


@dataclass(frozen=True)
class _Own:
    """The parameters of one member."""

    number: int

    def __call__(self, module: nn.Module) -> Iterable[nn.Parameter]:
        return _member(module, self.number).parameters()


@dataclass
class _Start:
    """What all members said at the beginning of a step; nothing of it outlives the step."""

    answers: list[Answer]


@dataclass(frozen=True)
class _Objective:
    """The loss of one member's turn."""

    number: int
    task: Task
    pull: Pull
    layers: tuple[str, ...]
    start: _Start | None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], targets: Any) -> tuple[Any, Tensor]:
        others = self._others(module, inputs)
        member = _member(module, self.number)
        # The taps come last, so that an influence's own hold this pass; and each member draws, in each step, what it
        # would if it trained alone: its dropout is that of the others, so that their layers can be compared.
        with undisturbed(), taps(member, self.layers) as seen:
            outputs = member(*inputs)
        own = Answer(outputs, dict(seen))
        hard = of_labels(self.task.loss(outputs, targets), outputs, targets, self.task)
        return outputs, self.pull(self.number, hard, targets, own, others)

    def _others(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Answer, ...]:
        assert isinstance(module, Joint)  # noqa: S101  (these turns are made for it)
        numbers = range(len(module.members))
        if self.start is None:
            return tuple(silent(module.members[n], inputs, self.layers) for n in numbers if n != self.number)
        if self.number == 0:
            self.start.answers[:] = [silent(module.members[n], inputs, self.layers) for n in numbers]
        others = tuple(answer for n, answer in enumerate(self.start.answers) if n != self.number)
        if self.number == len(module.members) - 1:
            self.start.answers.clear()
        return others


@torch.no_grad()
def silent(module: nn.Module, inputs: tuple[Any, ...], layers: Iterable[str] = ()) -> Answer:
    """What a network says as it stands, in the mode that it is in: without gradient, and without a trace.

    Neither in it nor in the random generators, of which its dropout draws.
    """
    with undisturbed(), statistics_kept(module), taps(module, layers) as seen:
        outputs = module(*inputs)
    return Answer(outputs, dict(seen))


def _member(module: nn.Module, number: int) -> nn.Module:
    return module.get_submodule(f"members.{number}")


@dataclass(frozen=True, eq=False)
class Member(Influence):
    """An influence meant for one network, acting on one member of a joint training.

    Settings:
        number: of the member, from 0.
        part: the influence, which sees the member as if it trained alone.
    """

    number: int
    part: Influence

    @property
    def taps(self) -> tuple[str, ...]:
        """The part's paths, from the whole."""
        return tuple(f"members.{self.number}{'.' if path else ''}{path}" for path in self.part.taps)

    @property
    def remarks(self) -> tuple[str, ...]:
        """The part's."""
        return self.part.remarks

    def attach(self, module: nn.Module) -> None:
        """To the member."""
        self.part.attach(_member(module, self.number))

    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        """The loss of the member's turn; those of others are left as they are."""
        return self.part.objective(loss, self._own(moment)) if moment.turn == _name(self.number) else loss

    def constraints(self, module: nn.Module, moment: Moment) -> None:
        """After the member's own update."""
        if moment.turn == _name(self.number):
            self.part.constraints(_member(module, self.number), self._own(moment))

    def finish(self, module: nn.Module) -> nn.Module:
        """Of the member."""
        module.get_submodule("members").register_module(
            str(self.number), self.part.finish(_member(module, self.number))
        )
        return module

    def _own(self, moment: Moment) -> Moment:
        seen = {path: moment.taps[whole] for path, whole in zip(self.part.taps, self.taps, strict=True)}
        return replace(moment, module=_member(moment.module, self.number), taps=seen)
