"""What the record says of a result: whether it is met, what it was measured at, where its time goes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import karui
from karui.errors import NeedError
from karui.measuring import LayerTimes
from karui.measuring.layers import LayerTime
from karui.model import Model, Regression
from karui.recipes import layers
from karui.recipes.budget import race
from karui.recipes.budget.cache import Measured
from karui.recipes.budget.timing import Stopwatch
from karui.report.plots import time_per_layer
from karui.technique import Bench
from karui.train import SGD, Training


@pytest.fixture
def dense() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 4)).eval()
    return Model(net, example=(torch.zeros(2, 16),), task=Regression())


@pytest.fixture
def bench(dense: Model) -> Bench:
    x = torch.randn(96, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        data = TensorDataset(x, dense.module(x))
    training = Training(epochs=1, batch_size=32, optimizer=SGD(lr=0.05))
    return Bench(train=data, validation=data, test=data, training=training)


def test_without_a_budget_there_must_be_something_to_judge_by(dense: Model, bench: Bench):
    """All points would lose nothing, and the lightest of them be the best compromise."""
    with pytest.raises(NeedError, match="neither a budget nor a floor, and nothing to judge") as refused:
        karui.compress(Model(dense.module, example=dense.example), bench, epochs=0, int8=False)
    assert "State a budget" in str(refused.value)


@pytest.mark.usefixtures("steady")
def test_a_point_has_one_time_wherever_it_is_told(
    dense: Model, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """That of the last race; the record on disk keeps the one that the search went by, as a resumed run does."""
    timed = race._timed
    monkeypatch.setattr(race, "_timed", lambda form, ratio: replace(timed(form, ratio), time=0.37, error=0.0))
    out = tmp_path / "light"
    asked: dict[str, Any] = {"budget": "bytes=0.7", "epochs": 0, "int8": False, "out": out}
    done = karui.compress(dense, bench, **asked)
    told = done.record["budget"]
    points = {point["number"]: point for point in told["points"]}
    result = points[told["point"]]
    assert told["point"] > 0
    assert result["forms"][result["best"]]["time"] == 0.37
    assert "time 0.37" in done.explanation
    steps = [step["technique"] for step in done.record["steps"]]
    assert [f"point {told['point']}," in step for step in steps] == ["time 0.37" in step for step in steps]
    kept = json.loads((out / result["folder"] / "point.json").read_text())["point"]
    assert kept["forms"][0]["time"] != 0.37
    assert karui.compress(dense, bench, resume=True, **asked).record == done.record
    (out / "run.json").unlink()  # as if it had been killed after the race, whose times are kept
    monkeypatch.setattr(Stopwatch, "side_by_side", None)
    again = karui.compress(dense, bench, resume=True, **asked).record["budget"]
    assert again == told


@pytest.mark.usefixtures("steady")
def test_a_floor_that_holds_is_met_where_no_budget_was_stated(
    dense: Model, bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    """How far the search was to go is its own affair. Files take a time by their length: of so small a network the
    engine's own time is nearly all, and the way would try four choices for each of its aims."""
    monkeypatch.setattr(Stopwatch, "ratio", lambda *given: Measured(len(given[2].data) / len(given[3].data)))
    done = karui.compress(dense, bench, max_drop=0.001, epochs=0, int8=False)
    told = done.record["budget"]
    assert "No budget was stated" in done.explanation
    assert done.met
    assert (told["stated"], told["goal"]) == (False, {})


@pytest.mark.usefixtures("steady")
def test_the_times_of_layers_are_those_of_the_engine_that_the_budget_is_about(dense: Model, bench: Bench):
    """The activation is melted into the layer before it."""
    done = karui.compress(dense, bench, budget="bytes=1MB", batch=7, epochs=0, int8=False)
    told = done.record["layers"]
    assert (told["engine"], told["batch"], told["threads"]) == ("onnxruntime", 7, 1)
    for which in ("dense", "light"):
        rows = {row["path"]: row for row in told[which]}
        assert [rows[path]["bytes"] for path in ("0", "2")] == [4 * 17 * 96, 4 * 97 * 4]
        assert min(rows[path]["seconds"] for path in ("0", "2")) > 0
        assert "1" not in rows
    plot = time_per_layer(told)
    assert plot is not None
    assert "Median of one call at batch 7 in onnxruntime on 1 thread" in plot.caption
    old = time_per_layer({which: told[which] for which in ("dense", "light")})
    assert old is not None
    assert "at batch 1 in torch, layer by layer" in old.caption, "as of a recipe"


def test_what_the_engine_spends_on_no_layer_has_a_row(monkeypatch: pytest.MonkeyPatch, dense: Model):
    rows = (LayerTime(path="", kind="Sequential", seconds=2.0), LayerTime(path="0", kind="Linear", seconds=3.0))
    times = LayerTimes(engine="onnxruntime", batch=1, threads=1, layers=rows, rest=1.0)
    monkeypatch.setattr(layers, "layer_times", lambda *_, **__: times)
    found = [(row["path"], row["seconds"], row["bytes"]) for row in layers.engine_rows(dense, 1, 1)]
    assert found == [("(between layers)", 2.0, 0), ("0", 3.0, 6528), ("2", 0.0, 1552), ("(the engine)", 1.0, 0)]
