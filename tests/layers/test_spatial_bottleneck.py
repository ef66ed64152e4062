"""The spatial bottleneck (survey 20): what must hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from karui.layers.spatial_bottleneck import BottleneckConv
from karui.measuring import count
from karui.model import Model, build_layer, describe_layer

pytestmark = pytest.mark.paper(20)


@pytest.mark.parametrize(("n", "k"), [(16, 2), (9, 3), (7, 4)])
def test_multiply_adds_follow_the_formula(n: int, k: int) -> None:
    layer, side = BottleneckConv(n, n, k), 4 * k
    told = count(Model(layer, example=(torch.zeros(1, n, side, side),))).macs
    assert told / side**2 == pytest.approx(n + n**2 / k**2 + n, rel=1e-12)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (5, 3), (1, 2)])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_map_keeps_its_size_where_k_does_not_divide_it(size: tuple[int, int], k: int) -> None:
    torch.manual_seed(0)
    layer = BottleneckConv(6, 6, k, norm=False).eval()
    x = torch.randn(2, 6, *size)
    assert layer(x).shape == x.shape
    whole = [-(-side // k) * k for side in size]
    larger = torch.zeros(2, 6, *whole)
    larger[..., : size[0], : size[1]] = x
    torch.testing.assert_close(layer(x), layer(larger)[..., : size[0], : size[1]])


def test_down_and_up_are_learned_depthwise_layers_of_kernel_and_stride_k() -> None:
    layer = BottleneckConv(6, 6, 3)
    assert (type(layer.down), type(layer.up)) == (nn.Conv2d, nn.ConvTranspose2d)
    for part in (layer.down, layer.up):
        assert (part.kernel_size, part.stride, part.groups) == ((3, 3), (3, 3), 6)
    assert layer.projection.kernel_size == (1, 1)


def test_patches_do_not_overlap() -> None:
    layer = BottleneckConv(4, 4, 2, residual=False, activation=False).eval()
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[0, :, 2, 3].sum(), x)
    inside = torch.zeros(6, 6, dtype=torch.bool)
    inside[2:4, 2:4] = True
    assert not gradient[..., ~inside].any()
    assert gradient[..., inside].all()


def test_with_a_silent_projection_it_is_the_relu() -> None:
    layer = BottleneckConv(4, 4, 2).eval()
    nn.init.zeros_(layer.projection.weight)
    x = torch.randn(1, 4, 7, 6)
    assert torch.equal(layer(x), x.relu())
    assert not BottleneckConv(4, 6, 2).residual


@pytest.mark.parametrize(("dimensions", "space"), [(1, (7,)), (2, (5, 4)), (3, (3, 4, 2))])
def test_a_lineage_can_build_it_again_in_every_dimension(dimensions: int, space: tuple[int, ...]) -> None:
    layer: Any = BottleneckConv(6, 8, 2, dimensions=dimensions, norm=False, activation=False)
    again = build_layer(*describe_layer(layer))
    again.load_state_dict(layer.state_dict())
    x = torch.randn(1, 6, *space)
    assert torch.equal(again(x), layer(x))
    assert layer(x).shape == (1, 8, *space)
