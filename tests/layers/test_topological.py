"""Topological subdivisioning (survey 20): what must hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from karui.errors import SettingError
from karui.layers.topological import TopologicalPointwise, box_on_torus, layers_to_reach_all, square_lattice
from karui.measuring import count
from karui.model import Model, build_layer, describe_layer

pytestmark = pytest.mark.paper(20)

TORUSES = [((8, 8), (3, 4)), ((4, 6), (4, 2)), ((3, 4, 5), (2, 2, 3)), ((12,), (5,)), ((5, 7), (1, 7))]


@pytest.mark.parametrize(("lattice", "window"), TORUSES)
def test_it_is_the_pointwise_layer_of_its_matrix_at_the_cost_of_its_weights(lattice: Any, window: Any) -> None:
    torch.manual_seed(0)
    layer = TopologicalPointwise(lattice, window)
    n, each = layer.channels, torch.Size(window).numel()
    x = torch.randn(2, n, 4, 5)
    dense = nn.functional.conv2d(x, layer.matrix().float()[:, :, None, None], layer.mix.bias)
    torch.testing.assert_close(layer(x), dense, rtol=1e-4, atol=1e-5)
    assert layer.mix.weight.numel() == n * each
    assert count(Model(layer, example=(x,))).macs == n * each * 20


@pytest.mark.parametrize(("lattice", "window"), TORUSES)
def test_every_row_and_column_has_as_many_weights_and_shifts_keep_the_pattern(lattice: Any, window: Any) -> None:
    seen = TopologicalPointwise(lattice, window).pattern()
    each = torch.Size(window).numel()
    assert (seen.sum(0) == each).all()
    assert (seen.sum(1) == each).all()
    both = seen.reshape(*lattice, *lattice)
    for axis in range(len(lattice)):
        assert torch.equal(both.roll((1, 1), (axis, len(lattice) + axis)), both)


def test_the_box_starts_at_the_channel_itself_and_wraps_around() -> None:
    box = box_on_torus((3, 4), (2, 2))
    assert box[0].tolist() == [0, 1, 4, 5]
    assert box[11].tolist() == [11, 8, 3, 0]


def reached(pattern: Tensor) -> int | None:
    """Layers until everything is connected, by powers of the pattern."""
    power = torch.eye(len(pattern))
    for number in range(1, 2 * len(pattern)):
        power = (power @ pattern.float()).clamp(max=1)
        if power.all():
            return number
    return None


@pytest.mark.parametrize(("lattice", "window"), TORUSES)
def test_all_channels_have_met_after_the_predicted_number_of_layers(lattice: Any, window: Any) -> None:
    assert reached(TopologicalPointwise(lattice, window).pattern()) == layers_to_reach_all(lattice, window)


def test_the_parts_of_a_grouped_convolution_never_meet() -> None:
    assert reached(torch.block_diag(*[torch.ones(4, 4)] * 3)) is None


def test_a_window_as_large_as_the_lattice_is_the_dense_layer() -> None:
    layer = TopologicalPointwise((3, 4), (3, 4))
    assert layer.pattern().all()
    dense = nn.Conv2d(12, 12, 1)
    assert layer.mix.weight.numel() == dense.weight.numel()
    with torch.no_grad():
        dense.weight.copy_(layer.matrix()[:, :, None, None])
        dense.bias.copy_(layer.mix.bias)  # pyright: ignore
    x = torch.randn(2, 12, 5, 5)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dimensions", "space"), [(1, (7,)), (2, (5, 4)), (3, (3, 4, 2))])
def test_a_lineage_can_build_it_again_in_every_dimension(dimensions: int, space: tuple[int, ...]) -> None:
    layer = TopologicalPointwise((3, 4), (2, 2), dimensions=dimensions, bias=False)
    again = build_layer(*describe_layer(layer))
    assert "index" not in layer.state_dict()
    again.load_state_dict(layer.state_dict())
    x = torch.randn(1, 12, *space)
    assert torch.equal(again(x), layer(x))


def test_lattices_are_as_even_as_can_be_and_windows_must_fit() -> None:
    assert [square_lattice(n, 2) for n in (64, 48, 13)] == [(8, 8), (6, 8), (1, 13)]
    assert square_lattice(60, 3) == (3, 4, 5)
    for window in ((2,), (0, 2), (2, 5)):
        with pytest.raises(SettingError, match="window"):
            TopologicalPointwise((4, 4), window)
