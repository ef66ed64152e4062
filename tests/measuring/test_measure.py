import json
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from karui.measuring import (
    Change,
    Clock,
    Comparison,
    Measurement,
    OnnxRuntime,
    Timing,
    Torch,
    compare,
    measure_model,
)
from karui.measuring.measure import tensor_bytes
from karui.model import Classification, Model

CLOCK = Clock(batches=(1, 4), threads=(1,), rounds=5, engines=(OnnxRuntime(), Torch()))


TORCH = Clock(batches=(1,), threads=(1,), rounds=5, engines=(Torch(),))


@cache  # one value for each width, so that it is exported once
def net(width):
    torch.manual_seed(width)
    module = nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 3))
    return Model(module, example=(torch.zeros(1, 20),), task=Classification())


@pytest.fixture(scope="module")
def test_data():
    return TensorDataset(torch.randn(40, 20), torch.randint(3, (40,)))


@pytest.fixture(scope="module")
def comparison(test_data):
    return compare(net(400), net(40), test=test_data, clock=CLOCK)


def test_a_measurement_has_every_quantity(test_data):
    measured = measure_model(net(40), test=test_data, clock=CLOCK)
    assert measured.parameters == 20 * 40 + 40 + 40 * 3 + 3
    assert measured.macs == 20 * 40 + 40 * 3
    assert measured.tensor_bytes == 4 * measured.parameters
    assert measured.onnx_bytes > measured.tensor_bytes
    assert measured.score.count == 40
    assert {(t.engine, t.batch) for t in measured.times} == {(e, b) for e in ("onnxruntime", "torch") for b in (1, 4)}
    assert {(m.engine, m.batch) for m in measured.memory} == {(e, b) for e in ("onnxruntime", "torch") for b in (1, 4)}
    assert measured.machine.threads >= 1
    assert measured.machine.versions["torch"] == torch.__version__
    assert measured.time("torch", 4).batch == 4
    assert measured.time("torch", 5) is None


def test_ratios_are_dense_over_light(comparison):
    dense, light = comparison.dense, comparison.light
    assert comparison.ratio("parameters").value == pytest.approx(dense.parameters / light.parameters)
    assert comparison.ratio("macs").value == 10
    assert comparison.ratio("bytes of the ONNX file").value > 5
    assert comparison.ratio("time", "torch", 4, 1) is not None
    assert light.ratios == comparison.ratios
    assert dense.ratios == ()


def test_beside_the_dense_model_the_light_measurement_carries_the_ratios(test_data):
    measured = measure_model(
        net(40), test=test_data, clock=TORCH, against=net(400), stored=lambda model: 7 * model.parameters
    )
    ratios = {ratio.quantity: ratio.value for ratio in measured.ratios}
    assert (ratios["macs"], ratios["bytes as saved"]) == (10, ratios["parameters"])
    assert measured.stored_bytes == 7 * measured.parameters


def test_json_round_trip(comparison):
    saved = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert Comparison.from_json(saved) == comparison
    assert Measurement.from_json(saved["light"]) == comparison.light


def test_the_text_never_prints_a_time_ratio_without_its_spread(comparison):
    lines = [line for line in str(comparison).splitlines() if line.startswith("time")]
    assert lines
    assert all("95 % interval" in line for line in lines)
    assert all("[" in line for line in str(comparison.light).splitlines() if line.startswith("time"))


def test_the_change_of_the_metric_is_paired(test_data):
    same = compare(net(40), net(40), test=test_data, clock=TORCH).change
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert "no measurable difference" in same.verdict


def test_verdict_of_a_change():
    worse = Change(value=-0.02, low=-0.03, high=-0.01, metric="accuracy")
    assert worse.verdict == "-2.00 (95 % interval -3.00 to -1.00) accuracy points, worse"
    better = Change(value=-2, low=-3, high=-1, metric="squared error", higher_is_better=False)
    assert better.verdict == "-2.00 (95 % interval -3.00 to -1.00) squared error, better"


def test_what_cannot_be_measured_is_told():
    class Branching(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x - 1

    measured = measure_model(Model(Branching(), example=(torch.ones(1, 3),)), clock=CLOCK)
    assert measured.onnx_bytes is None
    assert measured.score is None
    assert {t.engine for t in measured.times} == {"torch"}
    assert any("cannot be exported to ONNX" in note for note in measured.notes)
    assert all("\n" not in note for note in measured.notes)


def test_one_race_tells_the_time(monkeypatch: pytest.MonkeyPatch):
    """Where another race has timed both in an engine, that engine is not asked again: of two clocks one contradicts."""

    def timing(*samples: float) -> Timing:
        return Timing(
            contestant="fp32, onnxruntime", engine="onnxruntime", threads=1, batch=1, median=samples[1], low=samples[0],
            high=samples[2], samples=samples,
        )  # fmt: skip

    def refuse(*_: object) -> None:
        raise AssertionError("a session was made")

    monkeypatch.setattr(OnnxRuntime, "prepare", refuse)
    clock = Clock(batches=(1,), threads=(1,), engines=(OnnxRuntime(), Torch()), rounds=5)
    raced = timing(2.98, 3.0, 3.02), timing(1.49, 1.5, 1.51)
    both = compare(net(400), net(40), clock=clock, raced=raced)
    for measured, name, median in ((both.dense, "dense", 3.0), (both.light, "light", 1.5)):
        assert [(t.contestant, t.engine) for t in measured.times] == [(name, "onnxruntime"), (name, "torch")]
        assert measured.times[0].median == median
        assert {m.engine for m in measured.memory} == {"onnxruntime", "torch"}
    times = [ratio for ratio in both.ratios if ratio.quantity == "time" and ratio.engine == "onnxruntime"]
    assert [round(ratio.value, 6) for ratio in times] == [2.0]


def test_parts_of_one_storage_count_each_and_shared_ones_once():
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.randn(30, 10)
            self.one, self.two = nn.Parameter(whole[:10]), nn.Parameter(whole[10:])
            self.again = self.two

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.one.T

    assert tensor_bytes(Model(Parts(), example=(torch.zeros(2, 10),))) == 1200
