"""Means over all pixels as average pools: only where they are means over all pixels, and without a change."""

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


class Averaging(nn.Module):
    """A convolution, and a mean over some of its dimensions."""

    def __init__(self, over: tuple[int, ...], *, keep: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.over, self.keep = over, keep

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x)).mean(self.over, keepdim=self.keep).flatten(1).mul(2.0)


def quantised(net: nn.Module) -> bytes:
    form = onnx_form(Model(net.eval(), example=(torch.zeros(1, 3, 12, 12),)))
    return to_int8(form, [(torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(0)),)]).data


def kinds(data: bytes) -> set[str]:
    return {node.op_type for node in onnx.load_model_from_string(data).graph.node}


def outputs(data: bytes) -> np.ndarray:
    x = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(1)).numpy()
    return np.asarray(onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0])


def test_a_mean_over_all_pixels_is_a_pool_that_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to one step of the output's integers."""
    torch.manual_seed(0)
    net = Averaging((2, 3), keep=True)
    light = quantised(net)
    monkeypatch.setattr(int8, "average_pools", lambda *_: None)
    plain = quantised(net)
    assert "GlobalAveragePool" in kinds(light)
    assert "ReduceMean" not in kinds(light)
    assert "ReduceMean" in kinds(plain)
    assert np.abs(outputs(plain) - outputs(light)).max() <= 0.02 * np.abs(outputs(plain)).max()


@pytest.mark.parametrize(("over", "keep"), [((2,), True), ((1, 2), True), ((1, 2, 3), True)], ids=str)
def test_other_means_stay(over: tuple[int, ...], *, keep: bool) -> None:
    """Over one dimension of pixels, or over channels."""
    assert "GlobalAveragePool" not in kinds(quantised(Averaging(over, keep=keep)))


def test_constants_that_nothing_reads_are_not_kept() -> None:
    """The axes of a mean that became a pool, among others; shapes of inner values go too."""
    graph = onnx.load_model_from_string(quantised(Averaging((2, 3), keep=True))).graph
    read = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= read
    assert not graph.value_info
