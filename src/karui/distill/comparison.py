"""A transparent student beside the same one taught by labels, and beside the network, over repeated splits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch.utils.data import Subset

from karui.data import Batches
from karui.distill._fidelity import Difference, Spread, auc, differences, r_squared
from karui.distill.transparent import TransparentDistillation, hard_lesson, lesson_of, scores_of
from karui.errors import NeedError, require
from karui.measuring.inference import inference
from karui.model import Model

WARNING = "Shapes of inputs that go together share what either explains: they are no causes."


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What came out over the splits.

    Settings:
        spreads: fidelity and accuracy of the distilled student, of the direct one, and of the network.
        paired: differences, split by split, with their intervals.
    """

    spreads: tuple[Spread, ...]
    paired: tuple[Difference, ...]

    def spread(self, name: str) -> Spread:
        """The one of this name."""
        return next(one for one in self.spreads if one.name == name)

    def difference(self, name: str) -> Difference:
        """The one of this name."""
        return next(one for one in self.paired if one.name == name)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.spreads), *map(str, self.paired), WARNING])


def compare(
    technique: TransparentDistillation,
    teach: Callable[[Any, int], Model],
    dataset: Any,
    *,
    splits: int = 5,
    held_out: float = 0.3,
    seed: int = 0,
) -> Comparison:
    """Teach, distil and learn directly on repeated splits of a data set; all is measured on what is held out.

    Fidelity is R2 on the network's scores and, for a classifier, the AUC of the student's scores against the network's
    decisions; accuracy is the AUC against the true classes, else the root mean squared error. A direct student of a
    classifier is one of log loss on labels: only the additive one has it.

    Args:
        technique: makes the students; the additive one for a classifier.
        teach: `(training data, split number) -> network`.
        dataset: samples with targets.
        splits: how many.
        held_out: share of the samples that is measured on, in (0, 1).
        seed: of the splits.

    Raises:
        NeedError: a classifier, and a student that is not additive.
    """
    rows = []
    for number in range(splits):
        train, test = _split(dataset, held_out, seed + number)
        teacher = teach(train, number)
        rows.append(_row(technique, teacher, train, test, number))
    table = {name: tuple(row[name] for row in rows) for name in rows[0]}
    spreads = tuple(Spread(name=name, values=values) for name, values in table.items())
    measures = [name.removeprefix("direct ") for name in table if name.startswith("direct ")]
    paired = [differences(f"{m}, distilled - direct", table[f"distilled {m}"], table[f"direct {m}"]) for m in measures]
    paired += [
        differences(f"{m}, distilled - network", table[f"distilled {m}"], table[f"network {m}"])
        for m in measures
        if f"network {m}" in table
    ]
    return Comparison(spreads=spreads, paired=tuple(paired))


def _split(dataset: Any, held_out: float, seed: int) -> tuple[Subset, Subset]:
    """Held out and rest; classes in equal shares."""
    batches = Batches(dataset)
    _, targets = batches.fetch(torch.arange(len(batches)))
    by_class = None if targets.is_floating_point() else targets.numpy()
    train, test = train_test_split(np.arange(len(batches)), test_size=held_out, random_state=seed, stratify=by_class)
    return Subset(dataset, _numbers(train)), Subset(dataset, _numbers(test))


def _numbers(places: Iterable[int]) -> list[int]:
    return [int(place) for place in places]


def _row(technique: TransparentDistillation, teacher: Model, train: Any, test: Any, seed: int) -> dict[str, float]:
    lesson, truth = lesson_of(teacher, train, technique.target)
    classes = not truth.is_floating_point()
    require(
        technique.student == "ga2m" or not classes,
        f"A {technique.student} that is taught by labels gives no logits to compare.",
        "Compare the student 'ga2m', or a regression.",
        NeedError,
    )
    wanted, known = lesson_of(teacher, test)
    row = {}
    for name, own in (("distilled", lesson), ("direct", hard_lesson(lesson, truth))):
        layer = technique.grow(own, seed)
        with inference(layer) as module:
            outputs = module(torch.from_numpy(wanted.inputs))
        scores = scores_of(outputs, classes=classes)[0].numpy()
        row[f"{name} fidelity R2"] = r_squared(scores, wanted.targets)
        if classes:
            row[f"{name} fidelity AUC"] = auc(scores, _decisions(wanted.targets))
        row |= _truly(name, scores, known)
    return row | _truly("network", wanted.targets, known)


def _truly(name: str, scores: np.ndarray, known: torch.Tensor) -> dict[str, float]:
    """Against the truth."""
    if not known.is_floating_point():
        return {f"{name} accuracy AUC": auc(scores, known.numpy())}
    error = scores - known.numpy().reshape(len(scores), -1)
    return {f"{name} error RMSE": float(np.sqrt((error**2).mean()))}


def _decisions(scores: np.ndarray) -> np.ndarray:
    return (scores[:, 0] > 0).astype(int) if scores.shape[1] == 1 else scores.argmax(1)
