"""Transparent model distillation: Tan, Caruana, Hooker and Gordo 2018 (survey 40).

A network on tabular data teaches a student that a person can read: a sum of shape functions of one input each, and of a
few pairs (GA2M); or boosted trees; or one small tree. The student learns the network's logits, not its decisions.

Pays where a decision must be explained, or to see what a network has learned: the shapes are all that the student is.
Does not pay on pictures, sound or text, whose inputs mean nothing one by one; nor for size or speed: tables and trees
are larger and slower than a small network. The authors call their own results inconclusive. Shapes of inputs that go
together share what either explains: read them together.

Measured on three small tables, five splits, of perceptrons of 32 units (`results/transparent_distillation.md`): the
additive student explains 97 % of the variance of the network's logits on breast cancer, 93 on wine, and 89 to 91 of a
regression's outputs (diabetes); the same student that was taught without the network 84 to 87, 88 to 90 and 64 to 67.
It is as right as the network. Boosted trees reach 92 % of the regression, one tree of depth 4 only 73. Pairs add
nothing to the classifiers, two points to the regression.

Paper -> here: f_T -> the given model, or `teacher`, h_i and h_ij -> `Shapes.mains` and `Shapes.tables`, b ->
`Shapes.intercept`, the direct student -> `karui.distill.comparison.compare`.

DEPARTURE: trees of pairs are 2x2 cuts (one cut in each input), by which FAST ranks the pairs, too.

DEPARTURE: with several classes a student has a shape for each class, of the logits less their mean, since a constant
added to all of them means nothing; of two classes it has one, the logit of class 1 against class 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from karui.data import Batches
from karui.distill._fidelity import r_squared
from karui.distill._students import additive_layer, forest_layer, tree_layer
from karui.distill._teachers import Teacher, lacking_teachers, remark, spoken, teachers_of, zeros_of
from karui.errors import NeedError, SettingError, require, told
from karui.layers.additive import Form
from karui.measuring.bar import bar
from karui.measuring.inference import inference
from karui.model import Classification, Model, Note, replace_layers
from karui.numerics.additive import Boosting, Loss, Shapes, fit_additive
from karui.technique import Card, technique

if TYPE_CHECKING:
    from torch import nn

    from karui.technique import Bench

Student = Literal["ga2m", "boosted_trees", "tree"]
Target = Literal["logit", "probability"]
SLUG = "transparent_distillation"


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a student is grown on.

    Settings:
        inputs: `[samples, inputs]`, flattened.
        targets: `[samples, outputs]`: scores for the squared loss, probabilities for the loss "log".
        form: how the student's scores become the network's kind of answer.
        loss: of the student.
    """

    inputs: Float[np.ndarray, "samples inputs"]
    targets: Float[np.ndarray, "samples outputs"]
    form: Form
    loss: Loss = "squared"


def scores_of(outputs: Tensor, *, classes: bool) -> tuple[Float[Tensor, "samples outputs"], Form]:
    """A network's outputs as the numbers that a student learns, and the way back.

    Example:
        >>> scores_of(torch.tensor([[1.0, 4.0]]), classes=True)
        (tensor([[3.]]), 'binary')
    """
    require(
        isinstance(outputs, Tensor) and outputs.ndim <= 2 and outputs.is_floating_point(),
        f"'{SLUG}' needs outputs [batch] or [batch, outputs]; the model gives {told(outputs)}.",
        "It is for classifiers and regressions on tabular data.",
        NeedError,
    )
    if outputs.ndim == 1:
        return outputs[:, None], "vector"
    if classes and outputs.shape[1] == 2:
        return outputs[:, 1:] - outputs[:, :1], "binary"
    return (outputs - outputs.mean(1, keepdim=True) if classes else outputs), "numbers"


def _require_table(inputs: tuple[Any, ...]) -> None:
    """Refuse inputs that are no one tensor."""
    require(
        len(inputs) == 1 and isinstance(inputs[0], Tensor),
        f"'{SLUG}' needs a model of one input tensor, and this one takes {' and '.join(map(told, inputs))}.",
        "Put the columns of a table into one tensor.",
        NeedError,
    )


def lesson_of(model: Model, dataset: Any, target: Target = "logit") -> tuple[Lesson, Tensor]:
    """What the network says of a data set, and the data's own targets.

    Args:
        model: the teacher.
        dataset: inputs; their targets are passed on.
        target: "logit" for the squared loss, "probability" for the log loss with soft targets.
    """
    batches = Batches(dataset)
    parts = [batches.fetch(index) for index in torch.arange(len(batches)).split(256)]
    for inputs, _ in parts:
        _require_table(inputs)
    with inference(model.module) as module:
        outputs = torch.cat([module(*inputs) for inputs, _ in parts])
    classes = isinstance(model.task, Classification)
    scores, form = scores_of(outputs, classes=classes)
    flat = torch.cat([inputs[0].flatten(1) for inputs, _ in parts]).float().numpy()
    truth = [targets for _, targets in parts if targets is not None]
    known = torch.cat(truth) if truth else torch.empty(0)
    if target == "logit":
        return Lesson(flat, scores.double().numpy(), form), known
    require(classes, "target is 'probability', and the model is no classifier; give 'logit'", error=SettingError)
    soft = scores.double().sigmoid() if form == "binary" else outputs.double().softmax(1)
    return Lesson(flat, soft.numpy(), form, "log"), known


def hard_lesson(lesson: Lesson, truth: Tensor) -> Lesson:
    """The same inputs with the data's own targets: what the student is taught directly."""
    if lesson.form == "vector" or truth.is_floating_point():
        return replace(lesson, targets=truth.double().reshape(len(truth), -1).numpy(), loss="squared")
    hard = truth.double()[:, None] if lesson.form == "binary" else torch.eye(lesson.targets.shape[1])[truth].double()
    return replace(lesson, targets=hard.numpy(), loss="log")


@technique(
    Card(
        survey=40,
        slug="transparent_distillation",
        title="Transparent Model Distillation",
        kind="data",
        needs=("calibration",),
        quick={"rounds": 15, "pairs": 2, "bags": 2, "bins": 16, "pair_bins": 8},
        arxiv="1801.08640",
        pays="A network on tabular data becomes a sum of shapes that a person can read, true to its logits.",
        costs="Not for pictures, sound or text, nor for size or speed; what the network makes of many inputs is lost.",
    )
)
@dataclass(frozen=True, kw_only=True)
class TransparentDistillation:
    """Replace a network on tabular data by an additive model, or by trees, that learns what it says.

    Settings:
        teacher: whose outputs are learned: a karui Model, the folder of a saved one, a torch module, a fitted
            scikit-learn estimator, the path of an .onnx file, a function, "file.py:factory" or
            "package.module:factory" that makes one, or several of these, of which the mean of logits or numbers counts;
            None is the given model, whose place the student takes in either case.
        student: "ga2m", "boosted_trees" (scikit-learn's), or one "tree".
        target: "logit", by squared error; "probability", by log loss with soft targets (GA2M only).
        rounds: of boosting.
        rate: share of each tree that is added, in (0, 1].
        leaves: of each tree of one input (GA2M).
        bins: most bins of an input (GA2M).
        pairs: number of pairs of inputs (GA2M), those that FAST ranks first.
        pair_bins: most bins of an input within a pair (GA2M).
        bags: fits on resampled data, averaged, whose spread gives the bands of the shapes (GA2M).
        depth: of trees (boosted trees and tree).

    Needs:
        Inputs; labels are not looked at. Unlabelled inputs may be added to the training data.

    Raises:
        SettingError: a setting is out of range.
        NeedError: the model does not take one tensor, or gives more than one number for each class, or the teacher is
            not there, or not of the same classes.

    Relations: `KnowledgeDistillation` teaches a network, which no person can read. `export_shapes` writes the tables,
    `karui.distill.shape_plots` draws them.

    Example:
        >>> TransparentDistillation(pairs=5).student
        'ga2m'
    """

    teacher: Teacher | tuple[Teacher, ...] | None = None
    student: Student = "ga2m"
    target: Target = "logit"
    rounds: int = 200
    rate: float = 0.1
    leaves: int = 3
    bins: int = 64
    pairs: int = 0
    pair_bins: int = 32
    bags: int = 8
    depth: int = 4

    def __post_init__(self) -> None:
        require(self.target in ("logit", "probability"), f"target is {self.target!r}; choose logit or probability")
        require(
            self.target == "logit" or self.student == "ga2m",
            "target 'probability' is for the student 'ga2m'; trees learn logits",
        )
        require(self.depth >= 1, f"depth is {self.depth}; give a whole number from 1")
        self.boosting("squared")

    def boosting(self, loss: Loss) -> Boosting:
        """How the additive model is grown."""
        return Boosting(
            rounds=self.rounds, rate=self.rate, leaves=self.leaves, bins=self.bins, pairs=self.pairs,
            pair_bins=self.pair_bins, bags=self.bags, loss=loss,
        )  # fmt: skip

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What `karui plan` tells of it."""
        _require_table(model.example)
        place = f"a {self.student} of {model.example[0][0].numel()} inputs takes the place of the whole network"
        return (f"{place}, which is its teacher",) if self.teacher is None else (place, remark(self.teacher))

    def lacks(self, bench: Bench, *, first: bool) -> list[tuple[str, str]]:
        """What is missing for a teacher that is named, before any work starts: (message, remedy) pairs."""
        return [] if self.teacher is None else lacking_teachers(SLUG, self.teacher, bench, first=first)

    def fits(self, model: Model, bench: Bench) -> None:
        """Ask a teacher that is named once, so that one that does not fit is told before anything is trained."""
        _require_table(model.example)
        with inference(self._teacher(model, bench).module) as module:
            module(*model.example)

    def _teacher(self, model: Model, bench: Bench) -> Model:
        return model if self.teacher is None else spoken(SLUG, teachers_of(SLUG, self.teacher, model, bench), model)

    def apply(self, model: Model, bench: Bench) -> Model:
        """The student in place of the network."""
        teacher = self._teacher(model, bench)
        lesson, _ = lesson_of(teacher, bench.train, self.target)
        layer = self.grow(lesson, bench.seed, progress=bench.progress)
        student = replace_layers(model, {"": layer}, f"the network taught a {self.student} and gave it its place")
        facts = _facts(student, teacher, bench)
        lines = [Note(line) for line in zeros_of(teacher)]
        return student.evolve(student.module, *lines, Note("student of the network", facts))

    def grow(self, lesson: Lesson, seed: int = 0, *, progress: bool = False) -> nn.Module:
        """The student of a lesson, as a layer."""
        if self.student == "tree":
            return tree_layer(lesson.inputs, lesson.targets, lesson.form, depth=self.depth, seed=seed)
        if self.student == "boosted_trees":
            return forest_layer(
                lesson.inputs, lesson.targets, lesson.form, trees=self.rounds, rate=self.rate, depth=self.depth,
                seed=seed,
            )  # fmt: skip
        return additive_layer(self.shapes(lesson, seed, progress=progress), lesson.form)

    def shapes(self, lesson: Lesson, seed: int = 0, *, progress: bool = False) -> Shapes:
        """The additive model as tables, with bands: what a person reads."""
        settings = self.boosting(lesson.loss)
        passes = 2 * self.rounds + lesson.inputs.shape[1] if self.pairs else self.rounds
        with bar("grow", passes, progress) as advance:

            def wait(rounds: Iterable[int]) -> Iterator[int]:
                for number in rounds:
                    yield number
                    advance()

            return fit_additive(lesson.inputs, lesson.targets, settings, seed, wait)


def _facts(student: Model, teacher: Model, bench: Bench) -> dict[str, float]:
    """How true the student is to its teacher, on data that it was not grown on."""
    told_of = bench.validation if bench.validation is not None else bench.train
    wanted, said = (lesson_of(one, told_of)[0].targets for one in (teacher, student))
    return {"fidelity (R2 on scores)": round(r_squared(said, wanted), 4)}


def export_shapes(shapes: Shapes, file: str | Path, names: tuple[str, ...] = ()) -> None:
    """Write all tables as JSON: the prediction is the intercept and one entry of each table, added up.

    Args:
        shapes: of `TransparentDistillation.shapes`.
        file: to write.
        names: of the inputs.
    """
    titles = names or tuple(f"x{number}" for number in range(len(shapes.mains)))
    tables = {name: _plain(value) for name, value in asdict(shapes).items()}
    text = json.dumps({"inputs": titles, "importance": shapes.importance().tolist(), **tables}, indent=1)
    Path(file).write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value.tolist() if isinstance(value, np.ndarray) else value
