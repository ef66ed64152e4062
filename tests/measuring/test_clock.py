import time

import pytest
import torch
from torch import nn

from karui.errors import SettingError, UsageError
from karui.measuring import Clock, OnnxRuntime, Ratio, Timing, Torch, time_ratio
from karui.measuring import clock as clock_module
from karui.measuring.engines import Engine
from karui.model import Model


class Sleeper(nn.Module):
    """Takes a known time."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return x


def net(width=4):
    return Model(nn.Linear(4, width), example=(torch.zeros(1, 4),))


def quick(**settings):
    return Clock(**{"batches": (1,), "threads": (1,), "engines": (Torch(),), "rounds": 5, **settings})


def timing(name, samples):
    low, median, high = torch.tensor(samples).double().quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    return Timing(
        contestant=name, engine="torch", threads=1, batch=1, median=median, low=low, high=high, samples=tuple(samples)
    )


def test_every_combination_is_timed_for_every_contestant():
    timings = quick(batches=(1, 3), engines=(Torch(), OnnxRuntime())).time({"a": net(), "b": net(8)})
    assert {(t.contestant, t.engine, t.batch) for t in timings.times} == {
        (name, engine, batch) for name in "ab" for engine in ("torch", "onnxruntime") for batch in (1, 3)
    }
    assert all(t.low <= t.median <= t.high and len(t.samples) == 5 for t in timings.times)
    assert timings.notes == ()


def test_a_slower_model_is_found_out_and_called_slower():
    def asleep(seconds):
        return Model(Sleeper(seconds), example=(torch.zeros(1, 4),))

    timings = quick().time({"dense": asleep(0.002), "light": asleep(0.006)})
    ratio = time_ratio(*timings.times)
    assert ratio.high < 1
    assert "slower" in ratio.verdict
    assert "faster" not in ratio.verdict


def test_contestants_take_turns_in_an_order_that_flips():
    calls = []

    class Spy(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            calls.append(self.name)
            time.sleep(0.003)
            return x

    models = {name: Model(Spy(name), example=(torch.zeros(1, 1),)) for name in "ab"}
    quick(rounds=6, warmup=1).time(models)
    turns = [name for number, name in enumerate(calls) if number == 0 or name != calls[number - 1]]
    # warm-up and calibration of a, b; then a b | b a | a b ...: neighbours of a flip merge into one turn
    assert calls.count("a") == calls.count("b")
    assert turns[-6:] in (["b", "a", "b", "a", "b", "a"], ["a", "b", "a", "b", "a", "b"])
    assert "".join(calls).find("bbbb") > 0


def test_threads_beyond_the_machine_are_left_out_with_a_note(monkeypatch):
    monkeypatch.setattr(clock_module, "threads_here", lambda: 1)
    timings = quick(threads=(1, 2, 64)).time({"a": net()})
    assert {t.threads for t in timings.times} == {1}
    assert timings.notes == ("2 threads not measured: the machine has 1", "64 threads not measured: the machine has 1")


class Absent:
    name = "absent"

    def missing(self):
        return "absent is not installed"


def test_an_engine_that_is_not_installed_is_left_out_with_a_note():
    timings = quick(engines=(Absent(), Torch())).time({"a": net()})
    assert {t.engine for t in timings.times} == {"torch"}
    assert timings.notes == ("absent not measured: absent is not installed",)


def test_a_contestant_that_an_engine_cannot_run_is_left_out_with_a_note():
    from karui.measuring import onnx_form

    model = net()
    timings = quick(engines=(Torch(), OnnxRuntime())).time({"net": model, "file": onnx_form(model).data})
    assert {(t.contestant, t.engine) for t in timings.times} == {
        ("net", "torch"), ("net", "onnxruntime"), ("file", "onnxruntime"),
    }  # fmt: skip
    assert timings.notes == (
        "torch not measured for file: The torch engine cannot run an ONNX file. Time it in OnnxRuntime().",
    )


def test_an_engine_that_fails_with_a_class_of_its_own_is_left_out_with_a_note():
    recurrent = Model(torch.nn.LSTM(3, 4).double(), example=(torch.zeros(5, 2, 3).double(),))
    timings = quick(engines=(Torch(), OnnxRuntime())).time({"net": recurrent})
    assert {t.engine for t in timings.times} == {"torch"}
    (note,) = timings.notes  # ONNX Runtime opens the file, and finds only then that it does not know the precision
    assert note.startswith("onnxruntime not measured for net: ")


def test_the_budget_ends_the_rounds_early_but_never_below_five():
    model = Model(Sleeper(0.01), example=(torch.zeros(1, 1),))
    start = time.perf_counter()
    timings = quick(rounds=1000, seconds=0.2).time({"a": model})
    assert time.perf_counter() - start < 5
    assert 5 <= len(timings.times[0].samples) < 100


def test_modes_and_threads_are_as_before():
    model = Model(nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train(), example=(torch.zeros(1, 4),))
    before = torch.get_num_threads()
    quick(threads=(2,)).time({"a": model})
    assert torch.get_num_threads() == before
    assert model.module.training
    assert model.module[1].training


def test_processor_time_leaves_out_sleep():
    model = Model(Sleeper(0.005), example=(torch.zeros(1, 1),))
    assert quick(cpu_time=True).time({"a": model}).times[0].median < 0.004
    assert quick().time({"a": model}).times[0].median >= 0.005


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"batches": ()}, "batches"),
        ({"threads": (0,)}, "threads"),
        ({"rounds": 1}, "rounds"),
        ({"warmup": 0}, "warmup"),
        ({"seconds": 0}, "seconds"),
    ],
)
def test_wrong_settings(settings, word):
    with pytest.raises(SettingError, match=word):
        Clock(**settings)


def test_nothing_to_time():
    with pytest.raises(UsageError, match="no model"):
        quick().time({})


def test_equal_models_are_never_told_apart():
    noise = torch.Generator().manual_seed(0)
    told = 0
    for _ in range(100):
        a, b = (timing(name, (torch.rand(15, generator=noise) * 0.2 + 1).tolist()) for name in "ab")
        told += "no measurable difference" not in time_ratio(a, b).verdict
    assert told <= 12  # 5 are expected; the bootstrap of a median of 15 is a little too sure of itself


def test_a_ratio_is_of_medians_and_carries_its_interval():
    a = timing("a", [2.0, 2.1, 1.9, 2.0, 9.0])
    b = timing("b", [1.0, 1.05, 0.95, 1.0, 1.0])
    ratio = time_ratio(a, b)
    assert ratio.value == pytest.approx(2.0)
    assert ratio.low <= 2.0 <= ratio.high
    assert ratio.verdict.startswith("2.00x faster (95 % interval ")
    assert time_ratio(a, b) == ratio
    inverse = time_ratio(b, a)
    assert inverse.verdict.startswith("2.00x slower (95 % interval ")


def test_times_of_different_runs_are_not_compared():
    with pytest.raises(UsageError, match="one run"):
        time_ratio(timing("a", [1.0] * 5), timing("b", [1.0] * 6))


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (Ratio(quantity="time", value=1.1, low=0.9, high=1.3), "no measurable difference (95 % interval 0.90 to 1.30)"),
        (Ratio(quantity="time", value=0.5, low=0.4, high=0.8), "2.00x slower (95 % interval 1.25 to 2.50)"),
        (Ratio(quantity="bytes", value=4.0, low=4.0, high=4.0), "4.00x smaller"),
        (Ratio(quantity="bytes", value=0.5, low=0.5, high=0.5), "2.00x larger"),
        (Ratio(quantity="macs", value=1.0, low=1.0, high=1.0), "equal"),
    ],
)
def test_verdicts(ratio, words):
    assert ratio.verdict == words


def test_the_engines_meet_their_protocol():
    assert isinstance(Torch(), Engine)
    assert isinstance(OnnxRuntime(), Engine)
