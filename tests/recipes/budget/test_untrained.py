"""Points that no training makes better: what is returned is the network settled, and nothing twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from karui.errors import NeedError, TrainingError
from karui.model import CustomTask, Model, Note, Regression
from karui.recipes.budget import visits
from karui.recipes.budget.deployments import ALL
from karui.recipes.budget.recover import settled
from karui.recipes.budget.timing import Stopwatch
from karui.recipes.keeping import quiet
from karui.technique import Bench
from karui.train import SGD, Training


def visitor_of(dense: Model, bench: Bench, out: Path) -> visits.Visitor:
    return visits.Visitor(
        dense=dense, bench=bench, out=out, watch=Stopwatch(), mark="", int8=False, max_drop=None,
        wanted=("bytes",), find_rate=False, tell=quiet,
    )  # fmt: skip


def like(dense: Model) -> TensorDataset:
    """Data whose targets are what the dense network says."""
    x = 3 + torch.randn(192, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return TensorDataset(x, dense.module(x))


def test_a_training_is_held_against_the_settled_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Worse than settled, if better than before, is worse: without an epoch the result would be the settled one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32, momentum=1.0), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        net(3 + torch.randn(192, 16))
    dense = Model(net.eval(), example=(torch.zeros(2, 16),), task=Regression())
    bench = Bench(train=like(dense), validation=like(dense))
    off, between = dense.copy(), dense.copy()
    off.module[1].running_mean += 1
    between.module[1].running_mean += 0.5
    visitor = visitor_of(dense, bench, tmp_path)
    fresh = bench.evaluate(settled(off, dense, bench)).value
    assert fresh < bench.evaluate(between).value < bench.evaluate(off).value
    monkeypatch.setattr(visits, "recover", lambda *_: between)
    kept, epochs = visitor._recovered(off, 3)
    assert epochs == 0
    assert bench.evaluate(kept).value == fresh
    assert isinstance(kept.lineage[-1], Note)
    assert "training made it worse" in visitor.notes[-1]


@pytest.mark.usefixtures("steady", "short_menu")
def test_a_choice_that_comes_again_without_epochs_is_no_other_point(tmp_path: Path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 4)).eval()
    dense = Model(net, example=(torch.zeros(2, 16),), task=Regression())
    data = like(dense)
    training = Training(epochs=1, batch_size=32, optimizer=SGD(lr=0.05))
    visitor = visitor_of(dense, Bench(train=data, validation=data, training=training), tmp_path / "light")
    start = visitor.start()
    first, again = (visitor.lighten(start, {"bytes": 0.7}, 0) for _ in range(2))
    assert first is not None
    assert again is None
    assert [point.number for point in visitor.points] == [0, 1]
    third = visitor.lighten(start, {"bytes": 0.7}, 1)
    assert third is not None
    assert (third.number, third.parent, third.epochs) == (3, 1, 1)


def test_a_training_that_diverges_ends_no_run(tmp_path: Path):
    torch.manual_seed(0)
    dense = Model(nn.Linear(16, 4).eval(), example=(torch.zeros(2, 16),), task=Regression())
    data = like(dense)
    training = Training(epochs=1, batch_size=32, optimizer=SGD(lr=1e30))
    for bench in (Bench(train=data, validation=data, training=training), Bench(train=data, training=training)):
        visitor = visitor_of(dense, bench, tmp_path)
        light = Model(nn.Linear(16, 4).eval(), example=dense.example, task=Regression())
        kept, epochs = visitor._recovered(light, 3)
        assert epochs == 0
        assert torch.equal(kept.module.weight, light.module.weight)
        assert "training diverged" in visitor.notes[-1]


def test_a_damaged_checkpoint_is_told_and_trained_on_from_by_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Left untrained, the point would be kept so, and a killed run end elsewhere than one that was not."""

    def damaged(*_: object) -> Model:
        raise TrainingError("The checkpoint cannot be read.", "Remove it to train from the beginning.")

    dense = Model(nn.Linear(16, 4).eval(), example=(torch.zeros(2, 16),), task=Regression())
    data = like(dense)
    monkeypatch.setattr(visits, "recover", damaged)
    with pytest.raises(TrainingError, match="Remove it"):
        visitor_of(dense, Bench(train=data, validation=data), tmp_path)._recovered(dense, 3)


def test_a_dense_model_without_a_finite_score_is_refused(tmp_path: Path):
    dense = Model(nn.Linear(16, 4).eval(), example=(torch.zeros(2, 16),), task=overflowing())
    data = TensorDataset(1e3 * torch.ones(8, 16), torch.zeros(8, 4))
    with pytest.raises(NeedError, match="validation data is not finite"):
        visitor_of(dense, Bench(train=data, validation=data), tmp_path).start()


def overflowing() -> CustomTask:
    """A perplexity, which overflows at 89 nats."""
    return CustomTask(
        loss=lambda outputs, targets: (outputs - targets).square().mean(),
        scores=lambda outputs, targets: (outputs - targets).square().mean(1).exp(),
        metric="perplexity",
        higher_is_better=False,
    )


@pytest.mark.usefixtures("steady", "short_menu")
def test_a_point_whose_metric_overflows_is_one_that_lost_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 4)).eval()
    dense = Model(net, example=(torch.zeros(2, 16),), task=overflowing())
    data = like(dense)
    visitor = visitor_of(dense, Bench(train=data, validation=data), tmp_path / "light")
    start = visitor.start()
    monkeypatch.setattr(visits, "settled", lambda model, *_: blown_up(model))
    point = visitor.lighten(start, {"bytes": 0.7}, 0)
    assert point is not None
    assert point.form.lost == ALL
    assert point.form.score is not None
    assert point.form.score["value"] is None


def blown_up(model: Model) -> Model:
    light = model.copy()
    with torch.no_grad():
        for parameter in light.module.parameters():
            parameter.mul_(1e3)
    return light
