"""Soft targets: a training in which frozen teachers tell what they see in each batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from karui.errors import NeedError, require, told
from karui.measuring.inference import inference, tensors_of
from karui.model import Model, Task
from karui.model.task import labelled
from karui.numerics.soft_targets import Rule, arithmetic, distillation_loss, widened
from karui.train.answers import Answers
from karui.train.fingerprint import fingerprint
from karui.train.frozen import Frozen
from karui.train.influence import Influence, Moment

MEMORY = 2**28
"""Bytes of teachers' answers that are kept at most, where nobody says how many samples are to be."""
DISK = 2**32
"""Bytes of answers that are kept beside checkpoints at most by themselves; they are read when they are asked for."""


@runtime_checkable
class Softened(Protocol):
    """A network that was made of something that tells probabilities, and has no logit for a zero."""

    @property
    def scores_of_zero(self) -> tuple[float, ...]:
        """The numbers that stand for the logarithm of zero."""
        ...


class _Zeros:
    """How many probabilities were told, and how many of them were zero; it says nothing of itself, as `Answers`."""

    __slots__ = ("numbers", "rounded", "told", "zero")

    def __init__(self, networks: list[Frozen], *, half: bool) -> None:
        self.numbers = [one.module.scores_of_zero if isinstance(one.module, Softened) else () for one in networks]
        self.rounded = torch.float16 if half else torch.float32
        self.told = self.zero = 0

    def count(self, answers: Tensor) -> None:
        """Look at the answers of each network that may have such."""
        for said, numbers in zip(answers, self.numbers, strict=True):
            if numbers:
                stand_ins = torch.tensor(numbers, dtype=self.rounded).to(said)
                self.told += said.numel()
                self.zero += int(torch.isin(said, stand_ins).sum())

    @property
    def remarks(self) -> tuple[str, ...]:
        """One line where there were any."""
        if not self.zero:
            return ()
        share = f"{self.zero:,} of {self.told:,} probabilities ({self.zero / self.told:.1%})"
        count = " or ".join(sorted({f"{math.exp(number):.1e}" for one in self.numbers for number in one}))
        return (f"teacher: {share} were zero, which has no logarithm; each counts as {count}",)


class Teachers:
    """Frozen copies of networks, in evaluation mode, on whatever device they are asked on.

    They are no part of any module that trains: no optimiser, checkpoint or saved model sees them.

    Args:
        models: the networks; left as they are.
        remember: how many samples' answers to keep (each counts once for each way it was augmented). They serve every
            training that draws the same samples: with the same seed and settings, all students of these teachers.
        folder: where answers are kept for later processes, for the same teachers only; None keeps them in memory.
        half: keep 16 bits of each number.
        classes: whether they tell classes apart; else any numbers will do, as in a regression.
        why: whether answers are kept and for what reason, for people; None tells it of the other arguments.
        shared: whether the copies have the networks' own parameters, as in `Frozen`: for a training with many copies
            of a network about, such as a budget's, in which nothing changes the teacher.

    Example:
        >>> teachers = Teachers((Model(nn.Linear(4, 3), example=(torch.zeros(1, 4),)),))
        >>> teachers((torch.zeros(2, 4),)).shape
        torch.Size([1, 2, 3])
    """

    def __init__(
        self,
        models: tuple[Model, ...],
        remember: int = 0,
        folder: Path | None = None,
        *,
        half: bool = False,
        classes: bool = True,
        why: str | None = None,
        shared: bool = False,
    ) -> None:
        require(len(models) > 0, "There is no teacher.", "Give at least one model.", NeedError)
        self._classes = classes
        self._networks = [Frozen(model.module, shared=shared) for model in models]
        if folder is not None and remember:
            # Another version of torch rounds otherwise: what it said is not what this one would say.
            folder = folder / fingerprint(torch.__version__, *self.modules)
        self._answers = Answers(remember, folder if remember else None, half=half, why=why)
        self._zeros = _Zeros(self._networks, half=half)

    def __len__(self) -> int:
        """The number of teachers."""
        return len(self._networks)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The frozen copies."""
        return tuple(network.module for network in self._networks)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Whether answers are kept, and why; and how many probabilities were zero, where there were any."""
        return (self._answers.why, *self.zeros)

    @property
    def zeros(self) -> tuple[str, ...]:
        """One line that tells how many of the probabilities that were told so far have no logarithm, if any."""
        return self._zeros.remarks

    @torch.no_grad()
    def __call__(self, inputs: tuple[Any, ...]) -> Float[Tensor, "teachers batch classes *positions"]:
        """Each teacher's logits for a batch.

        Raises:
            NeedError: a teacher gives something else than a tensor of logits, or not the same classes as another.
        """
        answers = self._answers.of(inputs, self._ask) if self._answers.room else self._ask(inputs)
        self._zeros.count(answers)
        return answers

    def _ask(self, inputs: tuple[Any, ...]) -> Tensor:
        answers = [_answer(network, inputs) for network in self._networks]
        for answer in answers:
            logits = isinstance(answer, Tensor) and answer.ndim >= 2 and answer.shape[1] >= 2
            require(
                logits or (not self._classes and isinstance(answer, Tensor)),
                f"The teacher gives {told(answer)}, not logits of shape [batch, classes, ...].",
                "Soft targets are for classification.",
                NeedError,
            )
            require(
                answer.shape == answers[0].shape,
                f"One teacher gives {told(answers[0])} and another {told(answer)}.",
                "All teachers of an ensemble must know the same classes.",
                NeedError,
            )
        return torch.stack([widened(answer) for answer in answers])


def answer_bytes(model: Model) -> int | None:
    """Bytes of what a network says of one sample; None in double precision, in which nothing is kept.

    Example:
        >>> answer_bytes(Model(nn.Linear(4, 3), example=(torch.zeros(2, 4),)))
        12
    """
    with inference(model.module) as module:
        said = [output for output in tensors_of(module(*model.example)) if output.ndim]
    wide = any(output.dtype.itemsize > 4 for output in said)
    return None if wide else sum(output[:1].numel() * 4 for output in said)


def _answer(network: Frozen, inputs: tuple[Any, ...]) -> Any:
    with network.on(inputs) as module:
        return module(*inputs)


@dataclass(frozen=True, eq=False, kw_only=True)
class SoftTargets(Influence):
    """The loss becomes a T² CE(teachers' soft targets) + (1 - a) loss, on the very batch that the student sees.

    The loss is what the influences before it in a `Together` have made of it, so that their terms too are multiplied by
    1 - a, and are gone at a = 1. To give another term the weight that it names, put it after the soft targets, as
    `bench.under(soft)` does with what a technique itself adds.

    Settings:
        teachers: the networks that teach; an ensemble if there are several.
        temperature: T, for student and teachers alike.
        weight: a, the share of the soft part, in [0, 1].
        rule: how several teachers' logits become one distribution.

    Raises:
        SettingError: temperature or weight is out of range.
        NeedError: teacher and student do not give logits of the same shape.

    Example:
        >>> net = nn.Linear(4, 3)
        >>> influence = SoftTargets(teachers=Teachers((Model(net, example=(torch.zeros(1, 4),)),)), temperature=4.0)
        >>> x = torch.zeros(2, 4)
        >>> moment = Moment(net, (x,), torch.tensor([0, 1]), net(x))
        >>> bool(influence.objective(torch.tensor(1.0), moment) > 0)
        True

        A term of 10, before the soft targets and after them:

        >>> from karui.train import Together
        >>> class Term(Influence):
        ...     def objective(self, loss, moment):
        ...         return loss + 10
        >>> alone, before, after = (
        ...     Together(*parts).objective(torch.tensor(1.0), moment).item()
        ...     for parts in ((influence,), (Term(), influence), (influence, Term()))
        ... )
        >>> round(before - alone, 4), round(after - alone, 4)
        (1.0, 10.0)
    """

    teachers: Teachers
    temperature: float = 4.0
    weight: float = 0.9
    rule: Rule = field(default=arithmetic)

    def __post_init__(self) -> None:
        require(self.temperature > 0, f"temperature is {self.temperature}; give a positive number, for example 4")
        require(0 <= self.weight <= 1, f"weight is {self.weight}; give a share in [0, 1], for example 0.9")

    @property
    def remarks(self) -> tuple[str, ...]:
        """Whether the teachers' answers are kept."""
        return self.teachers.remarks if self.weight else ()

    def ahead(self, inputs: tuple[Any, ...]) -> Tensor | None:
        """What the teachers say of the batch."""
        return self.teachers(inputs) if self.weight else None

    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        """The mixed loss of this step."""
        if self.weight == 0:
            return loss
        answers = self.teachers(moment.inputs) if moment.ahead is None else moment.ahead
        outputs = moment.outputs
        if not (isinstance(outputs, Tensor) and outputs.shape == answers.shape[1:]):  # words only where they are needed
            raise NeedError(
                f"The student gives {told(outputs)} and the teacher logits of shape {tuple(answers.shape[1:])}.",
                "A teacher must know the same classes.",
            )
        weight = 1.0 if is_unlabelled(moment.targets, moment.task) else self.weight
        targets = self.rule(answers, self.temperature)
        return distillation_loss(outputs, targets, loss, temperature=self.temperature, weight=weight)


def of_labels(loss: Any, outputs: Any, targets: Any, task: Task | None = None) -> Any:
    """The loss; 0, with a gradient of zero, where it is the mean over the labels of a batch that has none: no number.

    Example:
        >>> none, outputs = torch.tensor([-100]), torch.ones(1, 2)
        >>> of_labels(torch.tensor(torch.nan), outputs, none).item(), of_labels(torch.tensor(2.0), outputs, none).item()
        (0.0, 2.0)
    """
    if not (isinstance(loss, Tensor) and loss.ndim == 0 and bool(loss.isnan()) and is_unlabelled(targets, task)):
        return loss
    silent = [output.float().sum() * 0 for output in tensors_of(outputs) if output.is_floating_point()]
    return torch.stack(silent).sum() if silent else loss


def is_unlabelled(targets: Any, task: Task | None = None) -> bool:
    """Whether no sample of the batch has a label (the task's loss is then not a number).

    Example:
        >>> from karui.model import Classification
        >>> void = torch.tensor([[255, 255]])
        >>> is_unlabelled(void), is_unlabelled(void, Classification(ignore=255))
        (False, True)
    """
    values = tensors_of(targets)
    filled = any(value.numel() for value in values)  # pictures without objects have empty targets, and are labelled
    return filled and not any(bool(labelled(value, task).any()) for value in values)
