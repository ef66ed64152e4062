"""FitNets: Romero, Ballas, Kahou, Chassang, Gatta and Bengio 2015, "FitNets: Hints for Thin Deep Nets" (survey 33).

A student that is thinner and deeper than its teacher is trained in two stages. First its lower half learns to predict
the output of a middle layer of the teacher, through a regressor that is thrown away; no label is used. Then the whole
student learns labels and softened probabilities, the latter with a weight that falls to zero.

Pays for deep thin networks that are hard to train from the start: without normalisation or shortcuts. Does not pay, or
little, where the student trains easily, and the hint has to be in the middle: a deep one binds the student too much.

Measured on the digits, five seeds, 24 passes in all: 18 layers of 16 units stay at chance (10 %) by labels or by soft
targets alone, and come to 31 % after a hint (19 to 48 by seed). Three such layers train by themselves, and no gain
shows: 93.9 % by labels, 95.3 by soft targets, 94.8 after a hint (`results/fitnets_hint.md`).

Paper -> here: hint and guided layer -> teacher_layer and layer, r(.; W_r) -> `regressor`, tau -> temperature, lambda ->
weight, stage 1 and stage 2 -> hint_epochs and epochs.

DEPARTURE: the weight of the soft part falls from the first step to the last; the authors' code keeps it at 4 for the
first 5 of 150 epochs.

DEPARTURE: optimizer and schedule are those of the bench, where the paper has RMSProp and early stopping.

DEPARTURE: in stage 1 gradients are clipped to a norm of 1 where the bench does not say another: a squared distance
summed over units is steep at first, and left a ResNet-20 at chance at a rate that fits cross-entropy (10 % against 45).

DEPARTURE: where the hint's non-linearity is made by steps that autograd does not name (a sum of ReLUs, x / (1 + |x|)),
the regressor ends with a ReLU if the hint has no negative number, else with none, and the lineage says so.

DEPARTURE: layers of stage 1 learn as fast as the others in stage 2; the option of a lower rate for them is left out.

DEPARTURE: layers above the guided one keep the values that they have; give an untrained student for the paper's random
ones. Weights that are exactly zero stay so (`keep_zeros`), so that a pruned network can be taught.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from karui.distill._asking import require_classes
from karui.distill._clipping import clipped
from karui.distill._endings import MADE, Kind, ending
from karui.distill._layouts import Channels, Layout, layout_at
from karui.distill._maps import hint_pair
from karui.distill._teachers import Teacher, keeping, lacking_teachers, remark, teacher_of, teachers_of
from karui.errors import NeedError, SettingError, require, told
from karui.measuring.inference import inference
from karui.model import Model, Note, layer_at
from karui.numerics.soft_targets import arithmetic, soft_cross_entropy
from karui.technique import Card, technique
from karui.train import Influence, Moment, Together, Turn
from karui.train.companion import Companion, companion_of
from karui.train.guide import Guide
from karui.train.influence import Speechless
from karui.train.loop import REMARK
from karui.train.masks import MaskKeeper, zero_masks
from karui.train.teaching import Teachers

if TYPE_CHECKING:
    from karui.technique import Bench

NUMBERS = "Set weight=0, or epochs=0: the hint needs no classes, and stage 2 then learns from the targets alone."
CLASSES = "Stage 2 needs a teacher that knows the same classes; set weight=0 for the hint alone."
REGRESSOR = "_hint_regressor"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def regressor(guided: tuple[int, ...], hint: tuple[int, ...], activation: Kind | nn.Module = "none") -> nn.Module:
    """The layers that turn the student's guided output into the size of the teacher's hint (section 2.2).

    Maps take a convolution without padding whose kernel spans the difference, N_g - k + 1 = N_h; vectors a dense layer.
    So do sequences of equal length: a kernel of 1 is a dense layer from units to units at each position.

    Args:
        guided: shape of the student's output, without the batch, channels first.
        hint: shape of the teacher's.
        activation: what it ends with, as the hint's own layer does: a kind, or a module.

    Raises:
        SettingError: the shapes are of different kinds, or the student's maps are smaller than the teacher's.

    Example:
        >>> regressor((8, 6, 6), (32, 4, 4))[0]
        Conv2d(8, 32, kernel_size=(3, 3), stride=(1, 1))
    """
    space, wanted = guided[1:], hint[1:]
    fits = len(space) == len(wanted) <= 3 and all(a >= b for a, b in zip(space, wanted, strict=True))
    require(
        fits,
        f"'fitnets_hint': the student's layer gives shape {guided} and the teacher's {hint}.",
        "Name layers whose maps have as many dimensions, the student's at least as large as the teacher's.",
        SettingError,
    )
    if not space:
        layer: nn.Module = nn.Linear(guided[0], hint[0])
    else:
        kernel = tuple(a - b + 1 for a, b in zip(space, wanted, strict=True))
        layer = CONVOLUTIONS[len(space) - 1](guided[0], hint[0], kernel)  # pyright: ignore[reportArgumentType]
    made = activation if isinstance(activation, nn.Module) else MADE[activation]()
    return nn.Sequential(layer) if isinstance(made, nn.Identity) else nn.Sequential(layer, made)


def hint_loss(predicted: Float[Tensor, "batch *shape"], hint: Float[Tensor, "batch *shape"]) -> Float[Tensor, ""]:
    """Half the squared distance, summed over units, averaged over the batch (equation 3).

    Example:
        >>> hint_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])).item()
        2.0
    """
    return (predicted - hint).square().flatten(1).sum(1).mean() / 2


class _Reached(Exception):  # noqa: N818  (it is no error)
    """The guided layer has given its output: what comes after it need not run."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def output_of(module: nn.Module, path: str, inputs: tuple[Any, ...]) -> Any:
    """The output of a layer, without running what comes after it.

    Raises:
        SettingError: the layer was not called.
    """

    def reached(layer: nn.Module, inputs: Any, output: Any) -> None:
        del layer, inputs
        raise _Reached(output)

    handle = layer_at(module, path).register_forward_hook(reached)
    try:
        module(*inputs)
    except _Reached as met:
        return met.output
    finally:
        handle.remove()
    raise SettingError(f"'fitnets_hint': layer '{path}' of the student was not called.", "Name another layer.")


@dataclass(frozen=True)
class _Pair:
    """The layers of a hint, by path, and where batch and channels of their outputs are."""

    layer: str
    teacher_layer: str
    guided: Layout
    hint: Layout


@dataclass(frozen=True, eq=False)
class _Hint:
    """The objective of stage 1: the lower layers of the student, through the regressor, towards the hint."""

    guide: Guide
    pair: _Pair

    @property
    def remarks(self) -> tuple[str, ...]:
        """That the teacher is asked anew, and why."""
        return self.guide.remarks

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], targets: Any) -> tuple[Any, Tensor]:
        del targets
        with torch.no_grad(), self.guide.on(inputs) as teacher:
            hint = self.pair.hint.first(output_of(teacher, self.pair.teacher_layer, inputs))
        guided = self.pair.guided.first(output_of(module, self.pair.layer, inputs))
        predicted = companion_of(module, REGRESSOR)(guided)
        return predicted, hint_loss(predicted, hint)


@dataclass(frozen=True, eq=False, kw_only=True)
class FadingTargets(Influence):
    """The loss plus w CE(teacher's softened probabilities, student's), with w falling linearly to zero.

    Settings:
        teachers: the teacher, or several, whose mean probabilities count.
        temperature: tau, for both.
        weight: w at the first step; at the last one it is zero.
        squared: whether the soft part is multiplied by tau², which the authors' code does not do.
    """

    teachers: Teachers
    temperature: float = 3.0
    weight: float = 4.0
    squared: bool = False

    def at(self, moment: Moment) -> float:
        """The weight of this step."""
        return self.weight * (1 - moment.step / max(1, moment.steps - 1))

    @property
    def remarks(self) -> tuple[str, ...]:
        """Whether the teacher's answers are kept."""
        return self.teachers.remarks if self.weight else ()

    def ahead(self, inputs: tuple[Any, ...]) -> Tensor | None:
        """What the teacher says of the batch."""
        return self.teachers(inputs) if self.weight else None

    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        """The mixed loss of this step."""
        weight = self.at(moment)
        if weight == 0:
            return loss
        answers = self.teachers(moment.inputs) if moment.ahead is None else moment.ahead
        outputs = moment.outputs
        require(
            isinstance(outputs, Tensor) and answers.shape[1:] == outputs.shape,
            f"The student gives {told(outputs)} and the teacher {told(answers[0])}.",
            CLASSES,
            NeedError,
        )
        soft = soft_cross_entropy(outputs, arithmetic(answers, self.temperature), self.temperature)
        return loss + weight * (soft if self.squared else soft / self.temperature**2)


@technique(
    Card(
        survey=33,
        slug="fitnets_hint",
        title="FitNets: Hints for Thin Deep Nets",
        kind="influence",
        needs=("labels", "training", "teacher"),
        identity={"epochs": 0, "hint_epochs": 0},
        quick={"epochs": 1, "hint_epochs": 1},
        arxiv="1412.6550",
        pays="Deep thin networks that hardly train from the start: the teacher's middle layer trains their lower half.",
        costs="Nothing gets smaller by it; a student that trains easily gains little for one stage more.",
    )
)
@dataclass(frozen=True, kw_only=True)
class FitNets:
    """Train the lower half of a network towards a middle layer of its teacher, then all of it.

    Settings:
        teacher: a karui Model, the folder of a saved one or a torch module; with hint_epochs=0 also what only answers,
            as [30] takes it, or several of these; None is the model at the start of the pipeline.
        layer: path of the student's guided layer; "" takes the middle one of those that give maps.
        teacher_layer: path of the teacher's hint layer; "" takes the one nearest the middle that fits.
        activation: the non-linearity that the regressor ends with: "auto" is that of the hint layer, or of the last
            activation in it, be it a module or a function; or one of "none", "relu", "relu6", "leaky_relu", "prelu",
            "elu", "selu", "gelu", "silu", "mish", "softplus", "sigmoid", "tanh", "hardtanh", "hardsigmoid",
            "hardswish". Where that of the hint cannot be known, "auto" takes the ReLU if the hint has no negative
            number, and says so.
        channels: where those of both layers are: "first" behind the batch, "last", as in sequences and transformers;
            "auto" tells it by the kind of each layer, and refuses where it cannot.
        hint_epochs: passes of the first stage.
        epochs: passes of the second stage.
        temperature: of the soft targets in stage 2.
        weight: of the soft part at the start of stage 2; it falls linearly to zero.
        squared: whether the soft part is multiplied by the squared temperature, as [30] does.
        keep_zeros: whether weights that are exactly zero stay so.

    Raises:
        SettingError: a setting is out of range, or the layers' shapes do not fit; both are named.
        NeedError: there is no teacher, it does not know the same classes, or the model tells none apart where stage 2
            has soft targets.

    Relations: `KnowledgeDistillation` is stage 2 with a constant weight; `AttentionTransfer` matches inner layers
    without a regressor, and in one stage.

    Example:
        >>> FitNets(layer="features.8", teacher_layer="features.4").temperature
        3.0
    """

    teacher: Teacher | tuple[Teacher, ...] | None = None
    layer: str = ""
    teacher_layer: str = ""
    activation: Kind | Literal["auto"] = "auto"
    channels: Channels = "auto"
    hint_epochs: int = 5
    epochs: int = 10
    temperature: float = 3.0
    weight: float = 4.0
    squared: bool = False
    keep_zeros: bool = True

    def __post_init__(self) -> None:
        require(self.hint_epochs >= 0, f"hint_epochs is {self.hint_epochs}; give a whole number from 0")
        require(self.epochs >= 0, f"epochs is {self.epochs}; give a whole number from 0")
        require(self.temperature > 0, f"temperature is {self.temperature}; give a positive number, for example 3")
        require(self.weight >= 0, f"weight is {self.weight}; give a number from 0, for example 4")

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What `karui plan` tells of it."""
        del model
        return (remark(self.teacher),)

    def lacks(self, bench: Bench, *, first: bool) -> list[tuple[str, str]]:
        """What is missing for a teacher, before any work starts: (message, remedy) pairs."""
        return lacking_teachers("fitnets_hint", self.teacher, bench, first=first)

    def fits(self, model: Model, bench: Bench) -> None:
        """Ask a teacher that is named once, so that one that does not fit is told before anything is trained."""
        self._require_classes(model)
        if self.teacher is not None and (self.hint_epochs or self.epochs):
            (teacher, *_) = self._teachers(model, bench)
            if self.hint_epochs:
                self._pair(model, teacher)

    def apply(self, model: Model, bench: Bench) -> Model:
        """The student, taught in two stages."""
        if self.hint_epochs == 0 and self.epochs == 0:
            return model
        self._require_classes(model)
        teachers, hinted = self._teachers(model, bench), model
        if self.hint_epochs:
            hinted = self._hinted(model, teachers[0], bench)
        if self.epochs == 0:
            return hinted
        kept = keeping(teachers, bench, None if self.weight else 0)
        fading = FadingTargets(
            teachers=kept.teachers(teachers, classes=False),
            temperature=self.temperature,
            weight=self.weight,
            squared=self.squared,
        )
        influence = self._with_zeros(model, fading)
        return bench.fit(hinted, epochs=self.epochs, influence=influence, label="distil after the hint")

    def _require_classes(self, model: Model) -> None:
        if self.epochs and self.weight:
            require_classes("fitnets_hint", model, NUMBERS)

    def _teachers(self, model: Model, bench: Bench) -> tuple[Model, ...]:
        """The teacher; without a hint, any that answer."""
        alike = CLASSES if self.epochs and self.weight else ""
        if self.hint_epochs == 0:
            return teachers_of("fitnets_hint", self.teacher, model, bench, alike=alike)
        inside = "looks at an inner layer of its teacher"
        return (teacher_of("fitnets_hint", self.teacher, model, bench, whole=inside, alike=alike),)

    def _with_zeros(self, model: Model, part: Influence) -> Influence:
        masks = zero_masks(model.module) if self.keep_zeros else {}
        return Together(MaskKeeper(masks), part) if masks else part

    def _pair(self, model: Model, teacher: Model) -> _Pair:
        """The layers of the hint, between whose outputs there is a regressor."""
        paths = hint_pair(model, teacher, self.layer, self.teacher_layer, self.channels)
        guided = layout_at("fitnets_hint", model, paths[0], "student", self.channels)
        hint = layout_at("fitnets_hint", teacher, paths[1], "teacher", self.channels)
        regressor(guided.shape, hint.shape)
        return _Pair(*paths, guided, hint)

    def _hinted(self, model: Model, teacher: Model, bench: Bench) -> Model:
        """The student after stage 1: layers above the guided one are as they were, to the bit."""
        pair = self._pair(model, teacher)
        activation, notes = self._activation(pair, teacher, bench)
        shapes = pair.guided.shape, pair.hint.shape
        made = Companion(REGRESSOR, lambda _: regressor(*shapes, copy.deepcopy(activation)))
        influence = self._with_zeros(model, made)
        objective = _Hint(Guide(teacher, (pair.teacher_layer,)), pair)
        if bench.influence is not None:  # what else teaches has to wait: there are no outputs yet
            bench = replace(bench, influence=Speechless(bench.influence))
        hinted = replace(bench, training=clipped(bench.training)).fit(
            model, epochs=self.hint_epochs, influence=influence, turns=(Turn(name="hint", objective=objective),),
            label="hint",
        )  # fmt: skip
        return hinted.evolve(hinted.module, *notes)

    def _activation(self, pair: _Pair, teacher: Model, bench: Bench) -> tuple[Kind | nn.Module, tuple[Note, ...]]:
        """What the regressor ends with, and what there is to tell of it."""
        if self.activation != "auto":
            return self.activation, ()
        found = ending(teacher, pair.teacher_layer, output_of, pair.hint.first)
        if found is not None:
            return found, ()
        positive = _is_positive(teacher, pair, bench)
        gives, ends = ("no", "a ReLU") if positive else ("also", "none")
        text = (
            f"the non-linearity of the hint '{pair.teacher_layer}' is not known; as it gives {gives} negative numbers, "
            f"the regressor ends with {ends}"
        )
        return "relu" if positive else "none", (Note(text, {REMARK: "hint"}),)


def _is_positive(teacher: Model, pair: _Pair, bench: Bench) -> bool:
    with inference(teacher.module) as module:
        said = (output_of(module, pair.teacher_layer, inputs) for inputs in bench.calibration(samples=128))
        return all(bool((pair.hint.first(output) >= 0).all()) for output in said)
