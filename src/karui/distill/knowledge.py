"""Knowledge distillation: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network" (survey 30).

A network learns from the probabilities that a better one (or several) gives to *all* classes, softened by a
temperature so that the small ones count: which wrong classes a sample resembles is most of what the teacher knows.

Pays when the student is much smaller than its teacher, when a compressed network has to recover, and when labels are
few. Does not pay when the teacher is no better than the student trained on labels, or when the student stops early:
soft targets take more steps, and with few of them the order reverses. It makes nothing smaller by itself.

Measured at equal cost, the teacher's passes counted (`results/distillation_table.md`): 64 units on spoken digits 87.7 %
against 82.3 by labels alone after three times the passes, 59 against 76 after the first 20; an LSTM on words perplexity
102 against 113, 131 against 128 at first; a ResNet-20 of half the channels on 2,000 pictures of CIFAR-10 37 against
44 %, and 46.7 against 47.4. Gradients are up to T times those of labels: ResNet-20 of half the ranks [12],
retrained under its dense network for three passes, loses 22 points by it at a rate of 0.01 and gains 2.5 (by chance) at
0.0025, where half of the filters [62] gain 4.5 and a tenth of the weights [63] 8 (`results/recovery_under_teacher.md`).

Paper -> here: T -> temperature, z_i and v_i -> the student's and the teacher's logits, p_i -> soft targets,
specialists and their combination -> `karui.distill.specialists`, the bias fix for unseen classes -> `missing`.

DEPARTURE: the offset of unseen classes is the best one on validation data, found exactly from the order of the margins
between seen and unseen classes, where the paper tunes it by hand on the test data.

DEPARTURE: weights that are exactly zero in the student stay so (`keep_zeros`), so that a pruned network can be taught
without losing its sparsity; the paper's students are dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from karui.data import Batches, targets_of
from karui.distill._asking import SAME_CLASSES, require_classes
from karui.distill._heads import head_of
from karui.distill._teachers import Teacher, keeping, lacking_teachers, remark, teachers_of
from karui.errors import NeedError, SettingError, UsageError, require
from karui.measuring.inference import inference
from karui.model import Model, Note, layer_at
from karui.numerics.soft_targets import arithmetic, geometric
from karui.technique import Card, require_passes, technique
from karui.train import Influence, Together
from karui.train.masks import MaskKeeper, zero_masks
from karui.train.teaching import SoftTargets

if TYPE_CHECKING:
    from karui.technique import Bench

NUMBERS = "Take logit_regression, which learns numbers too, or set weight=0 to learn from the targets alone."


def best_offset(
    logits: Float[Tensor, "samples classes"], targets: Int[Tensor, "samples"], missing: Sequence[int]
) -> float:
    """The number that, added to the logits of the missing classes, gets the most samples right (section 3).

    A sample turns to a missing class where the offset exceeds its margin, the best other logit less the best missing
    one: between two margins nothing changes, so that all offsets are tried by sorting. Of equally good intervals the
    widest is taken, and its middle (an open end counts as one wide on its side).

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
        >>> best_offset(logits, torch.tensor([1, 1, 0]), missing=[1])
        2.5
    """
    unseen = torch.zeros(logits.shape[1], dtype=torch.bool)
    unseen[list(missing)] = True
    seen_best, seen_class = logits.double().masked_fill(unseen, -torch.inf).max(1)
    unseen_best, unseen_class = logits.double().masked_fill(~unseen, -torch.inf).max(1)
    margins, order = (seen_best - unseen_best).sort()
    right_before, right_after = (seen_class == targets)[order].long(), (unseen_class == targets)[order].long()
    start = torch.zeros(1, dtype=torch.long)
    # right[k]: samples right when the k smallest margins are exceeded.
    right = torch.cat([start, right_after.cumsum(0)]) + right_before.sum() - torch.cat([start, right_before.cumsum(0)])
    edges = torch.cat([margins[:1] - 2, margins, margins[-1:] + 2])
    width = (edges[1:] - edges[:-1]).masked_fill(right < right.max(), -1.0)
    place = int(width.argmax())
    return float((edges[place] + edges[place + 1]) / 2)


def lift_classes(model: Model, classes: Sequence[int], offset: float, *, layer: str | None = None) -> Model:
    """The model with `offset` added to the last layer's biases of some classes.

    Args:
        model: a classifier; left as it is.
        classes: class numbers.
        offset: what is added.
        layer: path of the layer that gives the logits; None looks for it.

    Raises:
        UsageError: no layer with a bias gives the model's output.

    Example:
        >>> model = Model(nn.Linear(2, 3), example=(torch.zeros(1, 2),))
        >>> lifted = lift_classes(model, [1], 3.5)
        >>> (lifted.module(torch.zeros(1, 2)) - model.module(torch.zeros(1, 2))).round(decimals=4).tolist()
        [[0.0, 3.5, 0.0]]
    """
    lifted = model.copy()
    path = layer if layer is not None else head_of(lifted)
    bias = None if path is None else getattr(layer_at(lifted.module, path), "bias", None)
    if not isinstance(bias, nn.Parameter):
        what = "No layer gives the logits as they are." if path is None else f"The layer '{path}' has no bias to lift."
        raise UsageError(what, "Name the last layer, and give it a bias.")
    with torch.no_grad():
        bias[list(classes)] += offset
    told = f"biases of classes {', '.join(map(str, classes))} lifted by {offset:.4g}"
    return lifted.evolve(lifted.module, Note(told, {"classes": list(classes), "offset": offset}))


@technique(
    Card(
        survey=30,
        slug="knowledge_distillation",
        title="Distilling the Knowledge in a Neural Network",
        kind="influence",
        needs=("labels", "training", "teacher"),
        identity={"epochs": 0},
        quick={"epochs": 1},
        arxiv="1503.02531",
        pays="A small or compressed network learns from a better one: accuracy comes back, above all with few labels.",
        costs="Nothing gets smaller by it; a teacher no better than the student, or too few steps, gain nothing.",
    )
)
@dataclass(frozen=True, kw_only=True)
class KnowledgeDistillation:
    """Train a network on the softened probabilities of a better one.

    Settings:
        teacher: a karui Model, the folder of a saved one, a torch module, a fitted scikit-learn estimator, the path of
            an .onnx file, a function, "file.py:factory" or "package.module:factory" that makes one, or several of
            these; None is the model at the start of the pipeline, so that a compressed network learns from what it was.
        temperature: softens student and teacher alike; 2.5 to 4 for very small students, above 8 hardly matters.
        weight: share of the soft loss, in [0, 1]; the rest is the loss against the labels, and what influences before
            this one in a `Together` have added to it.
        epochs: passes over the training data.
        geometric: whether an ensemble's probabilities are averaged geometrically rather than arithmetically.
        missing: classes that the training data lack; their biases are lifted as validation data tell, which must hold
            all of them: what is held out of the training data by default lacks them, too.
        remember: samples whose teacher outputs are kept, each once for each way it was augmented; with a folder for
            checkpoints they are kept there. They serve every student that is trained with the same seed and settings.
            None keeps all of them, but none under augmentation, or where they would take more than 256 MiB of memory
            (4 GiB with a folder); the result's lineage says which.
        keep_zeros: whether weights that are exactly zero stay so.

    Raises:
        SettingError: a setting is out of range.
        NeedError: there is no teacher, it does not know the same classes, or the model tells none apart (a regression);
            validation data lack a class that `missing` names.

    Relations: as an influence it joins any other training: `bench.under(KnowledgeDistillation(...).influence(model,
    bench))`, or `Together`, where it comes first: terms after it count in full, those before it by 1 - `weight`, as
    they are part of the loss that it mixes. Techniques that match inner layers as well are siblings of this one;
    `LogitRegression` also learns the numbers of a regression.

    Example:
        >>> KnowledgeDistillation(temperature=4.0, weight=0.9).epochs
        10
    """

    teacher: Teacher | tuple[Teacher, ...] | None = None
    temperature: float = 4.0
    weight: float = 0.9
    epochs: int = 10
    geometric: bool = False
    missing: tuple[int, ...] = ()
    remember: int | None = None
    keep_zeros: bool = True

    def __post_init__(self) -> None:
        require(self.temperature > 0, f"temperature is {self.temperature}; give a positive number, for example 4")
        require(0 <= self.weight <= 1, f"weight is {self.weight}; give a share in [0, 1], for example 0.9")
        require_passes(epochs=self.epochs)
        require((self.remember or 0) >= 0, f"remember is {self.remember}; give a number of samples from 0, or None")
        require(all(c >= 0 for c in self.missing), f"missing is {self.missing}; give class numbers from 0")

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What `karui plan` tells of it."""
        del model
        return (remark(self.teacher),)

    def lacks(self, bench: Bench, *, first: bool) -> list[tuple[str, str]]:
        """What is missing for a teacher, before any work starts: (message, remedy) pairs."""
        return lacking_teachers("knowledge_distillation", self.teacher, bench, first=first)

    def fits(self, model: Model, bench: Bench) -> None:
        """Ask a teacher that is named once, so that one that does not fit is told before anything is trained."""
        if self.epochs:
            self._require_classes(model)
            self._require_missing(model, bench)
        if self.teacher is not None:
            self._teachers(model, bench)

    def influence(self, model: Model, bench: Bench, *, shared: bool = False) -> Influence:
        """The soft targets, for a training of `model` or of what becomes of it.

        They are those of the teacher as it is now: it is copied, and may be trained on meanwhile. Biases of `missing`
        classes are lifted by `apply` alone, behind the training.

        Args:
            model: the student.
            bench: its data tell whether answers are kept.
            shared: whether the teacher's weights are not copied, where memory is short and nothing changes them.
        """
        self._require_classes(model)
        teachers = self._teachers(model, bench)
        soft = SoftTargets(
            teachers=keeping(teachers, bench, self.remember).teachers(teachers, shared=shared),
            temperature=self.temperature,
            weight=self.weight,
            rule=geometric if self.geometric else arithmetic,
        )
        masks = zero_masks(model.module) if self.keep_zeros else {}
        return Together(MaskKeeper(masks), soft) if masks else soft

    def apply(self, model: Model, bench: Bench) -> Model:
        """The student, taught."""
        if self.epochs == 0:
            return model
        self._require_missing(model, bench)
        taught = bench.fit(model, epochs=self.epochs, influence=self.influence(model, bench), label="distil")
        return self._lifted(taught, bench) if self.missing else taught

    def _require_classes(self, model: Model) -> None:
        if self.weight:
            require_classes("knowledge_distillation", model, NUMBERS)

    def _require_missing(self, model: Model, bench: Bench) -> None:
        """Refuse, before any training, classes whose offset no validation data could tell: it would be made up."""
        if not self.missing:
            return
        with inference(model.module) as module:
            classes = module(*model.example).shape[1]
        require(
            max(self.missing) < classes,
            f"missing names class {max(self.missing)}, and the model has {classes}.",
            "Classes count from 0.",
            SettingError,
        )
        held = torch.cat([targets.flatten() for targets in _targets(bench.validation)]).unique().tolist()
        lost = ", ".join(str(c) for c in self.missing if c not in held)
        require(
            not lost,
            f"'knowledge_distillation': missing names class {lost}, of which the validation data hold no sample.",
            "Give validation data that hold it, as training data do not: they tell by how much its bias is lifted.",
            NeedError,
        )

    def _teachers(self, model: Model, bench: Bench) -> tuple[Model, ...]:
        alike = SAME_CLASSES if self.weight else ""
        return teachers_of("knowledge_distillation", self.teacher, model, bench, alike=alike)

    def _lifted(self, taught: Model, bench: Bench) -> Model:
        logits, targets = _outputs(taught, bench.validation)
        return lift_classes(taught, self.missing, best_offset(logits, targets, self.missing))


def _targets(dataset: Any) -> Iterator[Tensor]:
    """All targets of a data set, in pieces; without reading inputs where that can be."""
    known = targets_of(dataset)
    if known is not None:
        yield known
        return
    batches = Batches(dataset)
    for index in torch.arange(len(batches)).split(256):
        yield batches.fetch(index)[1]


def _outputs(model: Model, dataset: Any) -> tuple[Tensor, Tensor]:
    """Logits and targets of a whole data set."""
    batches = Batches(dataset)
    parts = [batches.fetch(index) for index in torch.arange(len(batches)).split(256)]
    with inference(model.module) as module:
        logits = torch.cat([module(*inputs) for inputs, _ in parts])
    return logits, torch.cat([targets for _, targets in parts])
