"""Shortcuts as convolutions of integers: equal to the bit, and only where they are shortcuts."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from karui.deployment import int8, to_int8
from karui.measuring import onnx_form
from karui.model import Model


class Widening(nn.Module):
    """A residual block that widens by zeros; the settings make it one whose shortcut has to stay as it is."""

    def __init__(self, step: int = 2, start: int = 0, fill: float = 0.0, width: int = 8) -> None:
        super().__init__()
        self.step, self.start, self.fill, self.more = step, start, fill, width
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, stride=step, padding=1)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        near = x[:, :, self.start :: self.step, :: self.step]
        wide = nn.functional.pad(near, (0, 0, 0, 0, self.more // 2, self.more // 2), value=self.fill)
        return self.head(torch.relu(self.second(x) + wide).mean((2, 3)))


def quantised(net: nn.Module, monkeypatch: pytest.MonkeyPatch, *, plain: bool) -> bytes:
    draw = torch.Generator().manual_seed(0)
    form = onnx_form(Model(net.eval(), example=(torch.zeros(1, 3, 16, 16),)))
    with monkeypatch.context() as patch:
        if plain:
            patch.setattr(int8, "integer_shortcuts", lambda *_: None)
        return to_int8(form, [(torch.randn(32, 3, 16, 16, generator=draw),)]).data


def kinds(data: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_model_from_string(data).graph.node]


def outputs(data: bytes, size: int) -> np.ndarray:
    x = torch.randn(size, 3, 16, 16, generator=torch.Generator().manual_seed(1)).numpy()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize("given", [{}, {"step": 1}, {"step": 4}, {"width": 16}], ids=str)
def test_a_shortcut_is_a_convolution_that_gives_the_same(given: dict[str, int], monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    net = Widening(**given)
    plain, light = (quantised(net, monkeypatch, plain=plain) for plain in (True, False))
    assert "Pad" in kinds(plain)
    assert not {"Pad", "Slice"} & set(kinds(light))
    for size in (1, 5):
        assert np.array_equal(outputs(plain, size), outputs(light, size))


@pytest.mark.parametrize("given", [{"start": 1, "step": 1}, {"fill": 1.0}, {"width": 64}], ids=str)
def test_what_is_no_such_shortcut_stays(given: dict[str, int], monkeypatch: pytest.MonkeyPatch):
    class Odd(Widening):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            near = x[:, :, self.start :: self.step, :: self.step]
            wide = nn.functional.pad(near, (0, 0, self.start, 0, self.more // 2, self.more // 2), value=self.fill)
            return self.head(torch.relu(self.second(x) + wide).mean((2, 3)))

    torch.manual_seed(0)
    assert "Pad" in kinds(quantised(Odd(**given), monkeypatch, plain=False))
