"""A budget end to end on a small network: met or told why not, resumed, loadable points, other tasks than pictures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import karui
from karui.artifact import load
from karui.data import Splits
from karui.deployment import Deployment, as_model
from karui.errors import NeedError, UsageError
from karui.measuring.values import from_json
from karui.model import Classification, CustomTask, Model, Regression
from karui.recipes.budget import race, visits
from karui.recipes.budget.front import Form, Point
from karui.recipes.budget.lesson import NUMBERS, SOFT
from karui.recipes.budget.run import Settings, _seen
from karui.recipes.budget.stages import Plan
from karui.recipes.keeping import quiet
from karui.technique import Bench
from karui.train import SGD, Training


@pytest.fixture(scope="module")
def bench(digits: Splits, training: Training) -> Bench:
    return Bench(train=digits.train, validation=digits.validation, test=digits.test, training=training)


@pytest.fixture(scope="module")
def model(bench: Bench) -> Model:
    """A trained network wide enough for its layers to take most of the time."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(),
        nn.Conv2d(48, 96, 3, padding=1), nn.BatchNorm2d(96), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(96, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 10),
    )  # fmt: skip
    return bench.fit(Model(net.eval(), example=(torch.zeros(2, 1, 8, 8),), task=Classification()), epochs=3)


@pytest.mark.slow
@pytest.mark.usefixtures("steady")
def test_a_budget_of_bytes_is_met(model: Model, bench: Bench, tmp_path: Path):
    """Bytes are the same on every machine; whether a time can be reached hangs on it."""
    done = karui.compress(model, bench, budget="bytes=0.5", max_drop=20, epochs=3, int8=False, out=tmp_path / "light")
    told = done.record["budget"]
    assert done.met, done.explanation
    point = next(p for p in told["points"] if p["number"] == told["point"])
    form = point["forms"][point["best"]]
    assert form["time"] > 0
    assert form["bytes"] <= 0.51
    assert "is met" in done.explanation
    assert (tmp_path / "light" / "model.onnx").stat().st_size <= 0.51 * told["dense_bytes"]
    assert done.record["light"]["counts"]["parameters"] == done.model.parameters < model.parameters
    for point in (from_json(Point, saved) for saved in told["points"]):
        assert point.fp32.score is not None
        again = load(tmp_path / "light" / point.folder, base=model)
        assert bench.evaluate(again).value == pytest.approx(point.fp32.score["value"])
        file = tmp_path / "light" / point.folder / "model.onnx"
        assert file.stat().st_size / told["dense_bytes"] == pytest.approx(point.form.bytes)
        form = Deployment(name="", engine="onnxruntime", precision="fp32", data=file.read_bytes())
        assert point.form.score is not None
        assert bench.evaluate(as_model(form, again)).value == pytest.approx(point.form.score["value"])
    assert set(told["front"]) <= {p["number"] for p in told["points"]}


class Stubborn(nn.Module):
    """Most of its time goes where no technique can act."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Conv2d(1, 16, 3, padding=1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        fixed = nn.functional.interpolate(x, scale_factor=32.0).tanh().mean((1, 2, 3))
        return self.head(torch.relu(self.layer(x)).mean((2, 3))) + fixed[:, None]


@pytest.mark.slow
def test_an_impossible_budget_says_what_is_in_the_way(bench: Bench, tmp_path: Path):
    torch.manual_seed(0)
    model = Model(Stubborn().eval(), example=(torch.zeros(2, 1, 8, 8),), task=Classification())
    done = karui.compress(model, bench, budget={"time": 0.3}, epochs=0, out=tmp_path / "light", int8=False)
    assert not done.met
    assert "The budget is not met" in done.explanation
    assert "Most of the time that is left lies in" in done.explanation
    assert "What stops it is the menu" in done.explanation
    assert (tmp_path / "light" / "model.onnx").is_file()
    assert done.record["budget"]["forms"][0]["ratio"]["value"] > 0.5


@pytest.mark.slow
def test_a_floor_that_breaks_is_found_by_bisection(model: Model, bench: Bench):
    done = karui.compress(model, bench, budget="time=0.3", max_drop=1.0, epochs=0, int8=False)
    told = done.record["budget"]
    points = [from_json(Point, saved) for saved in told["points"]]
    best = next(p for p in points if p.number == told["point"])
    assert best.form.lost <= 1.0
    assert any(p.form.lost > 1.0 for p in points), "the floor was never tried"
    if not done.met:
        assert "What stops it is the floor" in done.explanation


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_result(
    model: Model, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: dict[str, Any] = {"budget": "bytes=0.45", "epochs": 2, "int8": False}
    whole = karui.compress(model, bench, out=tmp_path / "whole", **asked)
    recover, calls = visits.recover, []

    def dying(*args: Any) -> Model:
        calls.append(args)
        if len(calls) == 2:
            raise Killed
        return recover(*args)

    monkeypatch.setattr(visits, "recover", dying)
    with pytest.raises(Killed):
        karui.compress(model, bench, out=tmp_path / "cut", **asked)
    calls.clear()
    monkeypatch.setattr(visits, "recover", lambda *given: calls.append(given) or recover(*given))
    cut = karui.compress(model, bench, out=tmp_path / "cut", resume=True, **asked)
    trained = [p for p in cut.record["budget"]["points"] if p["number"]]
    assert len(calls) == len(trained) - 1, "a finished stage was repeated"
    for folder in (point["folder"] for point in whole.record["budget"]["points"]):
        # As the search measured them: the result is timed anew at the end of each run.
        kept = [json.loads((tmp_path / name / folder / "point.json").read_text()) for name in ("whole", "cut")]
        assert kept[0]["point"] == kept[1]["point"]
    one, two = whole.model.module.state_dict(), cut.model.module.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in two)
    calls.clear()
    again = karui.compress(model, bench, out=tmp_path / "cut", resume=True, **asked)
    assert again.record == cut.record
    assert calls == []


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.one, self.two = nn.Linear(256, 3), nn.Linear(256, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk(x)
        return self.one(x), self.two(x)


class Tagger(nn.Module):
    """A class for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 64)
        self.mix = nn.Linear(64, 256)
        self.head = nn.Linear(256, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.mix(self.embed(tokens)))).transpose(1, 2)


def two_loss(outputs: Any, targets: Tensor) -> Tensor:
    return (outputs[0] - targets[:, :3]).square().mean() + (outputs[1] - targets[:, 3:]).square().mean()


def two_scores(outputs: Any, targets: Tensor) -> Tensor:
    return (torch.cat(list(outputs), 1) - targets).square().mean(1)


def numbers(width: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 32, generator=draw)
    return TensorDataset(x, torch.sin(x @ torch.randn(32, width, generator=draw)))


def sentences() -> TensorDataset:
    tokens = torch.randint(20, (400, 6), generator=torch.Generator().manual_seed(0))
    return TensorDataset(tokens, tokens % 4)


CASES = {
    "several outputs": (
        TwoOutputs,
        CustomTask(loss=two_loss, scores=two_scores, metric="error", higher_is_better=False),
        lambda: numbers(5),
    ),
    "regression": (
        lambda: nn.Sequential(nn.Linear(32, 512), nn.ReLU(), nn.Linear(512, 3)),
        Regression(),
        lambda: numbers(3),
    ),
    "token classification": (Tagger, Classification(), sentences),
}


@pytest.mark.slow
@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("name", CASES)
def test_other_tasks_than_pictures(name: str, training: Training):
    make, task, data = CASES[name]
    torch.manual_seed(0)
    rows = data()
    train, test = (TensorDataset(*(t[part] for t in rows.tensors)) for part in (slice(0, 320), slice(320, None)))
    bench = Bench(train=train, test=test, training=dataclasses.replace(training, optimizer=SGD(lr=0.02)))
    dense = bench.fit(Model(make().eval(), example=(rows.tensors[0][:2],), task=task), epochs=4)
    done = karui.compress(dense, bench, budget="bytes=0.5", max_drop=50, epochs=3, int8=False)
    told = done.record["budget"]
    assert min(p["forms"][0]["bytes"] for p in told["points"]) <= 0.51, done.explanation
    taught = {"several outputs": None, "regression": NUMBERS, "token classification": SOFT}
    assert told["teacher"] == taught[name]
    point = next(p for p in told["points"] if p["number"] == told["point"])
    assert point["forms"][point["best"]]["score"]["higher_is_better"] is task.higher_is_better
    assert done.model.parameters < dense.parameters


class OwnLinear(nn.Linear):
    """A layer of the user's, inside of a part that may be left out."""


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(OwnLinear(96, 96), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


@pytest.mark.usefixtures("steady")
def test_parts_with_layers_of_the_users_own_can_be_left_out(bench: Bench):
    """They are not timed at other widths; that they stay as they are is a setting all the same."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), Residual(), nn.Linear(96, 10))
    model = Model(net.eval(), example=(torch.zeros(2, 1, 8, 8),), task=Classification())
    done = karui.compress(model, bench, budget="bytes=0.5", epochs=0, int8=False)
    assert done.met, done.explanation


@pytest.mark.usefixtures("steady")
def test_an_absolute_budget_that_the_dense_model_keeps_is_met(bench: Bench):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    model = Model(net.eval(), example=(torch.zeros(2, 1, 8, 8),), task=Classification())
    assert karui.compress(model, bench, budget="bytes=1MB", epochs=0).met


@pytest.mark.usefixtures("steady")
def test_what_a_process_left_that_was_killed_as_it_wrote_is_taken_away(bench: Bench, tmp_path: Path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    model = Model(net.eval(), example=(torch.zeros(2, 1, 8, 8),), task=Classification())
    (tmp_path / "points").mkdir()
    (tmp_path / ".run.json.99999.tmp").touch()
    done = karui.compress(model, bench, budget="bytes=1MB", epochs=0, out=tmp_path, resume=True)
    assert done.met
    assert not list(tmp_path.glob(".*"))


def test_a_result_that_the_last_race_takes_back_gives_way_to_one_that_it_confirms(monkeypatch: pytest.MonkeyPatch):
    def point(number: int, time: float, lost: float) -> Point:
        return Point(number=number, forms=(Form(name="", told="", time=time, bytes=1.0, lost=lost),))

    points = [point(0, 1.0, 0.0), point(1, 0.6, 1.0), point(2, 0.55, 2.0), point(3, 0.5, 2.5), point(4, 0.4, 9.0)]
    plan = Plan(goal={"time": 0.6}, stated=True, max_drop=3.0, epochs=1)
    raced = []

    def racing(times: dict[int, float]) -> Any:
        def timed(_: Any, p: Point) -> race.Raced:
            raced.append(p.number)
            return race.Raced(
                dataclasses.replace(p, forms=(dataclasses.replace(p.form, time=times[p.number]),)), [], {}
            )

        return timed

    visitor: Any = SimpleNamespace(points=points, tell=quiet)
    for times, result, tried in (
        ({1: 0.6}, 1, [1]),
        ({1: 0.64, 2: 0.56}, 2, [1, 2]),
        ({1: 0.64, 2: 0.62, 3: 0.63}, 1, [1, 2, 3]),
    ):
        raced.clear()
        monkeypatch.setattr(race, "_race", racing(times))
        assert race.confirmed(visitor, points[1], plan).point.number == result
        assert raced == tried


@pytest.mark.slow
def test_without_budget_and_floor_the_knee_is_taken(model: Model, bench: Bench):
    done = karui.compress(model, bench, epochs=2, int8=False)
    told = done.record["budget"]
    assert "knee of the front" in done.explanation
    assert not told["stated"]
    assert len(told["points"]) >= 2


@pytest.mark.slow
@pytest.mark.usefixtures("steady")
def test_nothing_to_cut_says_so_and_offers_int8_and_factorisation(training: Training):
    """One linear layer between input and output: no unit is free, and ranks are. A fifth is less than 8 bits leave."""
    torch.manual_seed(0)
    x = torch.randn(200, 512, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(512, 1024).eval()
    dense = Model(layer, example=(x[:2],), task=Regression())
    with torch.no_grad():
        layer.weight.copy_(torch.randn(1024, 4) @ torch.randn(4, 512))
        rows = TensorDataset(x, dense.module(x))
    bench = Bench(train=rows, test=rows, training=training)
    done = karui.compress(dense, bench, budget="bytes=0.2", epochs=0)
    assert done.met, done.explanation
    precisions = {form["told"] for form in done.record["budget"]["points"][0]["forms"]}
    assert {"fp32 in onnxruntime", "int8 in onnxruntime"} <= precisions
    assert any("no units" in note for note in done.record["budget"]["notes"])
    assert "FactoredLinear" in type(done.model.module).__name__


class Knowing(nn.Module):
    """Right on whatever has a one in front, wrong on all else."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([1 - x[:, 0], x[:, 0]], 1)


def test_a_model_that_has_seen_the_validation_data_is_told():
    known, other = (TensorDataset(torch.full((50, 4), x), torch.ones(50, dtype=torch.long)) for x in (1.0, 0.0))
    dense = Model(Knowing(), example=(torch.zeros(1, 4),), task=Classification())

    def told(bench: Bench) -> str:
        form = Form(name="", told="", time=1, bytes=1, score=bench.evaluate(dense).to_json())
        return _seen(Point(number=0, forms=(form,)), dense, bench)

    assert "trained on the former" in told(Bench(train=known, validation=known, test=other))
    assert told(Bench(train=known, validation=known, test=known)) == ""


@pytest.mark.parametrize("precision", [torch.float64, torch.float16, torch.bfloat16])
def test_another_precision_than_float32_is_refused_before_any_work(
    model: Model, bench: Bench, tmp_path: Path, precision: torch.dtype
):
    other = dataclasses.replace(model, module=model.copy().module.to(precision))
    name = str(precision).removeprefix("torch.")
    with pytest.raises(UsageError, match=f"weights are {name}, and a budget is measured") as refused:
        karui.compress(other, bench, budget="time=0.5", out=tmp_path / "light")
    assert "model.float()" in refused.value.hint
    assert not (tmp_path / "light").exists()


def test_what_is_lacking_is_refused_before_any_work(model: Model, tmp_path: Path):
    with pytest.raises(NeedError, match="needs data to calibrate on"):
        karui.compress(model, Bench(), budget="time=0.5", out=tmp_path / "light")
    assert not (tmp_path / "light").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 2, "minutes": 3.0}, "both given"),
        ({"minutes": 0.0}, "above 0"),
        ({"batch": 0}, "--batch is 0"),
        ({"threads": 0}, "--threads is 0"),
        ({"epochs": -1}, "--epochs is -1"),
    ],
)
def test_impossible_settings(given: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        Settings(**given)
