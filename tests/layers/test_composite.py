"""The composite convolution and its initialisation (survey 21): what must hold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from karui.errors import SettingError, SurgeryError
from karui.layers.composite import CompositeConv, apportion, composite_std, init_composite, low_rank_parts
from karui.model import build_layer, describe_layer

pytestmark = pytest.mark.paper(21)

MIXED = [((1, 3), 24), ((3, 1), 24), ((3, 3), 8), ((1, 1), 8)]


def weights(layer: nn.Module) -> int:
    return sum(p.numel() for name, p in layer.named_parameters() if name.endswith("weight"))


@pytest.mark.parametrize(("channels", "filters", "d"), [(16, 32, 3), (8, 20, 5)])
def test_weights_follow_the_formulas(channels: int, filters: int, d: int) -> None:
    half = CompositeConv(channels, low_rank_parts((d, d), filters))
    assert weights(half) == filters * channels * d == weights(nn.Conv2d(channels, filters, d)) // d
    full = CompositeConv(channels, low_rank_parts((d, d), filters, full=0.5))
    assert weights(full) == filters * channels * (0.5 * d**2 + 0.5 * d)
    join = CompositeConv(channels, low_rank_parts((d, d), filters), join=24)
    assert weights(join) == filters * channels * d + filters * 24
    assert [(conv.kernel_size, conv.out_channels) for conv in half.convs] == [  # pyright: ignore
        ((1, d), filters // 2), ((d, 1), filters // 2)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("join", [None, 12])
@pytest.mark.parametrize("taps", [3, 4, 5])
@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1}, {"stride": 2, "padding": 0, "bias": False}, {"dilation": 2, "padding": 3},
        {"groups": 2, "padding": 2, "stride": 3}, {"padding": "valid"},
    ],
)  # fmt: skip
def test_it_is_one_dense_convolution_with_its_shape(kind: Any, join: int | None, taps: int, settings: Any) -> None:
    torch.manual_seed(0)
    conv = kind(8, 12, taps, **settings)
    parts = low_rank_parts(conv.kernel_size, 12, full=0.2, point=0.2, groups=conv.groups)
    layer = CompositeConv(8, parts, join=join, **{"padding": 0, **settings})
    for part in layer.modules():
        if getattr(part, "bias", None) is not None:
            nn.init.normal_(part.bias)  # pyright: ignore
    x = torch.randn(2, 8, *[13] * (conv.weight.ndim - 2))
    assert layer(x).shape == conv(x).shape
    dense = layer.dense()
    assert describe_layer(dense)[0] == describe_layer(conv)[0]
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)


def test_without_full_filters_the_dense_kernel_is_a_cross() -> None:
    layer = CompositeConv(4, low_rank_parts((5, 5), 8), join=6)
    kernel: Tensor = layer.dense().weight  # pyright: ignore
    cross = torch.zeros(5, 5, dtype=torch.bool)
    cross[2], cross[:, 2] = True, True
    assert torch.equal(kernel[:, :, ~cross], torch.zeros(6, 4, 16))
    assert kernel[:, :, cross].abs().min() > 0
    corners = CompositeConv(4, low_rank_parts((5, 5), 8, full=0.25), join=6).dense().weight[:, :, 0, 0]  # pyright: ignore
    assert corners.abs().min() > 0


def test_nothing_stands_between_the_filters_and_the_join() -> None:
    torch.manual_seed(0)
    layer = CompositeConv(4, MIXED, join=6)
    x, y = torch.randn(2, 2, 4, 7, 7)
    whole = layer(x + y) - layer(x) - layer(y) + layer(torch.zeros_like(x))
    torch.testing.assert_close(whole, torch.zeros_like(whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{"padding_mode": "reflect", "padding": 1}, {"padding": "same", "dilation": 2}])
def test_padding_by_copies_and_by_name_is_that_of_the_dense_layer(settings: Any) -> None:
    layer = CompositeConv(4, low_rank_parts((3, 3), 8), bias=False, **settings)
    conv = nn.Conv2d(4, 8, 3, bias=False, **settings)
    flat = CompositeConv(4, low_rank_parts((3, 3), 8), bias=False, padding=0)
    flat.load_state_dict(layer.state_dict())
    with torch.no_grad():
        conv.weight.copy_(flat.dense().weight)  # pyright: ignore
    x = torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-5)


def test_a_layer_that_pads_by_copies_has_no_single_layer() -> None:
    with pytest.raises(SurgeryError, match="pads unequally"):
        CompositeConv(4, MIXED, padding_mode="reflect", padding=1).dense()


def test_every_group_of_filters_has_the_one_standard_deviation() -> None:
    torch.manual_seed(0)
    parts = [((1, 3), 96), ((3, 1), 96), ((3, 3), 64), ((1, 1), 128)]
    told = math.sqrt(2 / (3 * 96 + 3 * 96 + 9 * 64 + 128))
    assert composite_std(parts) == pytest.approx(told, rel=1e-12)
    layer = CompositeConv(128, parts, join=64)
    for conv in layer.convs:
        assert float(conv.weight.detach().std()) == pytest.approx(told / math.sqrt(2), rel=0.03)  # pyright: ignore
        assert not conv.weight.detach().mean().abs() > 0.05 * told  # pyright: ignore
    assert float(layer.join.weight.detach().std()) == pytest.approx(math.sqrt(2 / 64), rel=0.03)  # pyright: ignore


def test_one_group_alone_is_hes_rule_by_fan_out() -> None:
    conv = nn.Conv2d(16, 32, 3)
    torch.manual_seed(0)
    init_composite([conv])
    drawn = conv.weight.detach().clone()
    torch.manual_seed(0)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    torch.testing.assert_close(drawn, conv.weight.detach())


def test_with_equal_areas_and_width_it_is_hes_rule_by_fan_in() -> None:
    assert composite_std([((1, 3), 32), ((3, 1), 32)]) == pytest.approx(math.sqrt(2 / (64 * 3)))
    assert composite_std(MIXED) != pytest.approx(math.sqrt(2 / (64 * 3)), rel=0.03)


def gradient(parts: Any, join: int | None, alone: bool) -> float:
    """Variance of the gradient at the input over that at the output of 12 layers, each with a ReLU."""
    torch.manual_seed(0)
    layers = [CompositeConv(64, parts, join=join, bias=False) for _ in range(12)]
    for layer in layers:
        for conv in layer.convs if alone else []:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # pyright: ignore
    x = torch.randn(8, 64, 8, 8, requires_grad=True)
    y = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))(x)
    given = torch.randn_like(y)
    (arrived,) = torch.autograd.grad(y, x, given)
    return float(arrived.var() / given.var())


@pytest.mark.parametrize("join", [None, 64])
@pytest.mark.parametrize("parts", [[((1, 3), 32), ((3, 1), 32)], MIXED], ids=["half", "mixed"])
def test_twelve_layers_keep_the_gradient_and_hes_rule_for_each_group_does_not(parts: Any, join: int | None) -> None:
    assert 1 / 4 < gradient(parts, join, alone=False) < 4
    assert gradient(parts, join, alone=True) > 500


def test_shares_become_whole_numbers_of_filters() -> None:
    assert apportion(7, [0.5, 0.5]) == [4, 3]
    assert low_rank_parts((3, 3), 10, full=0.25) == [((1, 3), 4), ((3, 1), 4), ((3, 3), 2)]
    assert low_rank_parts((3, 5), 12, groups=4) == [((1, 5), 8), ((3, 1), 4)]
    assert low_rank_parts((3, 3, 3), 9) == [((1, 1, 3), 3), ((1, 3, 1), 3), ((3, 1, 1), 3)]


def test_a_lineage_can_build_it_again() -> None:
    layer = CompositeConv(8, low_rank_parts((3, 4), 12, full=0.4, groups=2), join=6, groups=2, padding=1, bias=False)
    again = build_layer(*describe_layer(layer))
    again.load_state_dict(layer.state_dict())
    x = torch.randn(1, 8, 9, 9)
    assert torch.equal(again(x), layer(x))


def test_parts_that_do_not_fit_are_told() -> None:
    with pytest.raises(SettingError, match="multiple of the 4 groups"):
        CompositeConv(8, [((1, 3), 6)], groups=4)
    with pytest.raises(SettingError, match="parts is empty"):
        CompositeConv(8, [])
    with pytest.raises(SettingError, match="stride 1"):
        CompositeConv(8, MIXED, stride=2, padding="same")
