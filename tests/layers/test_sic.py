"""The single intra-channel convolution (survey 20): what must hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from karui.layers.sic import SicConv, keeps_size, odd, sic_chain
from karui.measuring import count
from karui.model import Model, build_layer, describe_layer

pytestmark = pytest.mark.paper(20)


def macs(layer: nn.Module, channels: int, *space: int) -> int:
    return count(Model(layer, example=(torch.zeros(1, channels, *space),))).macs


def silent(layer: SicConv) -> SicConv:
    nn.init.zeros_(getattr(layer.projection, "mix", layer.projection).weight)
    return layer.eval()


@pytest.mark.parametrize(("n", "k", "b"), [(16, 3, 1), (24, 5, 2), (8, 3, 4)])
def test_multiply_adds_follow_the_formulas(n: int, k: int, b: int) -> None:
    conv = nn.Conv2d(n, n, k, padding=k // 2)
    assert macs(conv, n, 6, 7) == k**2 * n**2 * 42
    assert macs(sic_chain(conv, b), n, 6, 7) == b * (k**2 * n + n**2) * 42
    local = SicConv(n, n, (k, k), lattice=(2, n // 2), window=(2, 3))
    assert macs(local, n, 6, 7) == (k**2 * n + n * 6) * 42


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("lattice", [(), (4, 4)])
def test_with_a_silent_projection_it_is_the_relu(norm: bool, lattice: tuple[int, ...]) -> None:
    x = torch.randn(2, 16, 7, 7)
    layer = silent(SicConv(16, 16, (3, 3), norm=norm, lattice=lattice, window=(2, 2)))
    assert torch.equal(layer(x), x.relu())
    assert not silent(SicConv(16, 16, (3, 3), norm=norm, residual=False))(x).any()


def test_nothing_is_between_filter_and_projection_and_the_sum_comes_before_the_relu() -> None:
    torch.manual_seed(0)
    layer = SicConv(8, 8, (3, 5), norm=False, activation=False).double()
    nn.init.zeros_(layer.projection.bias)
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    kernel = layer.projection.weight.flatten(1)[:, :, None, None] * layer.depthwise.weight[:, 0]
    torch.testing.assert_close(layer(x), x + nn.functional.conv2d(x, kernel, padding=(1, 2)))
    cut = SicConv(8, 8, (3, 5), norm=False).double()
    cut.load_state_dict(layer.state_dict())
    torch.testing.assert_close(cut(x), layer(x).relu())


def test_normalisation_stands_after_the_projection_before_the_sum() -> None:
    torch.manual_seed(0)
    layer = SicConv(8, 8, (3, 3)).train()
    x = 5 + torch.randn(64, 8, 6, 6)
    added = layer.norm(layer.projection(layer.depthwise(x)))  # pyright: ignore
    torch.testing.assert_close(added.mean((0, 2, 3)), torch.zeros(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(layer(x), (x + added).relu())


def test_where_channels_or_size_change_there_is_no_residual() -> None:
    assert SicConv(8, 8, (3, 3)).residual
    for other in (SicConv(8, 9, (3, 3)), SicConv(8, 8, (3, 3), stride=2), SicConv(8, 8, (3, 3), padding=(0, 0))):
        assert not other.residual
    for conv, kept in (
        (nn.Conv2d(4, 4, 3, padding=1), True), (nn.Conv2d(4, 4, 3), False), (nn.Conv2d(4, 4, 4, padding="same"), True),
        (nn.Conv2d(4, 4, 1, padding="valid"), True), (nn.Conv2d(4, 4, 3, dilation=2, padding=2), True),
    ):  # fmt: skip
        assert keeps_size(conv) == kept
    assert odd(nn.Conv2d(4, 4, (3, 5)))
    assert not odd(nn.Conv2d(4, 4, (3, 4)))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1}, {"stride": 2}, {"dilation": 2, "padding": "same"}, {"groups": 2, "padding": 2, "stride": 3},
        {"padding": 1, "padding_mode": "circular"},
    ],
)  # fmt: skip
def test_a_sequence_has_the_convolutions_shape_and_residuals_of_its_own(kind: Any, settings: Any) -> None:
    conv = kind(8, 12, 3, **settings)
    chain = sic_chain(conv, 3)
    x = torch.randn(2, 8, *[11] * (conv.weight.ndim - 2))
    assert chain(x).shape == conv(x).shape
    layers: list[Any] = list(chain)
    assert [layer.residual for layer in layers] == [False, True, True]
    assert [layer.activation is not None for layer in layers] == [True, True, False]
    again = build_layer(*describe_layer(chain))
    again.load_state_dict(chain.state_dict())
    assert torch.equal(again(x), chain(x))
