"""Rank-constrained layers and their streams (survey 27): what must hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from karui.errors import SettingError
from karui.layers.rank_constrained import FrameStream, RankConstrained
from karui.measuring import count
from karui.model import Model, build_layer, describe_layer

pytestmark = pytest.mark.paper(27)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_linear_layer_of_its_outer_products(channels: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = RankConstrained(7, 5, units=6, rank=2, bias=bias, channels=channels)
    x = torch.randn(4, channels, 7, 5)
    torch.testing.assert_close(layer.dense()(x.flatten(1)), layer(x.flatten(1)), rtol=1e-4, atol=1e-5)
    alpha = layer.project.weight.detach().reshape(6, 2, channels * 5)
    beta = layer.over_time.weight.detach()
    for unit in range(6):  # the definition, unit by unit: beta^T X alpha, summed over r
        patches = x.transpose(1, 2).flatten(2)
        told = sum(torch.einsum("t,btf,f->b", beta[unit, r], patches, alpha[unit, r]) for r in range(2))
        told = told + layer.over_time.bias.detach()[unit] if layer.over_time.bias is not None else told
        torch.testing.assert_close(layer(x.flatten(1))[:, unit].detach(), told, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(35,), (4, 1, 35), (2, 3, 35)])
def test_it_takes_what_a_linear_layer_takes(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = RankConstrained(7, 5, units=6, rank=2)
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), layer.dense()(x), rtol=1e-4, atol=1e-5)


def test_each_unit_has_its_rank_and_the_layer_is_no_bottleneck() -> None:
    torch.manual_seed(0)
    layer = RankConstrained(8, 8, units=40, rank=2)
    assert torch.linalg.matrix_rank(layer.filters(), rtol=1e-6).tolist() == [2] * 40
    assert int(torch.linalg.matrix_rank(layer.dense().weight.detach().double(), rtol=1e-6)) == 40


def test_the_start_from_a_dense_layer_is_the_best_of_its_rank_and_exact_at_full_rank() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(6 * 9, 12)
    values = torch.linalg.svdvals(dense.weight.detach().double().reshape(12, 6, 9)).square()
    x = torch.randn(5, 54)
    for rank in (1, 3, 6, 8):
        layer = RankConstrained(6, 9, units=12, rank=rank)
        error = layer.fit(dense.weight, dense.bias)
        lost = (layer.filters() - dense.weight.detach().double().reshape(12, 6, 9)).square().sum((1, 2))
        torch.testing.assert_close(lost, values[:, rank:].sum(1), rtol=1e-4, atol=1e-10)
        assert error == pytest.approx(float((values[:, rank:].sum() / values.sum()).sqrt()), abs=1e-6)
        if rank >= 6:
            torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)


def test_parameters_of_the_paper_s_layer() -> None:
    with torch.device("meta"):
        layer = RankConstrained(98, 40, units=1280, rank=2)
        assert sum(p.numel() for p in layer.parameters()) == 353_280 + 1_280
        assert sum(p.numel() for p in nn.Linear(98 * 40, 1280).parameters()) == 5_017_600 + 1_280


def test_a_stream_gives_what_the_layer_gives_on_the_last_frames_at_every_step() -> None:
    torch.manual_seed(0)
    layer, sound = RankConstrained(5, 4, units=7, rank=2), torch.randn(3, 20, 4)
    stream = FrameStream(layer, batch=3)
    padded = torch.cat((torch.zeros(3, 4, 4), sound), 1)
    for step in range(20):
        told = stream.step(sound[:, step])
        torch.testing.assert_close(told, layer(padded[:, step : step + 5].flatten(1)).detach(), rtol=1e-4, atol=1e-5)
    first = layer(padded[:, :5].flatten(1)).detach()
    assert not torch.allclose(stream.step(sound[:, 0]), first, atol=1e-3)
    stream.reset()
    torch.testing.assert_close(stream.step(sound[:, 0]), first, rtol=1e-4, atol=1e-5)


def test_a_step_of_a_stream_costs_one_frame() -> None:
    layer = RankConstrained(98, 40, units=16, rank=2)
    whole = count(Model(layer, example=(torch.zeros(1, 98 * 40),))).macs
    assert whole == 16 * 2 * (98 * 40 + 98)
    frame = count(Model(layer.project, example=(torch.zeros(1, 40),))).macs
    window = count(Model(layer.over_time, example=(torch.zeros(1, 32, 98),))).macs
    assert frame + window == 16 * 2 * (40 + 98)


def test_outputs_spread_at_the_start_as_those_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 20 * 10)
    with torch.no_grad():
        dense = torch.stack([nn.Linear(200, 200)(x) for _ in range(5)]).std()
        drawn = torch.stack([RankConstrained(20, 10, units=200, rank=3)(x) for _ in range(5)]).std()
    assert float(drawn / dense) == pytest.approx(1, rel=0.1)


def test_it_is_told_and_rebuilt() -> None:
    layer = RankConstrained(5, 4, units=7, rank=2, bias=False, channels=3)
    again = build_layer(*describe_layer(layer))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in layer.state_dict().items()}


def test_sizes_that_are_none_are_refused() -> None:
    with pytest.raises(SettingError, match="rank"):
        RankConstrained(5, 4, units=7, rank=0)
