"""The flattened convolution (survey 15): what must hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from karui.errors import SettingError
from karui.layers.flattened import FlattenedConv
from karui.model import build_layer, describe_layer
from karui.numerics.unfold import unfold

pytestmark = pytest.mark.paper(15)


def numel(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize(("channels", "filters", "d"), [(16, 24, 5), (3, 8, 3), (8, 8, 4)])
def test_parameters_follow_the_formulas(channels: int, filters: int, d: int) -> None:
    one = filters * (channels + 2 * d) + 3 * filters
    assert numel(FlattenedConv(channels, filters, (d, d), stages=1)) == one
    two = one + filters * (filters + 2 * d) + 3 * filters
    assert numel(FlattenedConv(channels, filters, (d, d))) == two


def test_the_order_is_lateral_vertical_horizontal_each_with_a_bias() -> None:
    layers: list[Any] = [layer for layer in FlattenedConv(6, 8, (5, 3)).modules() if not list(layer.children())]
    assert [(layer.kernel_size, layer.groups) for layer in layers] == 2 * [((1, 1), 1), ((5, 1), 8), ((1, 3), 8)]
    assert all(type(layer) is nn.Conv2d and layer.bias is not None for layer in layers)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("taps", [3, 4, 5])
@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1}, {"stride": 2}, {"dilation": 2, "padding": 3}, {"groups": 2, "padding": 2, "stride": 3},
        {"padding": "valid"},
    ],
)  # fmt: skip
def test_one_set_is_the_dense_convolution_of_its_outer_products(kind: Any, taps: int, settings: Any) -> None:
    torch.manual_seed(0)
    conv = kind(8, 12, taps, bias=False, **settings)
    layer = FlattenedConv(8, 12, conv.kernel_size, stages=1, **{"padding": 0, **settings})
    with torch.no_grad():
        conv.weight.copy_(layer.kernel())
    x = torch.randn(2, 8, *[13] * (conv.weight.ndim - 2))
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-5)
    two = FlattenedConv(8, 12, conv.kernel_size, **{"padding": 0, **settings})
    assert two(x).shape == conv(x).shape


def test_the_kernel_is_alpha_beta_gamma_and_its_filters_have_multilinear_rank_one() -> None:
    layer = FlattenedConv(6, 4, (5, 3), stages=1)
    alpha, beta, gamma = (conv.weight.detach().double().flatten(1) for conv in layer._sets()[0])
    kernel = layer.kernel()
    torch.testing.assert_close(kernel, torch.einsum("fc,fi,fj->fcij", alpha, beta, gamma))
    for block in kernel:
        assert [int(torch.linalg.matrix_rank(unfold(block, (mode,)))) for mode in range(3)] == [1, 1, 1]
    x = torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(layer(x), functional.conv2d(x, kernel.float(), padding=(2, 1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("d", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_map_keeps_its_size(d: int, stages: int) -> None:
    assert FlattenedConv(4, 6, (d, d), stages=stages, dilation=1)(torch.zeros(1, 4, 11, 10)).shape == (1, 6, 11, 10)


def test_a_dimension_without_taps_gives_its_stride_and_padding_to_the_lateral_one() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, (1, 5), stride=(2, 1), padding=(1, 2), bias=False)
    layer = FlattenedConv(4, 6, (1, 5), stages=1, stride=(2, 1), padding=(1, 2))
    with torch.no_grad():
        conv.weight.copy_(layer.kernel())
    x = torch.randn(1, 4, 9, 8)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-5)
    assert FlattenedConv(4, 6, (1, 5), stride=(2, 1), padding=(1, 2))(x).shape == conv(x).shape


def random_biases(layer: nn.Module) -> nn.Module:
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return layer


def test_both_sets_together_are_affine() -> None:
    torch.manual_seed(0)
    layer = random_biases(FlattenedConv(4, 6, (5, 5))).double()
    x, y = torch.randn(2, 2, 4, 9, 9, dtype=torch.float64)
    whole = layer(x + y) - layer(x) - layer(y) + layer(torch.zeros_like(x))
    torch.testing.assert_close(whole, torch.zeros_like(whole), rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels", [16, 64])
def test_the_variance_of_the_start_is_that_of_the_input(channels: int) -> None:
    x = torch.randn(8, channels, 28, 28)
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            assert 0.5 < float(FlattenedConv(channels, 64, (5, 5))(x).var()) < 2
    usual = FlattenedConv(channels, 64, (5, 5))
    for layer in usual.modules():
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()
            nn.init.zeros_(layer.bias)  # pyright: ignore
    assert float(usual(x).detach().var()) < 0.02


@pytest.mark.parametrize("groups", [1, 2])
def test_it_starts_from_the_nearest_filters_of_rank_one(groups: int) -> None:
    torch.manual_seed(0)
    source = FlattenedConv(8, 12, (5, 3), stages=1, groups=groups)
    conv = nn.Conv2d(8, 12, (5, 3), padding=(2, 1), groups=groups)
    with torch.no_grad():
        conv.weight.copy_(source.kernel())
    layer = FlattenedConv(8, 12, (5, 3), groups=groups, padding=(2, 1))
    assert layer.fit(conv.weight.detach(), conv.bias) < 1e-5
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-4)
    other = torch.randn(12, 8 // groups, 5, 3)
    error = layer.fit(other)
    assert error == pytest.approx(float((layer.kernel() - other).norm() / other.norm()), rel=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"stages": 3, "groups": 2}, {"padding": (1, 0), "stride": 2, "padding_mode": "reflect"}]
)
def test_a_lineage_can_build_it_again(settings: Any) -> None:
    layer = FlattenedConv(8, 12, (3, 5), **settings)
    again = build_layer(*describe_layer(layer))
    again.load_state_dict(layer.state_dict())
    x: Tensor = torch.randn(1, 8, 9, 9)
    assert torch.equal(again(x), layer(x))


def test_settings_that_do_not_fit_are_told() -> None:
    for settings, name in (
        ({"stages": 0}, "stages"),
        ({"padding": "same", "stride": 2}, "stride 1"),
        ({"padding_mode": "circular"}, "even kernel"),
    ):
        with pytest.raises(SettingError, match=name):
            FlattenedConv(4, 4, (4, 4), **settings)  # pyright: ignore
