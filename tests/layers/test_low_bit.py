"""Layers with a weight of k bits: what they compute, hold and tell of themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from karui.artifact import load, save
from karui.layers.low_bit import LowBitConv, low_bit_layer
from karui.model import Model, replace_layers
from karui.numerics.straight_through import InputGrid, WeightGrid, levels

pytestmark = pytest.mark.paper(38)
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 7), (5, 12)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=False), (2, 4, 9, 9)),
    "groups, reflected": (
        lambda: nn.Conv2d(4, 6, (3, 1), padding=(1, 0), groups=2, padding_mode="reflect"),
        (2, 4, 8, 8),
    ),
    "one dimension, same": (lambda: nn.Conv1d(3, 5, 4, padding="same", dilation=2), (2, 3, 16)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("signed", [False, True])
def test_it_computes_what_the_fake_quantised_layer_does_and_in_whole_numbers(name: str, signed: bool) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    weight, inputs = WeightGrid(3, scale=0.7), InputGrid(2, reach=1.3, signed=signed)
    low = low_bit_layer(layer, weight, inputs)
    fake = functional_with(layer, weight(layer.weight.detach()))
    torch.testing.assert_close(low(x), fake(inputs(x)))
    whole = functional_with(layer, low.codes(), biased=False)(inputs.codes(x))
    assert torch.equal(whole, whole.round())
    bias = 0 if layer.bias is None else layer.bias.reshape(-1, *[1] * (whole.ndim - 2))
    torch.testing.assert_close(low(x), whole * (0.7 * 1.3 / (levels(3) * levels(2))) + bias)


def functional_with(layer: Any, weight: Tensor, *, biased: bool = True) -> Any:
    """The layer's own forward with another weight."""
    bias = layer.bias if biased else None
    if isinstance(layer, nn.Linear):
        return lambda x: functional.linear(x, weight, bias)
    return lambda x: layer._conv_forward(x, weight, bias)


def test_inputs_may_stay_real() -> None:
    layer, x = nn.Linear(6, 3), torch.randn(4, 6)
    low = low_bit_layer(layer, WeightGrid(2), InputGrid(32))
    torch.testing.assert_close(low(x), functional.linear(x, WeightGrid(2)(layer.weight), layer.bias))
    torch.testing.assert_close(low.dense()(x), low(x))
    assert "reach" not in low.state_dict()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_weight_is_stored_in_its_bits_and_loads_without_a_pickle(bits: int, tmp_path: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    model = Model(net.eval(), example=(torch.rand(1, 16, 8, 8),))
    light = replace_layers(
        model, {path: low_bit_layer(net[int(path)], WeightGrid(bits), InputGrid(bits, 2.0)) for path in ("0", "2")}
    )
    saved = save(light, tmp_path / "light", onnx=False)
    weights = 16 * 32 * 9 + 32 * 32 * 9
    held = sum(one.bytes for one in saved.tensors if one.name.endswith("planes"))
    assert held == bits * weights / 8
    assert light.module[0].bits()["weight"] == bits * 16 * 32 * 9  # pyright: ignore
    again = load(tmp_path / "light", base=net)
    x = torch.rand(3, 16, 8, 8)
    assert torch.equal(again.module(x), light.module(x))


def test_a_layer_is_rebuilt_from_its_settings() -> None:
    low = low_bit_layer(nn.Conv2d(4, 6, 3, groups=2, padding=1), WeightGrid(5), InputGrid(3, signed=True))
    twin = LowBitConv(**low.settings())
    twin.load_state_dict(low.state_dict())
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(twin(x), low(x))
