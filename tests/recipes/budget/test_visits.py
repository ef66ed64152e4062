"""Visits: what is chosen, trained and kept of a point, and when it is not done again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import karui
from karui.artifact import load
from karui.model import CustomTask, Model, Regression
from karui.recipes.budget import visits
from karui.recipes.budget.timing import Stopwatch
from karui.recipes.keeping import quiet
from karui.technique import Bench
from karui.train import Training


@pytest.mark.usefixtures("steady")
def test_a_training_that_makes_it_worse_is_not_kept(training: Training):
    """The targets to train on are noise; those to judge by are what the dense network says, which does not teach."""
    torch.manual_seed(0)
    dense = Model(
        nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 4)).eval(),
        example=(torch.zeros(2, 16),),
        task=CustomTask(loss=Regression().loss, scores=Regression().scores, higher_is_better=False),
    )
    x = torch.randn(192, 16)
    with torch.no_grad():
        judged = TensorDataset(x, dense.module(x))
    noise = TensorDataset(x, 9 * torch.randn(192, 4))
    bench = Bench(train=noise, validation=judged, test=judged, training=training)
    lines: list[str] = []
    done = karui.compress(dense, bench, budget="bytes=0.7", epochs=3, int8=False, tell=lines.append)
    assert any("training made it worse on validation data" in line for line in lines)
    assert any(line.startswith("note: recovery has no teacher, as targets of the task CustomTask") for line in lines)
    assert any("no teacher" in note for note in done.record["budget"]["notes"])
    assert done.record["budget"]["teacher"] is None
    assert any("training made it worse" in note for note in done.record["budget"]["notes"])
    worse = {note.split(":")[0] for note in done.record["budget"]["notes"] if "training made it worse" in note}
    points = {f"point {p['number']}": p for p in done.record["budget"]["points"]}
    # What is not kept does not count as training that the network has had.
    assert all(points[name]["epochs"] == points[f"point {points[name]['parent']}"]["epochs"] for name in worse)
    assert done.met
    assert bench.evaluate(done.model).value < 1


@pytest.mark.usefixtures("steady")
def test_a_choice_that_comes_again_is_trained_on(tmp_path: Path, training: Training):
    """As where the clock took a point for heavier than it is: its training is not done a second time."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 4)).eval()
    dense = Model(net, example=(torch.zeros(2, 16),), task=Regression())
    x = torch.randn(192, 16)
    with torch.no_grad():
        data = TensorDataset(x, dense.module(x))
    bench = Bench(train=data, validation=data, test=data, training=training)
    lines: list[str] = []
    visitor = visits.Visitor(
        dense=dense, bench=bench, out=tmp_path, watch=Stopwatch(), mark="", int8=False, max_drop=None,
        wanted=("bytes",), find_rate=False, tell=lines.append,
    )  # fmt: skip
    start = visitor.start()
    first, again = (visitor.lighten(start, {"bytes": share}, 2) for share in (0.7, 0.7))
    assert first is not None
    assert again is not None
    assert first.chosen
    assert (first.parent, again.parent, again.epochs, again.chosen) == (0, 1, 4, {})
    assert any("that is point 1 once more" in line for line in lines)
    third = visitor.lighten(start, {"bytes": 0.7}, 2)
    assert third is not None
    assert (third.parent, third.epochs) == (2, 6)
    other = visitor.lighten(start, {"bytes": 0.4}, 2)
    assert other is not None
    assert (other.parent, other.epochs) == (0, 2)


@pytest.mark.usefixtures("steady")
def test_how_far_a_menu_goes_is_kept_with_whose_it_is(tmp_path: Path, training: Training):
    """Also where a run goes on from what it kept: what is said of it in the end is the same."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 4)).eval()
    dense = Model(net, example=(torch.zeros(2, 16),), task=Regression())
    data = TensorDataset(torch.randn(64, 16), torch.zeros(64, 4))
    found = []
    for _ in range(2):
        visitor = visits.Visitor(
            dense=dense, bench=Bench(train=data, validation=data, test=data, training=training), out=tmp_path,
            watch=Stopwatch(), mark="", int8=False, max_drop=None, wanted=("bytes",), find_rate=False, tell=quiet,
        )  # fmt: skip
        start = visitor.start()
        assert visitor.lighten(start, {"bytes": 0.7}, 0) is not None
        assert visitor.reach == []
        visitor.lighten(start, {"bytes": 0.01}, 0)
        found.append(visitor.reach)
    (reach,) = found[0]
    assert (reach.parent, reach.target) == (0, {"bytes": 0.01})
    assert 0.01 < reach.shares["bytes"] < 0.7
    assert found[0] == found[1]


@pytest.mark.usefixtures("steady")
def test_the_dense_model_is_a_point_like_others_in_its_best_form(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch
):
    """Its file follows the form that counts, also where the budget makes that another one; killed and resumed, too."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4)).eval()
    dense = Model(net, example=(torch.zeros(2, 64),), task=Regression())
    x = torch.randn(192, 64)
    with torch.no_grad():
        data = TensorDataset(x, dense.module(x))
    bench = Bench(train=data, validation=data, test=data, training=training)

    def visiting() -> visits.Visitor:
        return visits.Visitor(
            dense=dense, bench=bench, out=tmp_path, watch=Stopwatch(), mark="", int8=True, max_drop=100,
            wanted=("time",), find_rate=False, tell=lambda _: None,
        )  # fmt: skip

    def precision(visitor: visits.Visitor) -> str:
        """Of the file in the folder, which is of the size that the point tells."""
        (point,) = visitor.points
        file = tmp_path / point.folder / "model.onnx"
        assert file.stat().st_size / visitor.bytes == pytest.approx(point.form.bytes)
        assert json.loads((tmp_path / "points/00/model.json").read_text())["deployment"]["name"] == point.form.name
        return point.form.told

    picks = {"then": "fp32 in onnxruntime"}

    def best(_: Any, forms: Any) -> int:
        return next(k for k, form in enumerate(forms) if form.told == picks["then"])

    monkeypatch.setattr(visits.Forms, "best", best)
    visitor = visiting()
    start = visitor.start()
    assert start.folder == "points/00"
    assert precision(visitor) == "fp32 in onnxruntime"
    assert visitor.model_of(start) is dense
    again = load(tmp_path / start.folder, base=dense)
    assert torch.equal(again.module(x), dense.module(x))
    picks["then"] = "int8 in onnxruntime"
    heeded = visitor.heed({"bytes": 0.5})
    assert precision(visitor) == "int8 in onnxruntime"
    assert visitor.model_of(heeded) is dense
    monkeypatch.setattr(visits, "save", None)  # nothing is made again
    resumed = visiting()
    assert resumed.start() == heeded
    assert resumed.heed({"bytes": 0.5}) == heeded
    assert precision(resumed) == "int8 in onnxruntime"
