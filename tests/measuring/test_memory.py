import sys

import pytest
import torch
from torch import nn

from karui.measuring import OnnxRuntime, OpenVino, Torch, peak_memory
from karui.measuring.memory import torch_peak
from karui.model import Model

linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")


class Chain(nn.Module):
    """Holds its input and at most two of its own values at a time."""

    def forward(self, x):
        for _ in range(5):
            x = x + 1
        return x


class Hoard(nn.Module):
    """Holds all values until the end."""

    def forward(self, x):
        values = [x]
        for _ in range(5):
            values.append(values[-1] + 1)
        return values[-1]


def test_torch_counts_weights_input_and_live_values_exactly():
    size = 4 * 100_000
    x = torch.zeros(1, 100_000)
    assert torch_peak(Model(Chain(), example=(x,)), 1) == pytest.approx(size * 3, abs=2000)
    assert torch_peak(Model(Hoard(), example=(x,)), 1) == pytest.approx(size * 6, abs=2000)
    assert torch_peak(Model(Chain(), example=(x,)), 4) == pytest.approx(4 * size * 3, abs=8000)


def test_torch_counts_a_shared_weight_once():
    net = nn.Sequential(nn.Linear(300, 300, bias=False), nn.Linear(300, 300, bias=False))
    net[1].weight = net[0].weight
    assert torch_peak(Model(net, example=(torch.zeros(1, 300),)), 1) == pytest.approx(300 * 300 * 4, abs=8000)


@linux
@pytest.mark.parametrize("engine", [OnnxRuntime(), OpenVino()])
def test_an_engine_with_larger_weights_and_values_takes_more(engine):
    if reason := engine.missing():
        pytest.skip(reason)
    found = {}
    for width in (100, 2000):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(100, width), nn.ReLU(), nn.Linear(width, width))
        memory, reasons = peak_memory(Model(net, example=(torch.zeros(1, 100),)), (engine,), (1,))
        assert reasons == ()
        found[width] = memory[0].bytes
    weights = 4 * (2000 * 2000 + 2000 * 100)
    assert found[2000] - found[100] > 0.9 * weights


def test_what_cannot_be_measured_is_told():
    class ByValue(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    class Absent:
        name = "absent"

        def missing(self):
            return "absent is not installed"

    memory, reasons = peak_memory(
        Model(ByValue(), example=(torch.ones(1, 3),)), (Torch(), OnnxRuntime(), Absent()), (1, 2)
    )
    assert [(m.engine, m.batch) for m in memory] == [("torch", 1), ("torch", 2)]
    assert len(reasons) == 2
    assert "onnxruntime not measured: The model cannot be exported" in reasons[0]
    assert reasons[1].endswith("absent is not installed")


def test_nothing_is_printed(capfd):
    torch_peak(Model(Chain(), example=(torch.zeros(1, 10),)), 1)
    assert capfd.readouterr() == ("", "")
