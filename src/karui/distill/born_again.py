"""Born-again networks: Furlanello, Lipton, Tschannen, Itti and Anandkumar 2018 (survey 37).

A trained network teaches a new one of the very same architecture, which starts from other initial values; that one
teaches the next. Generations are often better than the first network, and their mean better still.

Pays where there are few labels, or wrong ones: the teacher's probabilities tell what a label leaves out. Does not pay
where the first network is limited by its size rather than by its labels; nothing gets smaller, and the mean of k
generations is k times as large and slow as one.

Measured on 250 digits of which a fifth are labelled at random, eight seeds, taught by outputs alone
(`results/born_again_network.md`): after 150 passes, when labels are learned by heart, the first generation is 1.4
points better than its teacher (80.7 to 82.2 %), the mean of three 1.7, and 1.1 better than the mean of three networks
that were trained alone; after 60 passes there is no gain beyond chance. The control "dkpp" is better than either there
(87.1 %): what helps against wrong labels is that targets are soft, not which classes the teacher holds alike.

Students of another architecture than their first teacher's, as the paper's ResNets of a DenseNet, are the given network
under `teacher`: it teaches the first generation, and each generation the next.

Paper -> here: f_0 -> the given model or `teacher`, f_1, f_2, ... -> generations, BAN+L and BAN -> labels=True and
False, CWTM and DKPP -> loss="cwtm" and "dkpp", BANE -> ensemble.

DEPARTURE: the mean of the generations is that of their probabilities, given as its logarithm, so that it may stand
where a classifier's logits are expected.

DEPARTURE: beside the influence of another technique the losses that have no plain labels in them (labels=False, and
"cwtm") are terms of their own, and what that one has made of the loss, labels included, is kept: the paper knows no
other term, and whoever asks for two wants both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, distributed
from torch.utils._pytree import tree_map

from karui.distill._asking import SAME_CLASSES, require_classes
from karui.distill._teachers import Teacher, keeping, lacking_teachers, remark, teachers_of
from karui.errors import NeedError, require, told
from karui.model import Classification, Model, Note, Task
from karui.model.averaging import averaged
from karui.model.task import labelled
from karui.numerics.soft_targets import soft_cross_entropy, soften
from karui.technique import Card, technique
from karui.technique.redraw import redrawn
from karui.train import Influence, Moment
from karui.train.randomness import seed_of
from karui.train.teaching import Teachers, is_unlabelled

if TYPE_CHECKING:
    from karui.technique import Bench

SLUG = "born_again_network"
NUMBERS = "Numbers are learned by logit_regression, whose student may be of the same architecture."
Loss = Literal["kd", "cwtm", "dkpp"]
PLAIN = Classification()


def confidence_weights(
    probabilities: Float[Tensor, "samples classes"], kept: Bool[Tensor, "samples"] | None = None
) -> Float[Tensor, "samples"]:
    """CWTM's weight of each sample: the teacher's largest probability, over their sum in the batch (section 3.2).

    Where processes train together the batch is that of all of them: as their gradients are averaged, weights of one
    are then over the mean of their sums.

    Args:
        probabilities: the teacher's.
        kept: samples that count; None is all.

    Example:
        >>> confidence_weights(torch.tensor([[0.75, 0.25], [0.25, 0.75]])).tolist()
        [0.5, 0.5]
    """
    largest = probabilities.max(1).values
    if kept is not None:
        largest = largest * kept
    total = largest.sum()
    if distributed.is_available() and distributed.is_initialized():
        total = total.detach().clone()
        distributed.all_reduce(total)
        total = total / distributed.get_world_size()
    return largest / total.clamp(min=torch.finfo(total.dtype).tiny)


def permuted(probabilities: Float[Tensor, "samples classes"]) -> Float[Tensor, "samples classes"]:
    """DKPP: the largest probability stays where it is, the others are shuffled, each sample by a draw of its own.

    Example:
        >>> permuted(torch.tensor([[0.1, 0.6, 0.3]]))[0, 1].item() == torch.tensor(0.6).item()
        True
    """
    samples, classes = probabilities.shape
    top = probabilities.argmax(1, keepdim=True)
    others = torch.arange(classes, device=probabilities.device).expand(samples, -1)
    places = others[others != top].reshape(samples, classes - 1)
    order = torch.rand(samples, classes - 1, device=probabilities.device).argsort(1)
    return probabilities.scatter(1, places, probabilities.gather(1, places.gather(1, order)))


def weighted_cross_entropy(
    logits: Float[Tensor, "batch classes *positions"],
    targets: Int[Tensor, "batch *positions"],
    probabilities: Float[Tensor, "samples classes"],
    task: Classification = PLAIN,
) -> Float[Tensor, ""]:
    """The task's cross-entropy, each sample (or position) by the teacher's confidence; 0 where there is no label.

    Args:
        logits: the student's.
        targets: class numbers.
        probabilities: the teacher's, each position as a sample of its own.
        task: tells how labels are smoothed, and which of them count for nothing.
    """
    weights = confidence_weights(probabilities, labelled(targets, task).flatten())
    return (weights * task.terms(logits, targets).flatten()).sum()


def weighted_loss(
    task: Task, outputs: Float[Tensor, "batch classes *positions"], targets: Any, probabilities: Tensor
) -> Float[Tensor, ""]:
    """The loss of a task of one's own, sample by sample, each by the teacher's confidence.

    Such a loss is known as a mean over samples only: it is asked about each of them alone, and a sample of several
    positions weighs what they weigh together.

    Args:
        task: whose loss.
        outputs: the student's.
        targets: as the task takes them.
        probabilities: the teacher's, each position as a sample of its own.
    """
    terms, kept = [], []
    for number in range(len(outputs)):
        own = tree_map(lambda leaf, at=number: leaf[at : at + 1], targets)
        kept.append(not is_unlabelled(own, task))
        alone = outputs[number : number + 1]
        terms.append(task.loss(alone, own) if kept[-1] else alone.sum() * 0)
    each = len(probabilities) // len(outputs)
    counted = torch.tensor(kept, device=outputs.device).repeat_interleave(each)
    weights = confidence_weights(probabilities, counted).reshape(len(outputs), each).sum(1)
    return (weights * torch.stack(terms)).sum()


@dataclass(frozen=True, eq=False, kw_only=True)
class Generation(Influence):
    """The loss of one generation under the one before it.

    Settings:
        teachers: the generation before, alone.
        loss: "kd", "cwtm" or "dkpp".
        labels: whether the labels' loss counts too ("cwtm" is a loss on labels anyway, and stands alone). Where it does
            not, and another influence has made something of the loss before, that is kept.
    """

    teachers: Teachers
    loss: Loss = "kd"
    labels: bool = True

    @property
    def remarks(self) -> tuple[str, ...]:
        """Whether the teacher's answers are kept."""
        return self.teachers.remarks

    def ahead(self, inputs: tuple[Any, ...]) -> Tensor:
        """What the teacher says of the batch."""
        return self.teachers(inputs)

    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        """The loss of this step, at temperature 1."""
        (answers,) = self.teachers(moment.inputs) if moment.ahead is None else moment.ahead
        outputs = moment.outputs
        fits = isinstance(outputs, Tensor) and outputs.ndim >= 2
        require(
            fits and answers.shape == outputs.shape,
            f"'{SLUG}' needs logits [batch, classes, ...]; the model gives {told(outputs)}.",
            "It is for classification.",
            NeedError,
        )
        logits, probabilities = _flat(outputs), soften(_flat(answers), 1.0)
        if self.loss == "cwtm":
            own = self._by_confidence(moment, probabilities)
        else:
            own = soft_cross_entropy(logits, permuted(probabilities) if self.loss == "dkpp" else probabilities, 1.0)
        plain = self.labels and self.loss != "cwtm"
        return own + loss if plain or not moment.is_plain(loss) else own

    def _by_confidence(self, moment: Moment, probabilities: Tensor) -> Tensor:
        """The labels' loss, as the task has it, weighted."""
        task = PLAIN if moment.task is None else moment.task
        if isinstance(task, Classification):
            return weighted_cross_entropy(moment.outputs, moment.targets, probabilities, task)
        return weighted_loss(task, moment.outputs, moment.targets, probabilities)


def passes_of(model: Model) -> int | None:
    """Passes over the data of the last training that a model's lineage tells of; None where it tells of none.

    Example:
        >>> from torch import nn
        >>> trained = Note("trained", {"training": {"epochs": 3}})
        >>> passes_of(Model(nn.Linear(2, 2), example=(torch.zeros(1, 2),), lineage=(trained,)))
        3
    """
    told_of = (step.settings.get("training") for step in reversed(model.lineage) if isinstance(step, Note))
    return next((training["epochs"] for training in told_of if training), None)


def _flat(logits: Float[Tensor, "batch classes *positions"]) -> Float[Tensor, "samples classes"]:
    """Each position of a sample as a sample of its own."""
    return logits.movedim(1, -1).reshape(-1, logits.shape[1])


@technique(
    Card(
        survey=37,
        slug="born_again_network",
        title="Born Again Neural Networks",
        kind="trainings",
        needs=("labels", "training"),
        identity={"generations": 0},
        quick={"generations": 2, "epochs": 1, "ensemble": True},
        arxiv="1805.04770",
        pays="A better network of the same size, where labels are few or noisy: it is taught by its own former self.",
        costs="Nothing gets smaller; a whole training for each generation; the ensemble is as large as all of them.",
    )
)
@dataclass(frozen=True, kw_only=True)
class BornAgain:
    """Train an architecture anew, taught by the given network or another one; and again, taught by the result.

    Settings:
        teacher: of the first generation, as [30] takes it: a karui Model, the folder of a saved one, a torch module,
            "file.py:factory" and more, of any architecture; None is the given model.
        generations: number of trainings. 0 returns the given model.
        labels: whether the labels' loss counts beside the teacher's (BAN+L in the paper); "cwtm" always uses labels.
        loss: "kd", cross-entropy with the teacher's probabilities; or one of the paper's two controls: "cwtm", the
            task's own loss, each sample weighted by the teacher's confidence, "dkpp", the teacher's probabilities with
            all but the largest shuffled.
        ensemble: whether the result is the mean of all generations rather than the last one.
        epochs: passes of each training; None takes the training's. Give as many as the first network had.

    Needs:
        Labels, training data, and initial values that can be drawn anew.

    Raises:
        SettingError: a setting is out of range.
        NeedError: the model does not give logits, as in a regression, or the teacher does not know the same classes.
        UsageError: initial values cannot be drawn.

    Relations: `KnowledgeDistillation` with temperature 1 is one generation for a student of any architecture.

    Example:
        >>> BornAgain(generations=3, ensemble=True).loss
        'kd'
    """

    teacher: Teacher | None = None
    generations: int = 1
    labels: bool = True
    loss: Loss = "kd"
    ensemble: bool = False
    epochs: int | None = None

    def __post_init__(self) -> None:
        require(self.generations >= 0, f"generations is {self.generations}; give a whole number from 0")
        require((self.epochs or 0) >= 0, f"epochs is {self.epochs}; give a whole number from 0, or None")

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What `karui plan` tells of it."""
        size = f"the result is as large as {self.generations} of it" if self.ensemble else "the result is as large"
        first = model if self.teacher is None else self.teacher
        had = passes_of(first) if isinstance(first, Model) else None
        unfair = f"; {self.epochs} passes each, their first teacher had {had}" if had not in (None, self.epochs) else ""
        told_of = f"{self.generations} trainings from new initial values; {size}{unfair if self.epochs else ''}"
        return (told_of, *(() if self.teacher is None else (remark(self.teacher),)))

    def lacks(self, bench: Bench, *, first: bool) -> list[tuple[str, str]]:
        """What is missing for a teacher that is named, before any work starts: (message, remedy) pairs."""
        del first  # the given model can teach
        return lacking_teachers(SLUG, self.teacher, bench, first=False)

    def fits(self, model: Model, bench: Bench) -> None:
        """Refuse a model that tells no classes apart, or a teacher that does not fit, before anything is trained."""
        if self.generations:
            require_classes(SLUG, model, NUMBERS)
            self._first(model, bench)

    def _first(self, model: Model, bench: Bench) -> Model:
        """The teacher of the first generation."""
        if self.teacher is None or self.teacher is model:
            return model
        found = teachers_of(SLUG, self.teacher, model, bench, alike=SAME_CLASSES)
        one = "Give one; of several, knowledge_distillation makes a first generation."
        require(len(found) == 1, f"'{SLUG}' goes from one network to the next; {len(found)} are given.", one, NeedError)
        return found[0]

    def apply(self, model: Model, bench: Bench) -> Model:
        """The last generation, or the mean of all."""
        made = self.study(model, bench)
        if not made:
            return model
        return averaged(made) if self.ensemble else made[-1]

    def study(self, model: Model, bench: Bench) -> tuple[Model, ...]:
        """Every generation, the first one first.

        Args:
            model: of the architecture of all generations; f_0, the trained network that teaches the first of them,
                unless there is another teacher.
            bench: with training data.
        """
        if not self.generations:
            return ()
        require_classes(SLUG, model, NUMBERS)
        made: list[Model] = []
        teacher = self._first(model, bench)
        for number in range(1, self.generations + 1):
            influence = Generation(
                teachers=keeping((teacher,), bench).teachers((teacher,), classes=False),
                loss=self.loss,
                labels=self.labels,
            )
            fresh = redrawn(model, seed_of(bench.seed, "generation", number))
            taught = bench.fit(fresh, epochs=self.epochs, influence=influence, label=f"generation {number}")
            teacher = taught.evolve(taught.module, Note(f"generation {number}, taught by the one before it"))
            made.append(teacher)
        return tuple(made)
