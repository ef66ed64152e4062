"""Chains of pointwise and depthwise convolutions: equal to their dense form, and counted rightly."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from karui.layers.axes import axis_stages, chain_cost, factor_axes, factor_axes_merged
from karui.layers.factored import CONVOLUTIONS, FactoredConv
from karui.layers.flattened import FlattenedConv
from karui.measuring import count
from karui.model import Model

pytestmark = pytest.mark.paper(17)


def factors_of(conv: Any, rank: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    groups, channels = conv.groups, conv.in_channels // conv.groups
    filters = torch.randn(groups, conv.out_channels // groups, rank, dtype=torch.float64)
    axes = [torch.randn(groups, taps, rank, dtype=torch.float64) for taps in conv.kernel_size]
    return filters, torch.randn(groups, channels, rank, dtype=torch.float64), axes


def kernel_of(filters: Tensor, channels: Tensor, axes: list[Tensor]) -> Tensor:
    """The sum of outer products; `channels` of shape [groups, channels, rank], filters with or without channels."""
    made = filters if filters.ndim == 4 else filters[:, :, None] * channels[:, None]
    for axis in axes:
        made = made.unsqueeze(-2) * axis.reshape(len(axis), *[1] * (made.ndim - 2), *axis.shape[1:])
    return made.sum(-1).flatten(0, 1)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=80, deadline=None)
@given(
    kernel=st.lists(st.integers(1, 4), min_size=1, max_size=3).filter(lambda kernel: max(kernel) > 1),
    stride=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    padding=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    dilation=st.lists(st.integers(1, 2), min_size=3, max_size=3),
    groups=st.integers(1, 3),
    channels=st.integers(1, 4),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    bias=st.booleans(),
    named=st.sampled_from([None, "same", "valid"]),
    merged=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_chain_is_the_convolution_of_its_outer_products(  # noqa: PLR0917
    kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int, channels: int,
    mode: str, bias: bool, named: str | None, merged: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    dims, rank = len(kernel), 3
    conv: Any = CONVOLUTIONS[
        dims
    ](
        channels * groups,
        5 * groups,
        tuple(kernel),  # pyright: ignore[reportArgumentType]
        stride=1 if named == "same" else tuple(stride[:dims]),  # pyright: ignore[reportArgumentType]
        padding=named or tuple(padding[:dims]),  # pyright: ignore[reportArgumentType]
        dilation=tuple(dilation[:dims]),  # pyright: ignore[reportArgumentType]
        groups=groups,
        bias=bias,
        padding_mode=mode,
    ).double()
    filters, inner, axes = factors_of(conv, rank)
    if merged:
        filters = torch.randn(groups, 5, channels, rank, dtype=torch.float64)
        chain = factor_axes_merged(conv, filters, axes)
    else:
        chain = factor_axes(conv, filters, inner, axes)
    with torch.no_grad():
        conv.weight.copy_(kernel_of(filters, inner, axes))
    x = torch.randn(2, conv.in_channels, *([11] * dims), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(chain(x), conv(x))
        torch.testing.assert_close(chain.dense()(x), conv(x))
    again = FactoredConv(**json.loads(json.dumps(chain.settings()))).double()
    again.load_state_dict(chain.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), chain(x))
    assert [stage.bias is not None for stage in chain.stages] == [False] * (len(chain.stages) - 1) + [bias]
    held, macs = chain_cost(axis_stages(conv, rank, merged=merged), x.shape[2:])
    assert held == sum(stage.weight.numel() for stage in chain.stages)
    assert macs == count(Model(chain, example=(x,))).macs


def test_parameters_and_multiply_adds_follow_the_formula() -> None:
    conv = nn.Conv2d(48, 64, 5, padding=2)
    held, macs = chain_cost(axis_stages(conv, 20), (9, 7))
    assert held == 20 * (48 + 2 * 5 + 64)
    assert macs == held * 9 * 7
    assert chain_cost(axis_stages(conv, 20), (9, 7), (4, 3)) == (held, held * (9 * 7 + 4 * 3))


def test_rows_and_columns_keep_their_stride_padding_and_dilation() -> None:
    conv = nn.Conv2d(8, 8, (3, 5), stride=(2, 3), padding=(1, 2), dilation=(1, 2))
    first, rows, columns, last = axis_stages(conv, 4)
    assert (rows["kernel_size"], rows["stride"], rows["padding"], rows["dilation"]) == ([3, 1], [2, 1], [1, 0], [1, 1])
    assert (columns["kernel_size"], columns["stride"], columns["padding"]) == ([1, 5], [1, 3], [0, 2])
    assert columns["dilation"] == [1, 2]
    assert rows["groups"] == columns["groups"] == 4
    assert "stride" not in first
    assert "stride" not in last


def test_with_filters_that_are_the_unit_matrix_it_is_one_stage_of_a_flattened_convolution() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, (5, 3), padding=(2, 1), bias=False).double()
    flat = FlattenedConv(6, 8, (5, 3), stages=1, padding=(2, 1)).double()
    lateral, rows, columns = (layer for layer in flat.modules() if isinstance(layer, nn.Conv2d))
    vectors = [stage.weight.detach().flatten(1).T.unsqueeze(0) for stage in (lateral, rows, columns)]
    chain = factor_axes(conv, torch.eye(8).double().unsqueeze(0), vectors[0], vectors[1:])
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(chain(x), flat(x))
    assert math.prod(chain.stages[-1].weight.shape) == 64
