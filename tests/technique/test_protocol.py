"""The protocol, its needs, and sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from karui.errors import NeedError, SettingError, UsageError
from karui.model import Classification, Model, Note
from karui.technique import Bench, Card, Technique, Then, lacking, technique


@technique(Card(survey=1, slug="test_scale", title="Scale", kind="replace", needs=("labels", "training")))
@dataclass(frozen=True, kw_only=True)
class Scale:
    """Multiply the weights."""

    factor: float = 2.0

    def apply(self, model: Model | None, bench: Bench) -> Model:
        assert model is not None
        model = model.copy()
        with torch.no_grad():
            for parameter in model.module.parameters():
                parameter.mul_(self.factor)
        return model.evolve(model.module, Note(f"scaled by {self.factor}"))


@technique(Card(survey=1, slug="test_build", title="Build", kind="build"))
@dataclass(frozen=True, kw_only=True)
class Build:
    """A linear layer."""

    def apply(self, model: Model | None, bench: Bench) -> Model:
        return Model(nn.Linear(2, 2), example=(torch.zeros(1, 2),), task=Classification())


def bench() -> Bench:
    data = TensorDataset(torch.randn(40, 2), torch.arange(40) % 2)
    return Bench(train=data, test=data)


def test_a_pipeline_is_a_technique_and_applies_in_order() -> None:
    model = Then(Build(), Scale(factor=3.0), Scale(factor=2.0)).apply(None, bench())
    assert [step.describe() for step in model.lineage[-2:]] == ["scaled by 3.0", "scaled by 2.0"]
    assert isinstance(Then(Build()), Technique)


def test_what_is_lacking_is_refused_before_the_first_step() -> None:
    @dataclass(frozen=True)
    class Explodes:
        def apply(self, model: Model | None, bench: Bench) -> Model:
            raise AssertionError("started")

    model = Model(nn.Linear(2, 2), example=(torch.zeros(1, 2),))
    with pytest.raises(NeedError, match="test_scale.*training data"):
        Then(Explodes(), Scale()).apply(model, Bench())
    with pytest.raises(NeedError, match="needs a model"):
        Scale().apply(None, bench())
    with pytest.raises(NeedError, match="no task"):
        Scale().apply(model, bench())
    assert lacking(Scale(), replace(model, task=Classification()), bench()) == []


def test_a_pipeline_is_made_of_techniques() -> None:
    with pytest.raises(UsageError, match="no technique"):
        Then("l1_filter_pruning")  # pyright: ignore
    with pytest.raises(UsageError, match="no step"):
        Then()


def test_a_card_is_checked() -> None:
    with pytest.raises(SettingError, match="1 to 80"):
        Card(survey=81, slug="x", title="X", kind="cut")
    with pytest.raises(SettingError, match="choose from"):
        Card(survey=1, slug="x", title="X", kind="cut", needs=("luck",))  # pyright: ignore
    with pytest.raises(SettingError, match="not settings"):
        technique(Card(survey=1, slug="x", title="X", kind="cut", identity={"rate": 0}))(Scale)
    with pytest.raises(SettingError, match="frozen dataclass"):
        technique(Card(survey=1, slug="x", title="X", kind="cut"))(type("Loose", (), {}))


def test_a_validation_split_is_cut_from_training_data_only() -> None:
    made = bench()
    assert len(made.train) + len(made.validation) == 40
    assert len(made.test) == 40
    again = replace(made, seed=9)
    assert len(again.train) == len(made.train)


@pytest.mark.parametrize("given", [True, False])
def test_every_step_finds_the_model_that_the_pipeline_started_from(given: bool) -> None:
    seen: list[Model | None] = []

    @dataclass(frozen=True)
    class Look:
        def apply(self, model: Model | None, bench: Bench) -> Model:
            seen.append(bench.dense)
            assert model is not None
            return model.copy()

    start = Model(nn.Linear(2, 2), example=(torch.zeros(1, 2),)) if given else None
    Then(Build(), Look(), Look()).apply(start, bench())
    assert seen[0] is not None
    assert seen[0] is seen[1]
    assert (seen[0] is start) == given
