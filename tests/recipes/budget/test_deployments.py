"""The form of a point: faster by measurement, within the floor, and made anew as it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from karui.deployment import Deployment
from karui.errors import UsageError
from karui.measuring import Score, onnx_form
from karui.measuring.engines import OnnxRuntime, OpenVino
from karui.model import Classification, Model
from karui.recipes.budget import deployments
from karui.recipes.budget.cache import Measured, TimingCache
from karui.recipes.budget.deployments import ALL, Forms, lost
from karui.recipes.budget.front import Form, Point
from karui.recipes.budget.timing import Stopwatch
from karui.technique import Bench


def form(name: str, time: float, size: float, lost: float = 0.0) -> Form:
    return Form(name=name, told=name, time=time, bytes=size, lost=lost)


PLAIN = form("fp32", 1.0, 1.0)


@pytest.fixture
def dense() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    return Model(net.eval(), example=(torch.zeros(1, 3, 8, 8),), task=Classification())


@pytest.fixture
def bench(dense: Model) -> Bench:
    x = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows = TensorDataset(x, dense.module(x).argmax(1))
    return Bench(train=rows, validation=rows, test=rows)


def forms(dense: Model, bench: Bench, cache: Path, **given: Any) -> Forms:
    watch = Stopwatch(cache=TimingCache.of_this_machine(cache))
    return Forms(dense=dense, bench=bench, watch=watch, **given)


@pytest.mark.parametrize(
    ("others", "given", "best"),
    [
        ([form("int8", 0.6, 0.3)], {}, 1),
        ([form("int8", 1.1, 0.3)], {}, 0),  # slower
        ([form("int8", 0.995, 0.3)], {}, 0),  # no faster than the clock can tell
        ([form("int8", 0.6, 0.3)], {"wanted": ("bytes",)}, 1),
        ([form("int8", 1.01, 0.3)], {"wanted": ("bytes",)}, 1),  # smaller, and no slower that the clock could tell
        ([form("int8", 1.03, 0.3)], {"wanted": ("bytes",)}, 0),  # smaller, and slower
        ([form("int8", 1.01, 0.3)], {"wanted": ("time", "bytes")}, 1),
        ([form("int8", 1.03, 0.3)], {"wanted": ("time", "bytes")}, 0),
        ([form("int8", 1.01, 0.3)], {"wanted": ("time",)}, 0),
        ([form("fp32, openvino", 1.1, 0.9)], {"wanted": ("bytes",)}, 0),
        ([form("int8", 1.1, 0.2), form("int8, openvino", 0.9, 0.3)], {"wanted": ("bytes",)}, 2),
        ([form("int8", 0.6, 0.3, 1.5)], {"max_drop": 1.0}, 0),  # breaks the floor
        ([form("int8", 0.6, 0.3, 0.9)], {"max_drop": 1.0}, 1),
        ([form("int8", 0.6, 0.3, 0.9)], {}, 0),  # costs more than half a point, and no floor allows it
        ([form("int8", 0.6, 0.3), form("int8, openvino", 0.5, 0.3)], {}, 2),
    ],
)
def test_the_best_form(  # noqa: PLR0917
    dense: Model, bench: Bench, cache: Path, others: list[Form], given: dict[str, Any], best: int
):
    assert forms(dense, bench, cache, **given).best([PLAIN, *others]) == best


def test_for_bytes_too_a_form_may_be_no_slower_than_its_own_network(dense: Model, bench: Bench, cache: Path):
    """That it beats the dense one is not enough: cuts may have won that, and it takes some of it back."""
    plain, narrow = form("fp32", 0.5, 0.4), form("int8", 0.7, 0.12)
    for wanted in ("bytes",), ("time", "bytes"), ("time",):
        assert forms(dense, bench, cache, wanted=wanted).best([plain, narrow]) == 0


def test_a_smaller_form_that_was_left_for_its_time_is_told_to_who_asked_for_bytes(
    dense: Model, bench: Bench, cache: Path
):
    found = (form("fp32", 0.5, 0.4), form("int8", 0.7, 0.12), form("int8, openvino", 0.45, 0.13, 9.0))
    point = Point(number=1, forms=found)
    told = "int8 was left, as it is measured slower than fp32: it would weigh 0.12 of the dense model instead of "
    maker = forms(dense, bench, cache, wanted=("bytes",), max_drop=1.0)
    assert maker.passed_over(point) == f"{told}0.40, and takes 1.40 times as long"
    assert not forms(dense, bench, cache, max_drop=1.0).passed_over(point), "who asked for time did not ask for this"
    broken = Point(number=1, forms=(found[0], form("int8", 0.7, 0.12, 9.0)))
    assert not maker.passed_over(broken), "what stops it is the floor"
    assert not maker.passed_over(Point(number=1, forms=(found[0], form("int8", 0.4, 0.12)), best=1))
    assert not maker.passed_over(Point(number=1, forms=found[:1]))


def test_where_32_bits_break_the_floor_too_8_are_not_at_fault(dense: Model, bench: Bench, cache: Path):
    """A point that is looked at on the way may be trained on; what it costs then is what its lightest form costs."""
    maker = forms(dense, bench, cache, max_drop=1.0)
    plain = form("fp32", 1.0, 1.0, 3.0)
    assert maker.best([plain, form("int8", 0.6, 0.3, 3.3)]) == 1
    assert maker.best([plain, form("int8", 0.6, 0.3, 3.6)]) == 0


def test_a_form_that_its_engine_does_not_open_is_left_out_and_told(
    dense: Model, bench: Bench, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """OpenVINO refuses an LSTM whose weights are of 8 bits, for example; ONNX Runtime runs it."""
    pytest.importorskip("openvino")

    def refuse(engine: OpenVino, model: Any, threads: int) -> Any:
        raise UsageError("OpenVINO cannot open the model: node 7 expects a constant", "Time it in OnnxRuntime() only.")

    monkeypatch.setattr(OpenVino, "prepare", refuse)
    maker = forms(dense, bench, cache)
    for _ in range(2):
        found, _ = maker.of(dense, None)
    assert [f.name for f in found] == ["fp32, onnxruntime", "int8, onnxruntime"]
    assert [note for note in maker.notes if "openvino" in note] == [
        "fp32 in openvino was not tried: OpenVINO cannot open the model",
        "int8 in openvino was not tried: OpenVINO cannot open the model",
    ]


def test_forms_are_timed_judged_and_made_anew(dense: Model, bench: Bench, cache: Path):
    maker = forms(dense, bench, cache)
    found, _ = maker.of(dense, None)
    assert found[0].name == "fp32, onnxruntime"
    assert (found[0].time, found[0].bytes, found[0].lost) == (1.0, 1.0, 0.0)
    narrow = next(f for f in found if f.name == "int8, onnxruntime")
    assert narrow.score is not None
    assert narrow.score["value"] > 0.9
    made = maker.made(dense, found)
    assert [d.name for d in made] == [f.name for f in found]
    assert [d.bytes / onnx_form(dense).bytes for d in made] == [f.bytes for f in found]


def test_without_8_bits_there_are_none(dense: Model, bench: Bench, cache: Path):
    found, _ = forms(dense, bench, cache, int8=False).of(dense, None)
    assert {f.name.partition(",")[0] for f in found} == {"fp32"}


def test_layers_that_break_the_floor_stay_in_32_bits(
    dense: Model, bench: Bench, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """Judged as if 8 bits in more than one layer cost five points."""

    def judge(made: Deployment, *given: Any) -> Score:
        del given
        value = 0.99 if len(made.fp32_layers) >= 2 else 0.95
        return Score(value=value, low=0, high=1, count=96, metric="accuracy")

    monkeypatch.setattr(deployments, "score_of", judge)
    monkeypatch.setattr(Stopwatch, "ratio", lambda *given: Measured(1.0 if given[2].data == given[3].data else 0.5))
    maker = forms(dense, bench, cache, max_drop=1.0)
    found, best = maker.of(dense, None)
    assert found[best].name.startswith("int8")
    assert len(found[best].left) == 2
    made = maker.made(dense, found)[best]
    assert set(found[best].left) <= set(made.fp32_layers)
    assert made.bytes / onnx_form(dense).bytes == found[best].bytes


class Whole(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((1, 2, 3))[:, None] * torch.ones(4)


def test_nothing_to_quantise_is_no_form_in_8_bits(bench: Bench, cache: Path):
    model = Model(Whole(), example=(torch.zeros(1, 3, 8, 8),), task=Classification())
    found, best = forms(model, bench, cache).of(model, None)
    assert {f.name.partition(",")[0] for f in found} == {"fp32"}
    assert best == 0


def test_two_processes_on_one_file_of_times_lose_none_and_agree(tmp_path: Path):
    first, second = TimingCache.of_this_machine(tmp_path), TimingCache.of_this_machine(tmp_path)
    first.put({"a": Measured(1.0, 0.1), "both": Measured(2.0)})
    second.put({"b": Measured(3.0), "both": Measured(4.0)})
    expected = {"a": Measured(1.0, 0.1), "b": Measured(3.0), "both": Measured(2.0)}
    assert second.found == expected, "who comes second takes over what is there"
    assert TimingCache.of_this_machine(tmp_path).found == expected
    assert second.file is not None
    second.file.write_text('{"of an earlier version": 1.0, "of this one": [1.0, 0.5]}')
    assert TimingCache.of_this_machine(tmp_path).found == {"of this one": Measured(1.0, 0.5)}
    second.file.write_text("{")
    assert TimingCache.of_this_machine(tmp_path).found == {}


def test_a_network_of_linear_layers_is_tried_in_dynamic_8_bits_too(bench: Bench, cache: Path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 256), nn.ReLU(), nn.Linear(256, 4))
    dense = Model(net.eval(), example=(torch.zeros(1, 3, 8, 8),), task=Classification())
    maker = forms(dense, bench, cache, wanted=("bytes",))
    found, _ = maker.of(dense, None)
    narrow = next(f for f in found if f.name == "dynamic int8, onnxruntime")
    assert narrow.told == "dynamic int8 in onnxruntime"
    assert narrow.bytes < 0.3
    made = maker.made(dense, found)
    assert [d.precision for d in made] == [f.told.partition(" in ")[0] for f in found]
    assert [d.bytes / onnx_form(dense).bytes for d in made] == [f.bytes for f in found]


def test_a_form_within_the_limits_goes_before_a_lighter_one_that_is_not(dense: Model, bench: Bench, cache: Path):
    found = [form("fp32", 0.55, 0.28), form("int8", 0.54, 0.35)]
    for goal, best in ({}, 0), ({"time": 0.6, "bytes": 0.3}, 0), ({"time": 0.545, "bytes": 0.36}, 0):
        assert forms(dense, bench, cache, wanted=("time", "bytes"), goal=goal).best(found) == best
    found = [form("fp32", 0.55, 0.28), form("int8", 0.5, 0.29)]
    assert forms(dense, bench, cache, wanted=("time", "bytes")).best(found) == 1
    assert forms(dense, bench, cache, wanted=("time", "bytes"), goal={"time": 0.6, "bytes": 0.285}).best(found) == 0


class Experts(nn.Module):
    """A product with constants of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(4, 192, 64) * 0.1), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((x.flatten(1)[:, None, None] @ self.weight).relu().mean((1, 2)))


def test_a_form_that_does_not_run_is_left_out_and_told(bench: Bench, cache: Path, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    dense = Model(Experts().eval(), example=(torch.zeros(1, 3, 8, 8),), task=Classification())
    assert forms(dense, bench, cache).of(dense, None)[0][0].name == "fp32, onnxruntime"
    real = OnnxRuntime.prepare

    def fails(engine: OnnxRuntime, model: Any, threads: int) -> Any:
        run = real(engine, model, threads)

        def called(inputs: Any) -> Any:
            if isinstance(model, Deployment) and model.precision != "fp32":
                raise RuntimeError("[ONNXRuntimeError] : zero point is not valid")
            return run(inputs)

        return called

    monkeypatch.setattr(OnnxRuntime, "prepare", fails)
    maker = forms(dense, bench, cache)
    found, _ = maker.of(dense, None)
    assert not [f for f in found if f.name.startswith(("int8, onnx", "dynamic int8, onnx"))]
    assert any("int8 in onnxruntime was not tried: [ONNXRuntimeError]" in note for note in maker.notes)


def test_what_is_not_finite_has_lost_all():
    def score(value: float, up: bool = False) -> Score:
        return Score(value=value, low=value, high=value, count=1, metric="nats", higher_is_better=up)

    assert lost(score(2.0), score(math.inf)) == ALL == lost(score(2.0, up=True), score(math.nan, up=True))
    assert lost(score(math.inf), score(2.0)) == -ALL
    assert lost(score(math.inf), score(math.inf)) == 0.0
