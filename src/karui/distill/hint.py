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

DEPARTURE: layers of stage 1 learn as fast as the others in stage 2; the option of a lower rate for them is left out.

DEPARTURE: layers above the guided one keep the values that they have; give an untrained student for the paper's random
ones. Weights that are exactly zero stay so (`keep_zeros`), so that a pruned network can be taught.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from karui.distill._asking import require_classes
from karui.distill._clipping import clipped
from karui.distill._maps import sizes_of_outputs
from karui.distill._teachers import Teacher, keeping, lacking_teachers, remark, teacher_of, teachers_of
from karui.errors import NeedError, SettingError, require, told
from karui.measuring.inference import inference
from karui.model import Model, layer_at
from karui.numerics.soft_targets import arithmetic, soft_cross_entropy
from karui.technique import Card, technique
from karui.train import Influence, Moment, Together, Turn
from karui.train.companion import Companion, companion_of
from karui.train.guide import Guide
from karui.train.influence import Speechless
from karui.train.masks import MaskKeeper, zero_masks
from karui.train.teaching import Teachers

if TYPE_CHECKING:
    from karui.technique import Bench

Activation = Literal["auto", "relu", "none"]
NUMBERS = "Set weight=0, or epochs=0: the hint needs no classes, and stage 2 then learns from the targets alone."
CLASSES = "Stage 2 needs a teacher that knows the same classes; set weight=0 for the hint alone."
REGRESSOR = "_hint_regressor"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def regressor(guided: tuple[int, ...], hint: tuple[int, ...], activation: Activation = "none") -> nn.Module:
    """The layers that turn the student's guided output into the size of the teacher's hint (section 2.2).

    Maps take a convolution without padding whose kernel spans the difference, N_g - k + 1 = N_h; vectors a dense layer.

    Args:
        guided: shape of the student's output, without the batch.
        hint: shape of the teacher's.
        activation: "relu" ends with it, as the hint's own layer does.

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
    return nn.Sequential(layer, nn.ReLU()) if activation == "relu" else nn.Sequential(layer)


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


@dataclass(frozen=True, eq=False)
class _Hint:
    """The objective of stage 1: the lower layers of the student, through the regressor, towards the hint."""

    guide: Guide
    layer: str
    teacher_layer: str

    @property
    def remarks(self) -> tuple[str, ...]:
        """That the teacher is asked anew, and why."""
        return self.guide.remarks

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], targets: Any) -> tuple[Any, Tensor]:
        del targets
        with torch.no_grad(), self.guide.on(inputs) as teacher:
            hint = output_of(teacher, self.teacher_layer, inputs)
        predicted = companion_of(module, REGRESSOR)(output_of(module, self.layer, inputs))
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
        activation: what the regressor ends with: "relu", "none", or "auto", which takes the ReLU where the hint has no
            negative number.
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
    activation: Activation = "auto"
    hint_epochs: int = 5
    epochs: int = 10
    temperature: float = 3.0
    weight: float = 4.0
    squared: bool = False
    keep_zeros: bool = True

    def __post_init__(self) -> None:
        known = ("auto", "relu", "none")
        require(self.activation in known, f"activation is {self.activation!r}; choose from {', '.join(known)}")
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

    def _pair(self, model: Model, teacher: Model) -> tuple[str, str, tuple[int, ...], tuple[int, ...]]:
        """The layers of the hint and their shapes, between which there is a regressor."""
        layer, teacher_layer = hint_pair(model, teacher, self.layer, self.teacher_layer)
        guided, hint = (_shape(one, path) for one, path in ((model, layer), (teacher, teacher_layer)))
        regressor(guided, hint)
        return layer, teacher_layer, guided, hint

    def _hinted(self, model: Model, teacher: Model, bench: Bench) -> Model:
        """The student after stage 1: layers above the guided one are as they were, to the bit."""
        layer, teacher_layer, guided, hint = self._pair(model, teacher)
        activation = self.activation
        if activation == "auto":
            activation = "relu" if _is_positive(teacher, teacher_layer, bench) else "none"
        influence = self._with_zeros(model, Companion(REGRESSOR, lambda _: regressor(guided, hint, activation)))
        objective = _Hint(Guide(teacher, (teacher_layer,)), layer, teacher_layer)
        if bench.influence is not None:  # what else teaches has to wait: there are no outputs yet
            bench = replace(bench, influence=Speechless(bench.influence))
        return replace(bench, training=clipped(bench.training)).fit(
            model, epochs=self.hint_epochs, influence=influence, turns=(Turn(name="hint", objective=objective),),
            label="hint",
        )  # fmt: skip


def hint_pair(student: Model, teacher: Model, layer: str, teacher_layer: str) -> tuple[str, str]:
    """The guided layer and the hint layer: those named, or the middle ones (of the teacher's, the nearest that fits).

    Raises:
        SettingError: no pair fits.
    """
    own, theirs = sizes_of_outputs(student), sizes_of_outputs(teacher)
    if not layer:
        layer = _middle(own)
    if teacher_layer:
        return layer, teacher_layer
    guided = _shape(student, layer)
    paths = list(theirs)
    middle = paths.index(_middle(theirs))
    nearest = sorted(paths, key=lambda path: abs(paths.index(path) - middle))
    for path in nearest:
        space, wanted = guided[1:], theirs[path][1:]
        if len(space) == len(wanted) and all(a >= b for a, b in zip(space, wanted, strict=True)):
            return layer, path
    given = f"the nearest, '{nearest[0]}', gives {theirs[nearest[0]]}"
    raise SettingError(
        f"'fitnets_hint': no layer of the teacher fits the student's '{layer}', which gives shape {guided}: {given}.",
        "Name layer and teacher_layer; maps of the student must be at least as large as the teacher's.",
    )


def _middle(shapes: dict[str, tuple[int, ...]]) -> str:
    """The middle one of the layers that give maps over space; of all layers where none does."""
    maps = [path for path, shape in shapes.items() if len(shape) > 1 and max(shape[1:]) > 1] or list(shapes)
    return maps[(len(maps) - 1) // 2]


def _shape(model: Model, path: str) -> tuple[int, ...]:
    with inference(model.module) as module:
        output = output_of(module, path, model.example)
    require(
        isinstance(output, Tensor) and output.ndim >= 2,
        f"'fitnets_hint': layer '{path}' gives {told(output)}.",
        "Name a layer that gives maps [batch, channels, ...] or vectors [batch, units].",
        SettingError,
    )
    return tuple(output.shape[1:])


def _is_positive(teacher: Model, path: str, bench: Bench) -> bool:
    with inference(teacher.module) as module:
        return all(bool((output_of(module, path, inputs) >= 0).all()) for inputs in bench.calibration(samples=128))
