"""Model compression: Bucilă, Caruana and Niculescu-Mizil 2006 (survey 36).

A large teacher, typically an ensemble of unlike models, says what it thinks of far more inputs than there are labels
for, and a small network learns that function. Where there are no further inputs, MUNGE makes them: rows of the training
data exchange attributes with their nearest neighbours, so that pseudo data lie where the data do. Labels are not used.

Pays where a good ensemble is too slow to deploy, on tabular data and small vectors, with few training samples. Does not
pay where real unlabelled inputs are at hand (`LogitRegression` learns from these); on pictures larger than digits,
where exchanging pixels makes no pictures; nor where the teacher is no better than the student. MUNGE takes
time as the square of the number of samples: 4,000 of 50 attributes take about a second a copy, 20,000 a quarter of a
minute.

Measured on the digits, five seeds, 300 training samples: 2.4 points better than independent draws; over hard labels
half a point, which is within chance, so that the paper's gain over labels does not show here.

Paper -> here: T -> the training inputs, k -> copies, p -> swap, s -> tightness, MUNGE, RANDOM and NBE -> `generator`
(`karui.train.pseudo`), ensemble selection -> `chosen_ensemble`, the small net -> `hidden`, or any
network that is given.

DEPARTURE: hidden units are ReLUs and outputs a softmax, where the paper has a sigmoid for each of its two-class
problems; the error on the teacher's probabilities is squared, as there. A regression learns the teacher's numbers.

DEPARTURE: training goes on to its end, and the weights of the best epoch on pseudo data held out are kept; the outcome
is that of early stopping. Pseudo data take the place of augmentation, which is left out: the teacher answers once.

DEPARTURE: NBE finds its number of clusters by doubling it while the likelihood of held-out rows rises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import TensorDataset

from karui.data import Batches, hold_out, targets_of
from karui.distill._asking import SAME_CLASSES
from karui.distill._teachers import Teacher, lacking_teachers, remark, teachers_of
from karui.distill.shallow import hidden_layer_student
from karui.errors import NeedError, require, told
from karui.measuring.bar import bar
from karui.model import Model, Note, Regression
from karui.numerics.ensemble_selection import select_ensemble
from karui.numerics.munge import Neighbours
from karui.numerics.soft_targets import arithmetic
from karui.technique import Card, require_passes, technique
from karui.train import Influence, Together, Turn
from karui.train.best_epoch import BestEpoch
from karui.train.masks import MaskKeeper, zero_masks
from karui.train.pseudo import Generator, Pseudo, inputs_of
from karui.train.teaching import Teachers

if TYPE_CHECKING:
    from karui.technique import Bench


def mimic_loss(
    logits: Float[Tensor, "batch classes *positions"], wanted: Float[Tensor, "batch classes *positions"]
) -> Float[Tensor, ""]:
    """Squared distance of the student's probabilities from the teacher's, averaged over the batch and positions.

    Example:
        >>> mimic_loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])).item()
        0.5
    """
    return (logits.softmax(1) - wanted).square().sum(1).mean()


def number_loss(outputs: Float[Tensor, "batch *numbers"], wanted: Float[Tensor, "batch *numbers"]) -> Tensor:
    """The same of the numbers of a regression.

    Example:
        >>> number_loss(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [4.0]])).item()
        2.0
    """
    return (outputs - wanted).square().flatten(1).sum(1).mean()


def labelled(
    teachers: Teachers, inputs: Tensor, *, classes: bool, batch: int = 256, progress: bool = False
) -> TensorDataset:
    """Inputs with what the teachers say of them: the mean of their probabilities, or of their numbers.

    Args:
        teachers: who is asked, each once.
        inputs: `[samples, ...]`.
        classes: whether the teachers tell classes apart.
        batch: samples at a time.
        progress: whether a bar is shown.
    """
    said = []
    with bar("ask the teacher", len(inputs), progress) as advance:
        for part in inputs.split(batch):
            answers = teachers((part,))
            said.append(arithmetic(answers, 1.0) if classes else answers.mean(0))
            advance(len(part))
    return TensorDataset(inputs, torch.cat(said))


def chosen_ensemble(
    library: Sequence[Teacher], student: Model, bench: Bench, *, rounds: int = 20
) -> tuple[Teacher, ...]:
    """Of a library of teachers those whose mean is best on validation data, as often as they count (section 2.1).

    The result is what `teacher` takes. One that is in it several times is asked as often.

    Args:
        library: what may teach, each fitted or trained on other data than the bench's validation data.
        student: whose task they have.
        bench: with validation data.
        rounds: how often one is added.

    Raises:
        NeedError: the validation data have no targets.
    """
    inputs, targets = inputs_of(bench.validation), targets_of(bench.validation)
    require(targets is not None, "An ensemble is chosen by labels.", "Give labelled validation data.", NeedError)
    assert targets is not None  # noqa: S101  (just required; for the type checker)
    classes = not isinstance(student.task, Regression)
    said = []
    for one in library:
        teachers = Teachers(teachers_of("munge_compression", one, student, bench), classes=classes)
        said.append(labelled(teachers, inputs, classes=classes).tensors[1].double().numpy())
    counts = select_ensemble(np.stack(said), targets.numpy(), rounds=rounds)
    counts = counts // np.gcd.reduce(counts)
    return tuple(one for one, count in zip(library, counts.tolist(), strict=True) for _ in range(count))


@dataclass(frozen=True, eq=False)
class _Mimic:
    """The objective: the student's outputs towards what the teachers have said."""

    classes: bool

    def __call__(self, module: Any, inputs: tuple[Any, ...], wanted: Tensor) -> tuple[Any, Tensor]:
        outputs = module(*inputs)
        return outputs, self.loss(outputs, wanted)

    def loss(self, outputs: Any, wanted: Tensor) -> Tensor:
        require(
            isinstance(outputs, Tensor) and outputs.shape == wanted.shape,
            f"The student gives {told(outputs)} and the teacher one of shape {tuple(wanted.shape)}.",
            "A teacher must know the same classes, or give as many numbers.",
            NeedError,
        )
        return mimic_loss(outputs, wanted) if self.classes else number_loss(outputs, wanted)


@technique(
    Card(
        survey=36,
        slug="munge_compression",
        title="Model Compression",
        kind="data",
        needs=("calibration", "training", "teacher"),
        identity={"epochs": 0},
        quick={"copies": 1, "epochs": 1},
        pays="A slow ensemble on tabular data becomes one small network; few samples suffice, more are made of them.",
        costs="Not for pictures, nor where unlabelled inputs are at hand; time as the square of the samples.",
    )
)
@dataclass(frozen=True, kw_only=True)
class ModelCompression:
    """Teach a small network what a teacher says of pseudo data made from the training inputs.

    Settings:
        teacher: a karui Model, the folder of a saved one, a torch module, a fitted scikit-learn estimator, the path of
            an .onnx file, a function, "file.py:factory" or "package.module:factory" that makes one, or several of
            these; None is the model at the start of the pipeline.
        generator: "munge"; or one of the controls: "random", attributes drawn independently, "nbe", a mixture of
            naive-Bayes clusters.
        copies: how many times as many pseudo samples as there are training samples; 0 for none.
        swap: probability that an attribute is exchanged between neighbours (munge).
        tightness: the larger, the closer an exchanged attribute is to the neighbour's (munge).
        nominal: attributes whose numbers are names, counted along the flattened input; whole-number inputs all are.
        neighbours: whether neighbours are found among the rows as they have become, "current", or once among the
            training inputs, "original", which is faster (munge).
        clusters: of the mixture; None finds a number (nbe).
        originals: whether the training inputs are taught on as well.
        hidden: units of a new network of one hidden layer, which is taught in place of the given model, by it if no
            other teacher is there; None teaches the given model.
        held: share of the pseudo data that finds the best epoch; 0 takes the last.
        epochs: passes over the pseudo data.
        keep_zeros: whether weights that are exactly zero stay so.

    Needs:
        Training inputs and a teacher; labels are not looked at.

    Raises:
        SettingError: a setting is out of range, or there is nothing to teach on.
        NeedError: there is no teacher, or it does not know the same classes.
        DataError: samples are not of one input tensor.

    Relations: `LogitRegression` learns logits, on inputs that are there; its `unlabelled` takes what
    `karui.train.pseudo.Pseudo` grows. `KnowledgeDistillation` uses labels as well.

    Example:
        >>> ModelCompression(hidden=32, copies=25).generator
        'munge'
    """

    teacher: Teacher | tuple[Teacher, ...] | None = None
    generator: Generator = "munge"
    copies: int = 10
    swap: float = 0.2
    tightness: float = 5.0
    nominal: tuple[int, ...] = ()
    neighbours: Neighbours = "current"
    clusters: int | None = None
    originals: bool = True
    hidden: int | None = None
    held: float = 0.1
    epochs: int = 10
    keep_zeros: bool = True

    def __post_init__(self) -> None:
        self.pseudo()
        require(self.hidden is None or self.hidden >= 1, f"hidden is {self.hidden}; give a number of units, or None")
        require(0 <= self.held < 1, f"held is {self.held}; give a share in [0, 1), for example 0.1")
        require_passes(epochs=self.epochs)
        require(self.copies > 0 or self.originals, "copies is 0 and originals is false: there is nothing to teach on")

    def pseudo(self) -> Pseudo:
        """How pseudo data are made."""
        return Pseudo(
            generator=self.generator, copies=self.copies, swap=self.swap, tightness=self.tightness,
            nominal=self.nominal, neighbours=self.neighbours, clusters=self.clusters,
        )  # fmt: skip

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What `karui plan` tells of it."""
        made = f"{self.copies} times the training data are made by {self.generator}"
        if self.hidden is None:
            return (remark(self.teacher), made)
        size = hidden_layer_student(model, self.hidden).parameters
        return (remark(self.teacher), made, f"a new student of {size:,} parameters takes the model's place")

    def lacks(self, bench: Bench, *, first: bool) -> list[tuple[str, str]]:
        """What is missing for a teacher, before any work starts: (message, remedy) pairs."""
        alone = first and self.hidden is None  # a new student can be taught by the given model
        return lacking_teachers("munge_compression", self.teacher, bench, first=alone)

    def apply(self, model: Model, bench: Bench) -> Model:
        """The student, taught."""
        if self.epochs == 0:
            return model
        if self.hidden is not None:
            bench = bench if bench.dense is not None else replace(bench, dense=model)
            model = hidden_layer_student(model, self.hidden, seed=bench.seed)
        goal = _Mimic(not isinstance(model.task, Regression))
        train, held = self.transfer(model, bench)
        masks = zero_masks(model.module) if self.keep_zeros else {}
        parts: list[Influence] = [MaskKeeper(masks)] if masks else []
        if held is not None:
            parts.append(BestEpoch(inputs=held.tensors[0], targets=held.tensors[1], loss=goal.loss))
        taught = replace(bench, train=train, training=replace(bench.training, augment=None)).fit(
            model,
            epochs=self.epochs,
            influence=Together(*parts),
            turns=(Turn(name="mimic", objective=goal),),
            label="mimic",
        )
        facts = {"generator": self.generator, "pseudo samples": self.copies * len(Batches(bench.train))}
        return taught.evolve(taught.module, Note("taught on pseudo data that a teacher labelled", facts))

    def fits(self, model: Model, bench: Bench) -> None:
        """Ask a teacher that is named once, so that one that does not fit is told before anything is trained."""
        if self.teacher is not None:
            self._teachers(model, bench)

    def _teachers(self, model: Model, bench: Bench) -> tuple[Model, ...]:
        return teachers_of("munge_compression", self.teacher, model, bench, alike=SAME_CLASSES)

    def transfer(self, model: Model, bench: Bench) -> tuple[TensorDataset, TensorDataset | None]:
        """What is taught on, labelled by the teacher, and the pseudo data that are held out of it.

        Args:
            model: the student.
            bench: with training data.
        """
        classes = not isinstance(model.task, Regression)
        given = inputs_of(bench.train)
        made = self.pseudo().grow(TensorDataset(given), bench.seed, progress=bench.progress)
        samples = len(made) + len(given)
        kept = bench.checkpoints / "answers" if bench.checkpoints is not None else None
        named = self._teachers(model, bench)
        teachers = Teachers(named, samples if kept is not None else 0, kept, classes=classes)
        held = None
        train = labelled(teachers, made.tensors[0], classes=classes, progress=bench.progress) if len(made) else None
        if train is not None and self.held:
            train, held = hold_out(train, self.held, bench.seed)
        if self.originals:
            own = labelled(teachers, given, classes=classes)
            train = own if train is None else _joined(train, own)
        assert train is not None  # noqa: S101  (there are copies or originals)
        return train, held


def _joined(one: TensorDataset, other: TensorDataset) -> TensorDataset:
    return TensorDataset(*(torch.cat(pair) for pair in zip(one.tensors, other.tensors, strict=True)))
