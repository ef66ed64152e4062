"""The ways of `distillation_table`: what is done to the student of each task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import TensorDataset

from karui.data import tensors_of
from karui.distill import (
    AttentionTransfer,
    BornAgain,
    DataFree,
    FitNets,
    KnowledgeDistillation,
    LogitRegression,
    ModelCompression,
    MutualLearning,
    NeuronSelection,
    TransparentDistillation,
)
from karui.distill._recording import record
from karui.model import Model
from karui.technique import Bench

ALONE, SOFT = "student alone", "[30] soft targets"
LENGTHS = (1, 3)
"""How many times as long the two that all others are compared with are trained."""


def longer(times: int) -> str:
    """What is added to the name of a base that is trained so many times as long."""
    return f", {times} times as long" if times > 1 else ""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """An untrained student, its teacher and the data.

    Settings:
        student, teacher: the networks.
        bench: what the student is trained on, and how.
        pool: inputs without labels, where there are some.
        owner: all of the teacher's data, for the record that its owner gives away.
    """

    student: Model
    teacher: Model
    bench: Bench
    pool: Any = None
    owner: Bench | None = None


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of training the student.

    Settings:
        name: begins with the number of the paper, but for the student alone.
        run: the trained student; its CPU time is what the arm costs.
        before: work of somebody else, such as the data's owner, whose time does not count.
    """

    name: str
    run: Callable[[Lesson, Any], Model]
    before: Callable[[Lesson], Any] = lambda _: None


def _bases(temperature: float = 4.0, *, lengths: tuple[int, ...] = LENGTHS) -> tuple[Arm, ...]:
    """The student alone and [30], each at several lengths."""

    def alone(times: int) -> Callable[[Lesson, Any], Model]:
        return lambda lesson, _: lesson.bench.fit(
            lesson.student, epochs=times * lesson.bench.training.epochs, label=ALONE
        )

    def soft(times: int) -> Callable[[Lesson, Any], Model]:
        def run(lesson: Lesson, _: Any) -> Model:
            epochs = times * lesson.bench.training.epochs
            technique = KnowledgeDistillation(teacher=lesson.teacher, temperature=temperature, epochs=epochs)
            return technique.apply(lesson.student, lesson.bench)

        return run

    return tuple(
        Arm(name=base + longer(times), run=run(times))
        for times in lengths
        for base, run in ((ALONE, alone), (SOFT, soft))
    )


def _arm(name: str, make: Callable[[Lesson], Any]) -> Arm:
    """A technique applied to the student."""
    return Arm(name=name, run=lambda lesson, _: make(lesson).apply(lesson.student, lesson.bench))


def _passes(lesson: Lesson) -> int:
    return lesson.bench.training.epochs


LAYERS = ("layer1", "layer2", "layer3")


def _maps(soft: float) -> Callable[[Lesson], Any]:
    return lambda one: AttentionTransfer(
        teacher=one.teacher, layers=LAYERS, teacher_layers=LAYERS, soft=soft, epochs=_passes(one)
    )


def _hint(layer: str, teacher_layer: str) -> Arm:
    """The teacher's inner layer for a pass, then its soft targets."""
    return _arm(
        "[33] hint, one pass before",
        lambda one: FitNets(
            teacher=one.teacher, layer=layer, teacher_layer=teacher_layer, hint_epochs=1, epochs=_passes(one)
        ),
    )


def _logits(lesson: Lesson) -> Any:
    return LogitRegression(teacher=lesson.teacher, epochs=_passes(lesson))


def _again(lesson: Lesson, _: Any) -> Model:
    return BornAgain().apply(lesson.bench.fit(lesson.student, label=ALONE), lesson.bench)


AGAIN = Arm(name="[37] born again, one generation", run=_again)
PEERS = _arm("[39] two peers, the first kept", lambda _: MutualLearning())


def for_pictures() -> tuple[Arm, ...]:
    """Convolutional networks: outputs, inner layers, and networks without a teacher."""
    return (
        *for_whole_pictures(),
        _arm("[34] attention maps", _maps(0.0)),
        Arm(
            name="[34] input gradients",
            run=lambda one, _: AttentionTransfer(teacher=one.teacher, by="gradients", epochs=_passes(one)).apply(
                one.student, one.bench
            ),
        ),
    )


def for_whole_pictures() -> tuple[Arm, ...]:
    """For a student of twice the channels: all of these but [34] by itself, whose gradients are the dearest way."""
    return (
        *_bases(),
        _arm("[34] attention maps and [30]", _maps(0.9)),
        AGAIN,
        PEERS,
        _hint("layer2", "layer2"),
    )


def for_speech() -> tuple[Arm, ...]:
    """Few labels, and more recordings without."""

    def pooled(lesson: Lesson) -> Any:
        inputs = tensors_of(lesson.pool)
        assert inputs is not None  # noqa: S101  (recordings lie in memory)
        return LogitRegression(teacher=lesson.teacher, unlabelled=TensorDataset(inputs[0]), epochs=_passes(lesson))

    return (
        *_bases(lengths=(1, 3, 9)),
        _arm("[31] logits", _logits),
        _arm("[31] logits, and of the other recordings", pooled),
        _hint("2", "2"),
        AGAIN,
        PEERS,
    )


def for_faces() -> tuple[Arm, ...]:
    """Features of people that no network has seen."""

    def neurons(**how: Any) -> Callable[[Lesson], Any]:
        return lambda one: NeuronSelection(teacher=one.teacher, epochs=_passes(one), **how)

    return (
        *_bases(lengths=(1, 3, 9)),
        _arm("[32] 24 selected neurons", neurons(number=24)),
        _arm("[32] 24 random neurons", neurons(number=24, by="random")),
    )


def for_words() -> tuple[Arm, ...]:
    """Soft targets at a lower temperature, for the many classes; [33] has no layer to map, as the cells are one."""
    return (*_bases(temperature=2.0, lengths=(1, 3, 9)), _arm("[31] logits", _logits), AGAIN, PEERS)


def for_rows() -> tuple[Arm, ...]:
    """Pseudo data, students that a person can read, and none of the data at all."""

    def without_data(lesson: Lesson, given: Any) -> Model:
        technique = DataFree(teacher=lesson.teacher, record=given, epochs=_passes(lesson))
        blank = replace(lesson.bench, train=_labels_only(lesson.bench.train))
        return technique.apply(lesson.student, blank)

    def given_away(lesson: Lesson) -> Any:
        assert lesson.owner is not None  # noqa: S101  (given for this task)
        return record(lesson.teacher, lesson.owner.train, "top")

    def glass(lesson: Lesson, _: Any) -> Model:
        return TransparentDistillation(rounds=100, bags=1).apply(lesson.teacher, lesson.bench)

    return (
        *_bases(lengths=(1, 3, 9, 27)),
        _arm(
            "[36] MUNGE, ten times as many",
            lambda one: ModelCompression(teacher=one.teacher, epochs=_passes(one) // 10),
        ),
        _arm(
            "[36] MUNGE, ten times as many, all passes",
            lambda one: ModelCompression(teacher=one.teacher, epochs=_passes(one)),
        ),
        Arm(name="[40] additive shapes (no network)", run=glass),
        Arm(name="[41] none of the data, top layer's record", run=without_data, before=given_away),
    )


def _labels_only(dataset: Any) -> Any:
    """The data set with its inputs blanked, so that nothing can be learned from them."""
    inputs, labels = tensors_of(dataset)
    return TensorDataset(torch.zeros_like(inputs), labels)
