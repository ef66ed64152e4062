"""Logit regression: Ba and Caruana 2014, "Do Deep Nets Really Need to be Deep?" (survey 31).

A student learns by least squares the numbers that its teacher gives *before* the softmax. They keep the ratios of tiny
probabilities, nothing saturates, and no label is needed: any inputs of the right kind can be taught on, and those that
the teacher was not trained on teach most.

Pays where there are few labels and many inputs, and for shallow wide students, which `parameters` asks for: one hidden
layer, as wide as that many parameters allow, behind a linear bottleneck of `rank` units. Does not pay where the teacher
is no better than the student, nor over very many classes, where most logits are of no concern. It makes nothing smaller
by itself.

Paper -> here: z -> the teacher's logits (of several, their mean), g(x) -> the student's outputs, L -> `logit_loss`,
y = beta f(U V x) -> `karui.distill.shallow`: `shallow_student`, or `factored_first_layer` of a student of one's own;
`multiplied_out` makes the product one layer again.

Targets are normalised to mean 0 and variance 1 for each class over the transfer set; after training, mean and
deviation are folded into the last layer, so that the student gives logits on the teacher's scale. A student that is
given keeps its function at the start: its last layer is unfolded first. Where the last layer cannot hold them (it has
no bias, or its output is worked on afterwards) or must not (the bench trains under another influence, which looks at
logits, too) the loss is normalised instead, which is the same up to the scale of that layer's steps.

Measured on the digits, a 64-32-10 student of two 64-128-128-10 teachers, five seeds (`results/logit_regression.md`): on
100 points their logits give 95.6 % where labels give 89.8, normalised ones as plain ones (0.1 points, by chance); the
logits of all 1,080 add 0.9. On 1,500 MNIST digits 4096 hidden units behind a bottleneck of 100 reached the loss that
both reach in half the time of the full layer: a quarter of the seconds of an epoch, nearly twice the epochs.

DEPARTURE: the student trains with the bench's optimizer and schedule, where the paper has SGD with momentum 0.9 and a
small learning rate that it does not give. Gradients are clipped to a norm of 1 where the bench does not say another:
a squared distance summed over classes is steep at first, and SGD at a rate fit for cross-entropy would diverge.

DEPARTURE: weights that are exactly zero in the student stay so (`keep_zeros`), so that a pruned network can be taught
without losing its sparsity; the paper's students are dense.

DEPARTURE: beside the influence of another technique this is a term of its own, and what that one has made of the loss,
labels included, is kept: the paper knows no other term, and whoever asks for two wants both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset

from karui.data.sources import load_unlabelled
from karui.distill._asking import SAME_CLASSES
from karui.distill._clipping import clipped
from karui.distill._heads import head_of
from karui.distill._scale import Scale, can_hold, scale_of
from karui.distill._teachers import Teacher, keeping, lacking_teachers, remark, teachers_of
from karui.distill.shallow import shallow_student
from karui.errors import NeedError, require, told
from karui.model import Model, layer_at
from karui.technique import Card, require_passes, technique
from karui.train import Influence, Moment, Together, Turn
from karui.train.masks import MaskKeeper, zero_masks
from karui.train.teaching import Teachers
from karui.train.transfer import with_unlabelled

if TYPE_CHECKING:
    from karui.technique import Bench


def logit_loss(
    outputs: Float[Tensor, "batch classes *positions"], wanted: Float[Tensor, "batch classes *positions"]
) -> Float[Tensor, ""]:
    """Half the squared distance, summed over classes, averaged over the batch and positions (equation 1).

    Unlike soft targets it tells apart logits that differ by a constant.

    Example:
        >>> import torch
        >>> logit_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])).item()
        2.0
    """
    return (outputs - wanted).square().sum(1).mean() / 2


@dataclass(frozen=True, eq=False)
class _Normalised(Influence):
    """The last layer gives normalised logits for the time of a training."""

    scale: Scale
    path: str

    def attach(self, module: nn.Module) -> None:
        self.scale.unfold(layer_at(module, self.path))

    def finish(self, module: nn.Module) -> nn.Module:
        self.scale.fold(layer_at(module, self.path))
        return module


@dataclass(frozen=True, eq=False)
class _Match:
    """The objective: the student's outputs towards the teachers' mean logits, both normalised."""

    teachers: Teachers
    scale: Scale | None
    folded: bool

    @property
    def remarks(self) -> tuple[str, ...]:
        """Whether the teachers' answers are kept."""
        return self.teachers.remarks

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], targets: Any) -> tuple[Any, Tensor]:
        del targets
        answers = self.teachers(inputs)  # first: what they need on the way is free again for the student's own
        outputs = module(*inputs)
        return outputs, self.loss(outputs, answers)

    def loss(self, outputs: Any, answers: Tensor) -> Tensor:
        wanted = answers.mean(0)
        require(
            isinstance(outputs, Tensor) and outputs.shape == wanted.shape,
            f"The student gives {told(outputs)} and the teacher logits of shape {tuple(wanted.shape)}.",
            "A teacher must know the same classes.",
            NeedError,
        )
        if wanted.ndim == 1:  # a regression's number, without a dimension of its own
            outputs, wanted = outputs[:, None], wanted[:, None]
        if self.scale is not None:
            wanted = self.scale.normalised(wanted)
            outputs = outputs if self.folded else self.scale.normalised(outputs)
        return logit_loss(outputs, wanted)


@dataclass(frozen=True, eq=False, kw_only=True)
class LogitTargets(Influence):
    """The loss becomes a L + (1 - a) loss, with L the half squared distance from the teachers' logits.

    Nothing is folded, so that other influences see the student's logits as they are. At a = 1 labels count for nothing,
    as in the paper; what another influence has made of the loss before is kept, and L comes to it. Below 1 it counts
    1 - a of its weight, as with `SoftTargets`: put its term after this one.

    Settings:
        teachers: the networks that teach; of several, the mean of their logits.
        scale: normalises each class in the loss; None takes logits as they are.
        weight: a, in [0, 1].
        averaged: whether L is the mean square over classes, as the loss of a regression is, not half of the sum.
    """

    teachers: Teachers
    scale: Scale | None = None
    weight: float = 1.0
    averaged: bool = False

    @property
    def remarks(self) -> tuple[str, ...]:
        """Whether the teachers' answers are kept."""
        return self.teachers.remarks

    def ahead(self, inputs: tuple[Any, ...]) -> Tensor:
        """What the teachers say of the batch."""
        return self.teachers(inputs)

    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        """The mixed loss of this step; at weight 1 no label counts, not even a missing one, but other influences do."""
        answers = self.teachers(moment.inputs) if moment.ahead is None else moment.ahead
        share = 2 / (answers.shape[2] if answers.ndim > 2 else 1) if self.averaged else 1
        logits = self.weight * share * _Match(self.teachers, self.scale, folded=False).loss(moment.outputs, answers)
        if self.weight == 1:
            return logits if moment.is_plain(loss) else loss + logits
        return logits + (1 - self.weight) * loss


@technique(
    Card(
        survey=31,
        slug="logit_regression",
        title="Do Deep Nets Really Need to be Deep?",
        kind="influence",
        needs=("training", "teacher"),
        identity={"epochs": 0},
        quick={"epochs": 1},
        arxiv="1312.6184",
        pays="Few labels and many inputs: a student, also a shallow wide one, learns logits without labels.",
        costs="Nothing gets smaller by it; a teacher no better than the student gains nothing.",
    )
)
@dataclass(frozen=True, kw_only=True)
class LogitRegression:
    """Train a network to give the logits of a better one, or the mean of several, without labels.

    Settings:
        teacher: a karui Model, the folder of a saved one, a torch module, a fitted scikit-learn estimator, the path of
            an .onnx file, a function, "file.py:factory" or "package.module:factory" that makes one, or several of
            these; None is the model at the start of the pipeline.
        unlabelled: more inputs to learn on: a data set, or a specification as of --data, for example "npz:pool.npz"
            (an array `x` is enough). Labels in it are not looked at.
        parameters: budget of a new shallow wide student, which is taught in place of the given model, by it if no other
            teacher is there; None teaches the given model.
        rank: units of its linear bottleneck, 0 for none; None is a seventh of its inputs.
        filters: of a convolution before its hidden layer, for pictures; 0 leaves that out.
        normalise: whether each class's targets have mean 0 and variance 1 while training; folded in afterwards.
        epochs: passes over the training data and the pool.
        remember: samples whose teacher outputs are kept, each once for each way it was augmented; with a folder for
            checkpoints they are kept there. None keeps all of them, but none under augmentation, or where they would
            take more than 256 MiB of memory (4 GiB with a
            folder); the result's lineage says which.
        keep_zeros: whether weights that are exactly zero stay so.

    Raises:
        SettingError: a setting is out of range, or the budget does not pay for one hidden unit.
        NeedError: there is no teacher, or it does not know the same classes.

    Relations: with a regression it learns the teacher's numbers, where those that soften classes refuse.
    `KnowledgeDistillation` at a high temperature is this with each sample's mean logit left free.

    Example:
        >>> LogitRegression(unlabelled="npz:pool.npz").normalise
        True
    """

    teacher: Teacher | tuple[Teacher, ...] | None = None
    unlabelled: str | Dataset | None = None
    parameters: int | None = None
    rank: int | None = None
    filters: int = 0
    normalise: bool = True
    epochs: int = 10
    remember: int | None = None
    keep_zeros: bool = True

    def __post_init__(self) -> None:
        require_passes(epochs=self.epochs)
        require((self.parameters or 1) > 0, f"parameters is {self.parameters}; give a positive number, or None")
        require((self.rank or 0) >= 0, f"rank is {self.rank}; give a number of units from 0, or None")
        require(self.filters >= 0, f"filters is {self.filters}; give a number of filters from 0")
        require((self.remember or 0) >= 0, f"remember is {self.remember}; give a number of samples from 0, or None")

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What `karui plan` tells of it."""
        if self.parameters is not None:
            made = shallow_student(model, self.parameters, self.rank, self.filters)
            return (remark(self.teacher), f"a new student of {made.parameters:,} parameters takes the model's place")
        folds = can_hold(model, head_of(model))
        where = "the last layer takes up mean and deviation" if folds else "the loss is normalised, not the last layer"
        return (remark(self.teacher), *((where,) if self.normalise else ()))

    def lacks(self, bench: Bench, *, first: bool) -> list[tuple[str, str]]:
        """What is missing for a teacher or of the pool, before any work starts: (message, remedy) pairs."""
        alone = first and self.parameters is None  # a new student can be taught by the given model
        missing = lacking_teachers("logit_regression", self.teacher, bench, first=alone)
        kind, _, rest = str(self.unlabelled or "").partition(":")
        path = Path(rest.partition("?")[0]).expanduser()
        if kind in ("npz", "folder", "cifar10") and not path.exists():
            missing.append(
                (f"'logit_regression' finds no unlabelled data at {path}.", "Give the path of what is there.")
            )
        return missing

    def fits(self, model: Model, bench: Bench) -> None:
        """Ask a teacher that is named once, so that one that does not fit is told before anything is trained."""
        if self.teacher is not None:
            self._teachers(model, bench)

    def influence(
        self, model: Model, bench: Bench, *, weight: float = 1.0, averaged: bool = False, shared: bool = False
    ) -> Influence:
        """The distance from the teachers' logits in place of the loss, for a training of `model` by another step.

        That step trains its own network on its own data: `parameters` and `unlabelled` are of `apply` alone.

        Args:
            model: the student.
            bench: its data tell the scale, and whether answers are kept.
            weight: share of the distance in the loss, as in `LogitTargets`.
            averaged: whether the distance is the mean square over classes.
            shared: whether the teacher's weights are not copied, where memory is short and nothing changes them.
        """
        models = self._teachers(model, bench)
        teachers = keeping(models, bench, self.remember).teachers(models, classes=False, shared=shared)
        scale = scale_of(teachers, bench.train) if self.normalise else None
        part = LogitTargets(teachers=teachers, scale=scale, weight=weight, averaged=averaged)
        return self._with_zeros(model, part)

    def apply(self, model: Model, bench: Bench) -> Model:
        """The student, taught."""
        if self.epochs == 0:
            return model
        if self.parameters is not None:
            bench = bench if bench.dense is not None else replace(bench, dense=model)
            model = shallow_student(model, self.parameters, self.rank, self.filters, seed=bench.seed)
        models, train = self._teachers(model, bench), bench.train
        if self.unlabelled is not None:
            pool = load_unlabelled(self.unlabelled) if isinstance(self.unlabelled, str) else self.unlabelled
            train = with_unlabelled(train, pool, model.task)  # pyright: ignore[reportArgumentType]
        teachers = keeping(models, replace(bench, train=train), self.remember).teachers(models, classes=False)
        scale = scale_of(teachers, train) if self.normalise else None
        head = head_of(model)
        # Another influence on this training has to see logits as they are.
        folded = scale is not None and bench.influence is None and can_hold(model, head, len(scale.mean))
        part = _Normalised(scale, head) if scale is not None and head is not None and folded else Influence()
        turn = Turn(name="logits", objective=_Match(teachers, scale, folded))
        influence = self._with_zeros(model, part)
        return replace(bench, train=train, training=clipped(bench.training)).fit(
            model, epochs=self.epochs, influence=influence, turns=(turn,), label="logits"
        )

    def _teachers(self, model: Model, bench: Bench) -> tuple[Model, ...]:
        return teachers_of("logit_regression", self.teacher, model, bench, alike=SAME_CLASSES)

    def _with_zeros(self, model: Model, part: Influence) -> Influence:
        masks = zero_masks(model.module) if self.keep_zeros else {}
        return Together(MaskKeeper(masks), part) if masks else part
