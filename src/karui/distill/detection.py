"""Chen et al. 2017, "Learning Efficient Object Detection Models with Knowledge Distillation" (survey 35).

A light detector learns three things from a heavy one: the probabilities of every box, in which mistakes about the
background weigh more; to come at least as near to the true boxes as its teacher, without being drawn to the teacher's,
which may be wrong; and an inner map, through an adaptation layer that is thrown away.

Pays where a detector too light for its task has a good teacher over the same boxes. Does not pay where the student does
as well alone; the hint's weight has to be found anew for other maps.

Measured on digits pasted onto a cluttered canvas, 300 pictures, five seeds, mAP at 0.5
(`results/detection_distillation.md`): in as many passes 19.5 alone, 23.6 by soft classes alone, which is [30] at
temperature 1 and half the weight, 26.1 by the hint, 30.7 by all three: 11.1 points over the student alone. At equal
cost, the teacher's passes counted, it does not beat [30] beyond chance: 27.5 by soft classes in twice the passes, which
takes 1.5 times the CPU seconds of all three, and 21.4 alone in as many, 1.3 times. That a hint needs its adaptation
layer where the channels are equal does not show: in 24 passes on 200 pictures hints without one were 2 to 5 points
better, for five seeds on each of five pairs of layers.

Paper -> here: mu -> hard, w_0 -> background, nu -> bounded, m -> margin, gamma -> hint, lambda -> the task's `weight`,
V and Z -> teacher_layer and layer, adaptation layer -> `adaptation`.

The two must judge the same boxes in the same order. Detectors with fixed anchors (`karui.Detection`) do. In a detector
of two stages the student's proposals have to be given to the teacher's head: the losses (`weighted_soft_loss`,
`bounded_loss`, `hint_distance`) work on any boxes, the technique itself on anchors. For a student that reads pictures
of half the size, let its network begin with the pooling; `resize` brings its maps to the teacher's size.

DEPARTURE: the hint is the mean over all units, where the paper has the sum: `hint` then means the same for maps of any
size.

DEPARTURE: where the model is no detector, the soft targets and the hint are used without boxes, and no class is the
background: the region classifier of the paper by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from karui.distill._asking import require_classes
from karui.distill._detection_parts import Resize, adaptation, bounded_loss, hint_distance, weighted_soft_loss
from karui.distill._layouts import Layout, layouts_of
from karui.distill._maps import last_of_each_size
from karui.distill._pairs import packed, unpacked
from karui.distill._teachers import Teacher, keeping, lacking_teachers, remark, teacher_of, teachers_of
from karui.errors import NeedError, SettingError, require, told
from karui.model import Detection, Model
from karui.model.detection import IGNORED
from karui.technique import Card, technique
from karui.train import Influence, Moment, Together
from karui.train.companion import Companion, companion_of
from karui.train.fingerprint import fingerprint
from karui.train.guide import Guide
from karui.train.masks import MaskKeeper, zero_masks
from karui.train.teaching import Teachers, is_unlabelled

if TYPE_CHECKING:
    from karui.technique import Bench

SLUG = "detection_distillation"
SAME_BOXES = "Both have to judge the same boxes and classes: give them the same anchors, or the same proposals."
ADAPTATION = "_hint_adaptation"


@dataclass(frozen=True, eq=False, kw_only=True)
class DetectionGuidance(Influence):
    """Mixes the three parts into the task's loss.

    Of what influences before this one in a `Together` have made of the loss, mu counts, as with `SoftTargets`, and all
    of it at mu = 0: put a term that is to count in full after this one. The task's own boxes count in full anyway.

    Settings:
        guide: the teacher, showing `theirs`; None where nothing is to be shown.
        teachers: in place of it, one or several that answer; the mean counts.
        task: the detector's; None where the model is no detector.
        layer, theirs: paths of the hint in student and teacher; "" where there is none.
        layouts: where batch and channels of the two are.
        adapted: name of the `Companion` that adapts the student's map.
        hard, background, bounded, margin, hint, resize: as in `DetectionDistillation`.
    """

    guide: Guide | None
    task: Detection | None
    teachers: Teachers | None = None
    layer: str = ""
    theirs: str = ""
    layouts: tuple[Layout, Layout] = (Layout(()), Layout(()))
    adapted: str = ADAPTATION
    hard: float = 0.5
    background: float = 1.5
    bounded: float = 0.5
    margin: float = 0.0
    hint: float = 0.5
    resize: Resize = "interpolate"

    @property
    def taps(self) -> tuple[str, ...]:
        """The student's layer."""
        return (self.layer,) if self.hint > 0 else ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """Whether the teacher's answers are kept, and why."""
        asked = self.guide or self.teachers
        return () if asked is None else asked.remarks

    def ahead(self, inputs: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
        """What the teacher says and shows of the batch."""
        if self.guide is not None:
            return self.guide.told(inputs)
        assert self.teachers is not None  # noqa: S101  (one of the two is there)
        said = self.teachers(inputs).mean(0)
        return said if self.task is None else unpacked(said), {}

    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        """Mu L_hard + (1 - mu) L_soft + lambda (smooth L1 + nu L_b) + gamma L_hint, from the task's loss."""
        answers, shown = self.ahead(moment.inputs) if moment.ahead is None else moment.ahead
        _same_boxes(moment.outputs, answers)
        if self.task is None:
            loss = self._mixed(loss, weighted_soft_loss(moment.outputs, answers, 1.0), moment)
        else:
            soft, boxes, bound = self._of_boxes(self.task, moment, answers)
            loss = self._mixed(loss, soft, moment, boxes) + bound
        if self.hint > 0:
            own, wanted = self.layouts[0].first(moment.taps[self.layer]), self.layouts[1].first(shown[self.theirs])
            adapted = companion_of(moment.module, self.adapted)(own)
            loss = loss + self.hint * hint_distance(adapted, wanted, self.resize)
        return loss

    def _mixed(self, loss: Tensor, soft: Tensor, moment: Moment, boxes: Tensor | float = 0.0) -> Tensor:
        """Mu loss + (1 - mu) (L_soft + lambda L_boxes): of the task's loss the classes' part alone is scaled.

        Only so do two such terms share out one weight: that of L_hard is mu², not 1 - 2 (1 - mu), which may be
        negative. At mu = 0 what others have made of the loss is kept.
        """
        if is_unlabelled(moment.targets, moment.task):
            return soft + loss
        if self.hard == 0:
            return soft + boxes if moment.is_plain(loss) else loss + soft
        return self.hard * loss + (1 - self.hard) * (soft + boxes)

    def _of_boxes(
        self, task: Detection, moment: Moment, answers: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """L_soft, lambda times the smooth L1 distance, which is in the task's loss, and lambda nu L_b."""
        (logits, offsets), (probabilities, bar) = moment.outputs, answers
        labels, wanted = task.matched(moment.targets)
        # Where a picture has no label, its teacher tells which anchors are those of objects.
        silent = (labels == IGNORED).all(1, keepdim=True)
        counted = torch.where(silent, probabilities.argmax(1), labels)
        soft = weighted_soft_loss(logits, probabilities, self.background, task.weights(counted))
        boxes = task.weight * task.box_loss(offsets, wanted, labels)
        if self.bounded == 0:
            return soft, boxes, 0.0
        bound = bounded_loss(offsets, bar, wanted, self.margin, labels > 0)
        return soft, boxes, task.weight * self.bounded * bound


def _same_boxes(outputs: Any, answers: Any) -> None:
    """Refuse a teacher that judges other boxes or classes."""
    pairs = [value if isinstance(value, (tuple, list)) else (value,) for value in (outputs, answers)]
    shapes = [[tuple(part.shape) if isinstance(part, Tensor) else None for part in pair] for pair in pairs]
    require(
        shapes[0] == shapes[1],
        f"The student gives {told(outputs)} and the teacher {told(answers)}.",
        SAME_BOXES,
        NeedError,
    )


@technique(
    Card(
        survey=35,
        slug="detection_distillation",
        title="Learning Efficient Object Detection Models with Knowledge Distillation",
        kind="influence",
        needs=("labels", "training", "teacher"),
        identity={"epochs": 0},
        quick={"epochs": 1},
        pays="A light detector with a good teacher over the same boxes: soft classes, a bar for the boxes, and a hint.",
        costs="Nothing gets smaller by it; teacher and student must judge the same boxes in the same order. "
        "Beyond the chance of five seeds it does not beat soft targets [30], in as many passes or at equal cost.",
    )
)
@dataclass(frozen=True, kw_only=True)
class DetectionDistillation:
    """Train a detector under a heavier one: weighted soft classes, teacher-bounded boxes, and a hint.

    Settings:
        teacher: a karui Model, the folder of a saved one or a torch module; without a hint also what only answers, a
            function, the path of an .onnx file (logits and offsets, in this order), or several of these, whose mean
            counts; None is the model at the start of the pipeline.
        layer: path of the student's layer for the hint; "" takes the last one that gives maps over space.
        teacher_layer: path of the teacher's; "" takes its last one.
        hard: mu, the share of the true classes against the teacher's, in [0, 1]; what influences before this one in a
            `Together` have added to the loss counts so much too. At 0 it counts in full, and with it what they have
            left of the labels' part.
        background: weight of the background in the soft part.
        bounded: weight of the bounded distance of boxes; 0 leaves it out.
        margin: how much better than the teacher, in squared offsets, a box must be before it is let go.
        hint: weight of the hint; 0 leaves it out. Its maps have no common scale: try 0.1 to 10.
        resize: how the student's map is brought to the size of the teacher's: "interpolate" or "pad".
        epochs: passes over the training data.
        keep_zeros: whether weights that are exactly zero stay so.

    Raises:
        SettingError: a setting is out of range, or the layers are of different kinds.
        NeedError: there is no teacher, or it judges other boxes.

    Relations: `KnowledgeDistillation` is the soft part for classes without background; `FitNets` gives its hint in a
    stage of its own.

    Example:
        >>> DetectionDistillation(layer="body", teacher_layer="body").background
        1.5
    """

    teacher: Teacher | tuple[Teacher, ...] | None = None
    layer: str = ""
    teacher_layer: str = ""
    hard: float = 0.5
    background: float = 1.5
    bounded: float = 0.5
    margin: float = 0.0
    hint: float = 0.5
    resize: Resize = "interpolate"
    epochs: int = 10
    keep_zeros: bool = True

    def __post_init__(self) -> None:
        require(0 <= self.hard <= 1, f"hard is {self.hard}; give a share in [0, 1], for example 0.5")
        require(self.background > 0, f"background is {self.background}; give a positive weight, for example 1.5")
        for name in ("bounded", "margin", "hint"):
            value = getattr(self, name)
            require(value >= 0, f"{name} is {value}; give a number from 0")
        require(self.epochs >= 0, f"epochs is {self.epochs}; give a whole number from 0")

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What `karui plan` tells of it."""
        if isinstance(model.task, Detection):
            return (remark(self.teacher),)
        return (remark(self.teacher), "the model's task is no Detection: soft targets and the hint are used, no boxes")

    def lacks(self, bench: Bench, *, first: bool) -> list[tuple[str, str]]:
        """What is missing for a teacher, before any work starts: (message, remedy) pairs."""
        return lacking_teachers(SLUG, self.teacher, bench, first=first)

    def fits(self, model: Model, bench: Bench) -> None:
        """Ask a teacher that is named once, so that one that does not fit is told before anything is trained."""
        if self.epochs:
            self._require_classes(model)
        if self.teacher is not None:
            self.influence(model, bench)

    def influence(self, model: Model, bench: Bench) -> Influence:
        """The three parts, for a training of `model` or of what becomes of it."""
        self._require_classes(model)
        parts = self._with_hint(model, bench) if self.hint > 0 else (self._of_answers(model, bench),)
        masks = zero_masks(model.module) if self.keep_zeros else {}
        return Together(*([MaskKeeper(masks)] if masks else []), *parts)

    def _require_classes(self, model: Model) -> None:
        if self.hard < 1 and not isinstance(model.task, Detection):
            require_classes(SLUG, model, "Give the model task=karui.Detection(...), or set hard=1 for the hint alone.")

    def _with_hint(self, model: Model, bench: Bench) -> tuple[Influence, ...]:
        """All three parts, and the adaptation layer of the hint."""
        inside = "looks at inner layers of its teacher"
        teacher = teacher_of(SLUG, self.teacher, model, bench, whole=inside, alike=SAME_BOXES)
        layer, theirs = self._layers(model, teacher)
        own, hint, example = layouts_of(model)[layer], layouts_of(teacher)[theirs], model.example
        adaptation(own.shape, hint.shape)  # shapes that do not fit are told now

        def fitting(module: nn.Module) -> nn.Module:
            """For the network as it is then: another technique may have cut it."""
            return adaptation(layouts_of(Model(module, example=example))[layer].shape, hint.shape)

        # A name of its own: a training under two teachers has two of these layers.
        name = f"{ADAPTATION}_{fingerprint(teacher.module, layer, theirs)}"
        asked = {
            "guide": Guide(teacher, (theirs,)),
            "layer": layer,
            "theirs": theirs,
            "adapted": name,
            "layouts": (own, hint),
        }
        return Companion(name, fitting), self._guidance(model, **asked)

    def _of_answers(self, model: Model, bench: Bench) -> DetectionGuidance:
        """What answers alone tell: the classes and the boxes."""
        teachers = teachers_of(SLUG, self.teacher, model, bench, alike=SAME_BOXES)
        if isinstance(model.task, Detection):
            teachers = tuple(map(packed, teachers))
        asked = keeping(teachers, bench).teachers(teachers, classes=False)
        return self._guidance(model, guide=None, teachers=asked)

    def _guidance(self, model: Model, **asked: Any) -> DetectionGuidance:
        return DetectionGuidance(
            task=model.task if isinstance(model.task, Detection) else None,
            hard=self.hard,
            background=self.background,
            bounded=self.bounded,
            margin=self.margin,
            hint=self.hint,
            resize=self.resize,
            **asked,
        )

    def apply(self, model: Model, bench: Bench) -> Model:
        """The student, taught."""
        if self.epochs == 0:
            return model
        return bench.fit(model, epochs=self.epochs, influence=self.influence(model, bench), label="distil the detector")

    def _layers(self, model: Model, teacher: Model) -> tuple[str, str]:
        """The layers of the hint: those named, or the last ones of each that give maps."""
        paths = []
        for one, named, whose in ((model, self.layer, "student"), (teacher, self.teacher_layer, "teacher")):
            known = layouts_of(one)
            path = named or next(reversed(last_of_each_size(one)), "")
            require(
                path in known,
                f"'detection_distillation': layer '{path}' of the {whose} gives no map for a hint."
                if path
                else f"'detection_distillation': no layer of the {whose} gives maps over space for a hint.",
                "Name layer and teacher_layer, or set hint=0.",
                SettingError,
            )
            paths.append(path)
        return paths[0], paths[1]
