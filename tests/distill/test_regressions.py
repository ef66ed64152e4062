"""Who softens classes refuses what has none, in one line, before anything is trained, and lets through what has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from karui.distill import (
    AttentionTransfer,
    BornAgain,
    DataFree,
    DetectionDistillation,
    FitNets,
    KnowledgeDistillation,
    LogitRegression,
    MutualLearning,
)
from karui.errors import NeedError
from karui.model import Classification, CustomTask, Detection, Model, Regression
from karui.recipes.planned import plan_recipe
from karui.recipes.recipe import Recipe
from karui.technique import Bench, Then
from karui.train import Adam, Constant, Training

SOFTENING = [
    pytest.param(KnowledgeDistillation(epochs=1), "logit_regression", id="soft targets", marks=pytest.mark.paper(30)),
    pytest.param(FitNets(hint_epochs=1, epochs=1), "weight=0", id="hint", marks=pytest.mark.paper(33)),
    pytest.param(FitNets(hint_epochs=0, epochs=1), "weight=0", id="no hint", marks=pytest.mark.paper(33)),
    pytest.param(AttentionTransfer(soft=0.5, epochs=1), "soft=0", id="maps", marks=pytest.mark.paper(34)),
    pytest.param(DetectionDistillation(epochs=1), "karui.Detection", id="boxes", marks=pytest.mark.paper(35)),
    pytest.param(BornAgain(epochs=1), "logit_regression", id="born again", marks=pytest.mark.paper(37)),
    pytest.param(
        BornAgain(loss="cwtm", epochs=1), "logit_regression", id="born again by labels", marks=pytest.mark.paper(37)
    ),
    pytest.param(MutualLearning(epochs=1), "weight=0", id="peers", marks=pytest.mark.paper(39)),
    pytest.param(DataFree(epochs=1), "logit_regression", id="records", marks=pytest.mark.paper(41)),
]


def net(outputs: int, *after: nn.Module, hidden: int = 6, task: Any = None, seed: int = 0) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = (nn.Flatten(), nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, outputs), *after)
        return Model(nn.Sequential(*layers), example=(torch.zeros(2, 8),), task=task or Regression())


def gap(outputs: Any, targets: Tensor) -> Tensor:
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    return (first.reshape(len(first), -1).mean(1) - targets.reshape(len(first), -1).mean(1)).abs()


def mean_gap(outputs: Any, targets: Tensor) -> Tensor:
    return gap(outputs, targets).mean()


class Two(nn.Module):
    """A pair, which no soft target is for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        said = self.layer(x)
        return said, 2 * said


GAP = CustomTask(loss=mean_gap, scores=gap, metric="gap", higher_is_better=False)
WITHOUT = {
    "one number": net(1),
    "three numbers": net(3),
    "a flat number": net(1, nn.Flatten(0)),
    "one number of a task of one's own": net(1, task=GAP),
    "a pair": Model(Two(), example=(torch.zeros(2, 8),), task=GAP),
}
BOXES = net(1, task=Detection(anchors=((0, 0, 1, 1),)))


def bench_of(targets: Tensor, epochs: int = 1) -> Bench:
    x = torch.randn(len(targets), 8, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, targets)
    training = Training(epochs=epochs, batch_size=16, optimizer=Adam(lr=0.02), schedule=Constant())
    return Bench(train=data, validation=data, test=data, training=training)


@pytest.fixture
def untrained(nets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nets.never_trained(monkeypatch)


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("kind", WITHOUT)
@pytest.mark.parametrize(("technique", "remedy"), SOFTENING)
def test_what_tells_no_classes_apart_is_refused_before_anything_is_trained(
    technique: Any, remedy: str, kind: str
) -> None:
    model, bench = WITHOUT[kind], bench_of(torch.randn(32))
    taught = replace(bench, dense=model.copy())
    named = replace(technique, teacher=model.copy()) if hasattr(technique, "teacher") else technique
    refusals = (
        lambda: technique.apply(model, taught),
        lambda: technique.fits(model, taught),
        lambda: named.fits(model, bench),
        lambda: Then(named).apply(model, bench),
    )
    for refused in refusals:
        with pytest.raises(NeedError) as caught:
            refused()
        assert caught.value.message.startswith(f"'{technique.card.slug}' learns from scores of classes")
        assert remedy in caught.value.hint
        assert "\n" not in str(caught.value)
    (step,) = plan_recipe(model, Recipe(steps=(named,)), bench).steps
    assert [message.startswith(f"'{technique.card.slug}' learns from scores") for message, _ in step.refusals] == [True]


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(("technique", "remedy"), [one for one in SOFTENING if one.id != "boxes"])
def test_boxes_are_refused_by_those_that_are_not_made_for_them(technique: Any, remedy: str) -> None:
    for refused in (technique.apply, technique.fits):
        with pytest.raises(NeedError, match="scores of classes, and the model's task is Detection") as caught:
            refused(BOXES, replace(bench_of(torch.randn(32)), dense=BOXES.copy()))
        assert remedy in caught.value.hint


def marked(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).float().flatten(1).mean(1)


@pytest.mark.parametrize(
    "technique",
    [
        pytest.param(KnowledgeDistillation(epochs=1), marks=pytest.mark.paper(30)),
        pytest.param(FitNets(hint_epochs=1, epochs=1, layer="1", teacher_layer="1"), marks=pytest.mark.paper(33)),
        pytest.param(BornAgain(epochs=1), marks=pytest.mark.paper(37)),
        pytest.param(MutualLearning(epochs=1), marks=pytest.mark.paper(39)),
    ],
    ids=lambda step: type(step).__name__,
)
@pytest.mark.parametrize("positions", [False, True], ids=["samples", "positions"])
@pytest.mark.parametrize("own", [False, True], ids=["classification", "a task of one's own"])
def test_what_tells_classes_apart_is_let_through(technique: Any, positions: bool, own: bool) -> None:
    """Segmentations and token classifications have positions; a task of one's own may have classes all the same."""
    own_task = CustomTask(loss=functional.cross_entropy, scores=marked)
    after = (nn.Unflatten(1, (4, 5)),) if positions else ()
    task = own_task if own else Classification()
    student, teacher = (net(20, *after, task=task, seed=seed) for seed in (0, 1))
    shape = (32, 5) if positions else (32,)
    bench = replace(bench_of(torch.randint(4, shape)), dense=teacher)
    technique.fits(student, bench)
    made = technique.apply(student, bench)
    assert not torch.equal(made.module[3].weight, student.module[3].weight)


@pytest.mark.parametrize(
    "technique",
    [
        pytest.param(KnowledgeDistillation(weight=0.0, epochs=2), marks=pytest.mark.paper(30)),
        pytest.param(FitNets(weight=0.0, hint_epochs=1, epochs=2), marks=pytest.mark.paper(33)),
        pytest.param(FitNets(hint_epochs=2, epochs=0), marks=pytest.mark.paper(33)),
        pytest.param(MutualLearning(weight=0.0, epochs=2), marks=pytest.mark.paper(39)),
        pytest.param(MutualLearning(peers=1, epochs=2), marks=pytest.mark.paper(39)),
    ],
    ids=lambda step: type(step).__name__,
)
def test_what_the_refusals_advise_works(technique: Any) -> None:
    student, bench = net(1), bench_of(torch.randn(32, 1))
    bench = replace(bench, dense=net(1, hidden=12, seed=1))
    technique.fits(student, bench)
    made = technique.apply(student, bench)
    assert not torch.equal(made.module[1].weight, student.module[1].weight)


@pytest.mark.paper(31)
@pytest.mark.parametrize(("outputs", "after"), [(1, ()), (3, ()), (1, (nn.Flatten(0),))], ids=["one", "three", "flat"])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_logit_regression_learns_numbers(
    outputs: int, after: tuple[nn.Module, ...], normalise: bool, own: bool
) -> None:
    task = GAP if own else Regression()
    teacher, student = (net(outputs, *after, hidden=h, task=task, seed=h) for h in (6, 24))
    bench = bench_of(torch.zeros(64, *teacher.module(torch.zeros(1, 8)).shape[1:]), epochs=150)
    x = bench.train.tensors[0]
    taught = LogitRegression(teacher=teacher, normalise=normalise, epochs=150).apply(student, bench)
    told, wanted = taught.module(x).detach(), teacher.module(x).detach()
    assert (told - wanted).square().mean() < 0.05 * wanted.var()
    under = bench.under(LogitRegression(teacher=teacher, normalise=normalise).influence(student, bench)).fit(student)
    assert (under.module(x) - wanted).square().mean() < 0.05 * wanted.var()
