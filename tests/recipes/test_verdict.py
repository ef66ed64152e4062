"""The verdict: sentences that never call a slower model faster, nor noise a gain."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from karui.measuring import Change, Comparison, Counts, Measurement, Ratio, Score
from karui.model import Classification, Model, Regression
from karui.recipes.verdict import odd_widths, untaught, verdict


def measurement(parameters: int, stored: int, accuracy: float | None = None) -> Measurement:
    counts = Counts(parameters=parameters, nonzero=parameters, macs=parameters * 10, layers=())
    score = None
    if accuracy is not None:
        score = Score(value=accuracy, low=accuracy - 0.01, high=accuracy + 0.01, count=597, metric="accuracy")
    return Measurement(counts=counts, tensor_bytes=stored, stored_bytes=stored, score=score)


def ratio(quantity: str, value: float, low: float | None = None, high: float | None = None, **where) -> Ratio:
    return Ratio(quantity=quantity, value=value, low=low or value, high=high or value, **where)


def time(value: float, low: float, high: float, batch: int = 1, engine: str = "onnxruntime") -> Ratio:
    return ratio("time", value, low, high, engine=engine, batch=batch, threads=1)


def both(*ratios: Ratio, change: Change | None = None, accuracy: float | None = None) -> Comparison:
    dense, light = measurement(100, 4000, accuracy and accuracy + 0.01), measurement(50, 2000, accuracy)
    return Comparison(dense=dense, light=light, ratios=ratios, change=change)


def test_gains():
    told = verdict(both(ratio("bytes as saved", 2.0), ratio("macs", 2.5), time(1.8, 1.7, 1.9), time(3, 2.8, 3.2, 64)))
    assert told == [
        "The saved model is 2.00x smaller: 2 kB instead of 4 kB.",
        "It does 2.50x fewer multiplications for an input.",
        "In ONNX Runtime, one input at a time, one thread: 1.80x faster (between 1.70x and 1.90x).",
        "In ONNX Runtime, batches of 64, one thread: 3.00x faster (between 2.80x and 3.20x).",
    ]


def test_widths_that_the_engine_is_slow_at_are_told_where_they_cost_what_the_cut_saves():
    def net(*widths: int) -> Model:
        layers = (nn.Conv2d(1, width, 3) for width in widths)
        return Model(nn.Sequential(*layers), example=(torch.zeros(1, 1, 8, 8),))

    dense, fewer = net(16, 8, 3), ratio("macs", 1.4)
    slow, fast = both(fewer, time(0.9, 0.8, 1.05), time(1.3, 1.2, 1.4, 64)), both(fewer, time(1.3, 1.2, 1.4))
    (told,) = odd_widths(dense, net(11, 8, 3), slow)
    assert told.startswith("1 convolution was cut to widths such as 11;")
    assert odd_widths(dense, net(11, 8, 3), fast) == ()
    assert odd_widths(dense, net(8, 8, 3), slow) == ()
    assert odd_widths(dense, net(11, 8, 3), both(time(0.9, 0.8, 1.05))) == ()


def test_losses_are_called_losses():
    told = verdict(both(ratio("bytes as saved", 0.5), ratio("macs", 0.5), time(0.5, 0.4, 0.8)))
    assert "2.00x LARGER" in told[0]
    assert "2.00x MORE" in told[1]
    assert told[2].endswith("2.00x SLOWER (between 1.25x and 2.50x).")


def test_noise_is_no_gain():
    assert verdict(both(time(1.2, 0.9, 1.4))) == [
        "In ONNX Runtime, one input at a time, one thread: no measurable difference in time (0.90x to 1.40x)."
    ]
    assert verdict(both(ratio("macs", 1.0), ratio("bytes as saved", 1.0))) == [
        "The saved model is as large as before (2 kB).",
        "It does as many multiplications for an input as before.",
    ]


def test_torch_speaks_where_onnx_runtime_was_not_measured():
    assert verdict(both(time(2, 1.9, 2.1, engine="torch")))[0].startswith("In PyTorch")


def test_quality():
    change = Change(value=-0.01, low=-0.02, high=0.005, metric="accuracy")
    told = verdict(both(accuracy=0.9, change=change))
    assert told == ["Accuracy on 597 test samples: 90.0% instead of 91.0%; the difference is within chance."]
    worse = dataclasses.replace(change, high=-0.001)
    assert verdict(both(accuracy=0.9, change=worse))[0].endswith("WORSE, by more than chance.")
    error = dataclasses.replace(worse, higher_is_better=False)
    assert verdict(both(accuracy=0.9, change=error))[0].endswith("better, by more than chance.")


def test_a_dense_model_no_better_than_chance_is_warned_of():
    model = Model(nn.Linear(3, 10), example=(torch.zeros(2, 3),), task=Classification())
    (told,) = untaught(model, measurement(1, 1, 0.105).score)
    assert "10.5%" in told
    assert "--weights" in told
    assert untaught(model, measurement(1, 1, 0.15).score) == ()
    assert untaught(model, None) == ()
    assert untaught(dataclasses.replace(model, task=Regression()), measurement(1, 1, 0.05).score) == ()
