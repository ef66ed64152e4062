"""Techniques made for the tests of recipes, put in the catalogue's place."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol

import pytest

from karui.errors import require
from karui.index import Entry
from karui.model import Model, Note
from karui.technique import Bench, Card, technique
from karui.train import Adam, Training


class Scale(Protocol):
    """A nested value that leaves a choice."""

    def of(self, x: float) -> float: ...


@dataclass(frozen=True)
class Twice:
    times: int = 2

    def of(self, x: float) -> float:
        return x * self.times


@dataclass(frozen=True)
class Shift:
    by: float = 1.0

    def of(self, x: float) -> float:
        return x + self.by


@technique(Card(survey=62, slug="shrink", title="t", kind="influence", identity={"ratio": 0.0}))
@dataclass(frozen=True, kw_only=True)
class Shrink:
    """Multiplies every parameter."""

    ratio: float = 0.5
    skip: tuple[str, ...] = ()
    ranks: dict[str, int] = field(default_factory=dict)
    scale: Scale = field(default_factory=Twice)
    limit: int | None = 4
    mode: Literal["even", "odd"] = "even"
    training: Training | None = None
    pick: Callable[[float], float] = abs
    folder: Path = Path()

    def __post_init__(self) -> None:
        require(0 <= self.ratio < 1, f"ratio is {self.ratio}; give a share in [0, 1)")

    def apply(self, model: Model, bench: Bench) -> Model:
        copy = model.copy()
        for parameter in copy.module.parameters():
            parameter.data.mul_(1 - self.ratio)
        return copy.evolve(copy.module, Note(f"shrunk by {self.ratio}"))


@technique(Card(survey=63, slug="train_more", title="t", kind="influence", needs=("labels", "training")))
@dataclass(frozen=True, kw_only=True)
class TrainMore:
    """Trains."""

    epochs: int = 1

    def apply(self, model: Model, bench: Bench) -> Model:
        return bench.fit(model, epochs=self.epochs, label="more")


HERE = ModuleType("karui_test_techniques")
for cls in (Scale, Twice, Shift, Shrink, TrainMore):
    cls.__module__ = HERE.__name__
    setattr(HERE, cls.__name__, cls)
HERE.__dict__.update(
    {"Callable": Callable, "Literal": Literal, "Path": Path, "Training": Training, "Adam": Adam, "Model": Model}
)
ENTRIES = tuple(
    Entry(
        room="sparsify",
        module=HERE.__name__,
        name=cls.__name__,
        card={"survey": cls.card.survey, "slug": cls.card.slug, "title": "t", "kind": cls.card.kind},
        source=f"class {cls.__name__}:\n" + "".join(f"    {f.name}: object = 0\n" for f in dataclasses.fields(cls)),
    )
    for cls in (Shrink, TrainMore)
)


@pytest.fixture(autouse=True)
def dummies(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setitem(sys.modules, HERE.__name__, HERE)
    monkeypatch.setattr("karui.survey.papers.techniques", lambda: ENTRIES)
    return HERE
