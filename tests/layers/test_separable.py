from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from karui.layers.separable import Separable2d
from karui.model import build_layer, describe_layer


def test_mobilenets_layer_has_norm_and_relu_after_both_convolutions() -> None:
    kinds = [type(child) for child in Separable2d(8, 16)]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d, nn.ReLU]


def test_xceptions_layer_has_nothing_between_them() -> None:
    kinds = [type(child) for child in Separable2d(8, 16, inner=False, activation=False)]
    assert kinds == [nn.Conv2d, nn.Conv2d, nn.BatchNorm2d]


def test_without_anything_between_it_is_a_dense_convolution_whose_kernel_is_a_product() -> None:
    torch.manual_seed(0)
    layer = Separable2d(4, 6, (3, 5), stride=2, dilation=(2, 1), inner=False, norm=False, activation=False)
    kernel = layer.pointwise.weight[:, :, 0, 0, None, None] * layer.depthwise.weight[:, 0]
    x = torch.randn(2, 4, 13, 12)
    dense = functional.conv2d(x, kernel, stride=2, padding=layer.depthwise.padding, dilation=(2, 1))
    torch.testing.assert_close(layer(x), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [1, 3, 5, (3, 1)])
def test_without_a_stride_the_map_keeps_its_size(kernel: int | tuple[int, int]) -> None:
    assert Separable2d(2, 3, kernel, dilation=2)(torch.zeros(1, 2, 11, 9)).shape == (1, 3, 11, 9)


def test_a_lineage_can_build_it_again() -> None:
    layer = Separable2d(4, 6, (3, 3), stride=(2, 1), padding=(1, 0), bias=True, norm=False)
    path, settings = describe_layer(layer)
    again = build_layer(path, settings)
    assert path == "karui.layers.separable:Separable2d"
    assert repr(again) == repr(layer)


def test_settings_follow_a_cut() -> None:
    layer = Separable2d(4, 6)
    layer.pointwise = nn.Conv2d(4, 5, 1, bias=False)
    assert layer.settings()["outputs"] == 5
