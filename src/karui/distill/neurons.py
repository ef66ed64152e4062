"""Neuron selection: Luo, Zhu, Liu, Wang and Tang 2016, "Face Model Compression by Distilling Knowledge from Neurons"
(survey 32).

A recognition network's last hidden layer says the same as its scores for thousands of identities, in far fewer numbers.
A student learns by least squares to give those of its neurons that tell identities apart, leave alone what a picture
happens to look like (pose, light, quality), and do not repeat one another. Its outputs are the feature by which two
pictures are compared.

Pays for embeddings: verification and search among identities, many of which the network was never trained on. Does not
pay where classes are wanted rather than a feature (the result gives neurons' values, not scores: use [30] or [31]).

Paper -> here: f_i -> the teacher's selected neurons, g -> the student's outputs, y_i -> kept, Phi -> `cost_of`,
Psi -> `likeness`, lambda -> redundancy, the descriptor a_i -> one-neuron areas under the ROC curve.

Measured on 40 faces of 28x23 (ORL), a teacher of 25 identities, changed pictures of the other 15, five seeds
(`results/neuron_selection_distillation.md`): eight of the teacher's own neurons that the energy selects verify 2.7
points better than eight at random (70.1 and 67.3 %). Students of 24 selected neurons come to 66.4 %, of random ones to
64.7, of all to 65.4, differences within chance, and of soft targets to 69.5, which is better. On pairs of digits as 80
classes soft targets are 11 points better after one pass, and neurons 2 after sixteen, by chance: that soft targets over
many classes converge slower, as the paper says, does not show.

DEPARTURE: the paper's energy terms are not told exactly; those here are the definite ones of `karui.numerics.neurons`:
cost = (best area over nuisances) - (mean area over identities), likeness a Gaussian of two neurons' descriptors.

DEPARTURE: mean field starts at a temperature of 1, where all choices are open, and cools; the paper's energy has one
temperature, at which it would stop in the nearest minimum.

DEPARTURE: a given number of neurons is reached from those that mean field keeps, one by one by the energy that each
adds, and by exchanges that lower it, where the paper takes those of the largest q. Cooled, these are 0 or 1 for most
neurons and do not tell them apart, and what the next one adds depends on which one came before.

DEPARTURE: where no attributes are labelled, identities stand for the wanted ones and four changes of the picture
(brightness, noise, shift, rotation) for the unwanted ones.

DEPARTURE: outputs are regressed before the ReLU by default, since most targets behind it are zero.

DEPARTURE: weights that are exactly zero in the student stay so (`keep_zeros`), so that a pruned network can be taught
without losing what pruning won.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from karui.distill._heads import head_of
from karui.distill._layouts import layouts_of
from karui.distill._maps import last_of_each_size
from karui.distill._selection import require_told, select_neurons
from karui.distill._teachers import Teacher, lacking_teachers, remark, teachers_of
from karui.distill.logits import logit_loss
from karui.errors import SettingError, UsageError, require, told
from karui.model import Model, Note, layer_at, replace_layers
from karui.technique import Card, require_passes, technique
from karui.train import Turn
from karui.train.guide import Guide
from karui.train.masks import MaskKeeper, zero_masks
from karui.train.randomness import seed_of, undisturbed
from karui.train.statistics import flattened

if TYPE_CHECKING:
    from karui.technique import Bench

By = Literal["energy", "random", "all"]


@dataclass(frozen=True, eq=False)
class _Regression:
    """The objective: the student's outputs towards the selected neurons of all teachers, side by side."""

    guides: tuple[Guide, ...]
    kept: tuple[Tensor, ...]

    @property
    def remarks(self) -> tuple[str, ...]:
        """That the teachers are asked anew, and why."""
        return tuple(line for guide in self.guides for line in guide.remarks)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], targets: Any) -> tuple[Any, Tensor]:
        del targets
        wanted = []
        with torch.no_grad():
            for guide, kept in zip(self.guides, self.kept, strict=True):
                (layer,) = guide.layers
                neurons = flattened(guide(inputs)[1], guide.layers)[layer]
                wanted.append(neurons[:, kept.to(neurons.device)])
        outputs = module(*inputs)
        return outputs, logit_loss(outputs, torch.cat(wanted, 1))


@technique(
    Card(
        survey=32,
        slug="neuron_selection_distillation",
        title="Face Model Compression by Distilling Knowledge from Neurons",
        kind="influence",
        needs=("labels", "training", "teacher"),
        identity={"epochs": 0},
        quick={"epochs": 1, "number": 16},
        pays="Embeddings for verification: a student learns the teacher's hidden neurons that tell identities apart.",
        costs="Its outputs are a feature, no class scores; on 40 faces of 28x23 soft targets taught better.",
        same_signature=False,
    )
)
@dataclass(frozen=True, kw_only=True)
class NeuronSelection:
    """Train a network to give the selected neurons of its teacher's last hidden layer.

    Settings:
        teacher: a karui Model, the folder of a saved one, or several of these, whose neurons are put side by side; None
            is the model at the start of the pipeline.
        layer: path of the teacher's layer; "" takes the last linear layer before that of the logits.
        number: neurons of each teacher, by the energy of so many; None keeps those that the energy says.
        by: how they are selected: "energy"; or one of the controls, "random" (as many as number) and "all".
        attributes: unwanted attributes by name, True or False for each validation sample; None changes the pictures.
        wanted: wanted ones in the same way; None takes the identities.
        redundancy: lambda, the weight of pairs of alike neurons in the energy.
        width: s, the distance of two descriptors at which neurons are alike.
        keep_zeros: whether weights that are exactly zero stay so.
        epochs: passes over the training data.

    Needs:
        A teacher, training data, and validation data, on which neurons are judged: pictures with identities, or
        `attributes` and `wanted` of theirs.

    Raises:
        SettingError: a setting is out of range, no neuron is selected, or an attribute is not told of each sample.
        NeedError: there is no teacher, there are no identities, or inputs are not pictures and no attributes are given.
        UsageError: a layer is not there.

    Relations: `LogitRegression` regresses the outputs; `FitNets` a middle layer, and throws the regressor away.

    Example:
        >>> NeuronSelection(number=64).by
        'energy'
    """

    teacher: Teacher | tuple[Teacher, ...] | None = None
    layer: str = ""
    number: int | None = None
    by: By = "energy"
    redundancy: float = 0.01
    width: float = 0.1
    attributes: Mapping[str, Any] | None = None
    wanted: Mapping[str, Any] | None = None
    keep_zeros: bool = True
    epochs: int = 10

    def __post_init__(self) -> None:
        number = 1 if self.number is None else self.number
        require(number > 0, f"number is {self.number}; give a positive one, or None")
        require(self.by != "random" or self.number is not None, "number is None; random neurons need a number")
        require(self.by != "all" or self.number is None, f"number is {number} and by is 'all'; leave one of them out")
        require(self.redundancy >= 0, f"redundancy is {self.redundancy}; give a weight from 0")
        require(self.width > 0, f"width is {self.width}; give a positive number, for example 0.1")
        require_passes(epochs=self.epochs)

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What `karui plan` tells of it."""
        del model
        return (remark(self.teacher), "the result gives a feature, not class scores")

    def lacks(self, bench: Bench, *, first: bool) -> list[tuple[str, str]]:
        """What is missing for a teacher, before any work starts: (message, remedy) pairs."""
        return lacking_teachers("neuron_selection_distillation", self.teacher, bench, first=first)

    def apply(self, model: Model, bench: Bench) -> Model:
        """The student, whose outputs are the selected neurons; without a task, as it gives no classes."""
        if self.epochs == 0:
            return model
        teachers = self._teachers(model, bench)
        layers = self._layers(teachers)
        kept = tuple(
            self.selection(one, path, bench, number)
            for number, (one, path) in enumerate(zip(teachers, layers, strict=True))
        )
        total = sum(len(one) for one in kept)
        require(total > 0, "number is None, and the energy keeps no neuron; give a number", error=SettingError)
        student = with_outputs(model, total, seed=bench.seed)
        guides = tuple(Guide(one, (path,)) for one, path in zip(teachers, layers, strict=True))
        turn = Turn(name="neurons", objective=_Regression(guides, kept))
        masks = zero_masks(student.module) if self.keep_zeros else {}
        keeper = MaskKeeper(masks) if masks else None
        taught = bench.fit(student, epochs=self.epochs, turns=(turn,), influence=keeper, label="neurons")
        facts = {"kept": [one.tolist() for one in kept]}
        note = Note(f"gives {total} neurons of its teacher, selected by {self.by}", facts)
        made = taught.evolve(taught.module, note)
        return Model(made.module, example=made.example, lineage=made.lineage)

    def fits(self, model: Model, bench: Bench) -> None:
        """Look at the held-out data, and ask a teacher that is named once, before anything is trained."""
        if self.by == "energy" and bench.validation is not None:
            require_told(bench.validation, _flags(self.attributes), _flags(self.wanted))
        if self.teacher is not None:
            self._layers(self._teachers(model, bench))

    def _layers(self, teachers: tuple[Model, ...]) -> list[str]:
        return [self.layer or last_hidden(one) for one in teachers]

    def _teachers(self, model: Model, bench: Bench) -> tuple[Model, ...]:
        inside = "looks at inner neurons of its teacher"
        return teachers_of("neuron_selection_distillation", self.teacher, model, bench, whole=inside)

    def selection(self, teacher: Model, layer: str, bench: Bench, number: int = 0) -> Int[Tensor, "kept"]:
        """The neurons of a teacher's layer that are kept; `number` tells teachers of an ensemble apart."""
        units = flattened(Guide(teacher, (layer,))(teacher.example)[1], (layer,))[layer].shape[1]
        most = units if self.number is None else self.number
        require(most <= units, f"number is {most}; the layer '{layer}' has {units} neurons", error=SettingError)
        if self.by == "all":
            return torch.arange(units)
        seed = seed_of(bench.seed, "neurons", number)
        if self.by == "random":
            return torch.randperm(units, generator=torch.Generator().manual_seed(seed))[:most].sort().values
        return select_neurons(
            teacher, layer, bench.validation, self.number, attributes=_flags(self.attributes),
            redundancy=self.redundancy, width=self.width, seed=seed, wanted=_flags(self.wanted),
        )  # fmt: skip


def _flags(told: Mapping[str, Any] | None) -> dict[str, Bool[Tensor, "samples"]] | None:
    """Attributes as tensors."""
    return None if told is None else {name: torch.as_tensor(one).bool() for name, one in told.items()}


def last_hidden(model: Model) -> str:
    """Path of the last linear layer before that of the logits.

    Raises:
        UsageError: there is none.
    """
    head = head_of(model)
    linear = [path for path, part in model.module.named_modules() if isinstance(part, nn.Linear) and path != head]
    hint = "Give a teacher with hidden layers."
    if not linear:
        sizes = {path: layout.shape for path, layout in layouts_of(model).items()}
        ends = last_of_each_size(model) or [path for path in sizes if path != head]
        named = [f"layer={path} ({math.prod(sizes[path]):,} neurons)" for path in reversed(ends)]
        hint = f"Name another: {', '.join(named)}." if named else hint
    require(bool(linear), "The teacher has no linear layer before its last one.", hint, UsageError)
    return linear[-1]


def with_outputs(model: Model, number: int, *, seed: int = 0) -> Model:
    """The student with a last layer of so many outputs, drawn anew.

    Raises:
        UsageError: no linear layer gives the student's output.
    """
    path = head_of(model)
    old = None if path is None else layer_at(model.module, path)
    if path is None or not isinstance(old, nn.Linear):
        raise UsageError(f"The student's last layer is {told(old)}, not linear.", "Give a student that ends with one.")
    with undisturbed():
        torch.manual_seed(seed)
        new = nn.Linear(old.in_features, number).to(old.weight)
    return replace_layers(model, {path: new}, f"'{path}' gives {number} neurons", check=False)
