"""Factored layers equal their dense form for every stride, padding, dilation, grouping and kernel."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from karui.errors import SurgeryError
from karui.layers.factored import (
    CONVOLUTIONS,
    FactoredConv,
    FactoredLinear,
    FullMapLinear,
    as_conv,
    conv_settings,
    factor_conv,
    factor_full_map,
    factor_linear,
)
from karui.numerics.svd import truncated_svd
from karui.numerics.tucker import tucker2
from karui.numerics.unfold import split_groups


def assert_same(a: nn.Module, b: nn.Module, x: torch.Tensor, tolerance: float = 1e-9) -> None:
    with torch.no_grad():
        torch.testing.assert_close(a(x), b(x), rtol=tolerance, atol=tolerance)


def rebuilt(layer: Any) -> nn.Module:
    again = type(layer)(**json.loads(json.dumps(layer.settings()))).double()
    again.load_state_dict(layer.state_dict())
    return again


# A remark of torch on the speed of even kernels, which are drawn on purpose.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=60, deadline=None)
@given(
    dimensions=st.integers(1, 3),
    kernel=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    stride=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    padding=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    dilation=st.lists(st.integers(1, 2), min_size=3, max_size=3),
    groups=st.integers(1, 3),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    bias=st.booleans(),
    named=st.sampled_from([None, "same", "valid"]),
    full=st.booleans(),
    seed=st.integers(0, 99),
)
def test_channel_chain_equals_its_dense_convolution(  # noqa: PLR0917
    dimensions: int, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    groups: int, mode: str, bias: bool, named: str | None, full: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    conv = CONVOLUTIONS[
        dimensions
    ](
        4 * groups,
        6 * groups,
        tuple(kernel[:dimensions]),  # pyright: ignore[reportArgumentType]
        stride=1 if named == "same" else tuple(stride[:dimensions]),  # pyright: ignore[reportArgumentType]
        padding=named or tuple(padding[:dimensions]),  # pyright: ignore[reportArgumentType]
        dilation=tuple(dilation[:dimensions]),  # pyright: ignore[reportArgumentType]
        groups=groups,
        bias=bias,
        padding_mode=mode,
    ).double()
    ranks = (6, 4) if full else (3, 2)
    parts = [tucker2(block, *ranks) for block in split_groups(conv.weight.detach(), groups)]
    inner, core, outer = (torch.stack([getattr(part, name) for part in parts]) for name in ("inner", "core", "outer"))
    chain = factor_conv(conv, core, inner=inner, outer=outer)
    x = torch.randn(2, conv.in_channels, *([11] * dimensions), dtype=torch.float64)
    if full:
        assert_same(chain, conv, x)
    assert_same(chain, chain.dense(), x)
    assert_same(rebuilt(chain), chain, x)
    assert [stage.bias is not None for stage in chain.stages] == [False, False, bias]
    assert chain.stages[0].stride == chain.stages[2].stride == (1,) * dimensions
    size = groups * (4 * ranks[1] + core[0, 0, 0].numel() * ranks[0] * ranks[1] + 6 * ranks[0])
    assert sum(p.numel() for p in chain.parameters()) == size + (6 * groups if bias else 0)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 4),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2]),
)
def test_separable_chain_equals_its_dense_convolution(
    size: int, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], groups: int
) -> None:
    """Row settings on the vertical factor, column settings on the horizontal one."""
    rows = {"in_channels": 4, "out_channels": 6, "kernel_size": (size, 1), "stride": (stride[0], 1),
            "padding": (padding[0], 0), "dilation": (dilation[0], 1), "groups": groups, "bias": False}  # fmt: skip
    columns = {"in_channels": 6, "out_channels": 8, "kernel_size": (1, size), "stride": (1, stride[1]),
               "padding": (0, padding[1]), "dilation": (1, dilation[1]), "groups": groups}  # fmt: skip
    chain = FactoredConv([rows, columns]).double()
    x = torch.randn(2, 4, 12, 13, dtype=torch.float64)
    assert_same(chain, chain.dense(), x)


def test_stages_that_no_single_layer_equals_are_refused() -> None:
    spatial = {"in_channels": 2, "out_channels": 2, "kernel_size": 3, "padding": 1}
    with pytest.raises(SurgeryError, match="blurred"):
        FactoredConv([{**spatial, "bias": False}, spatial]).dense()
    with pytest.raises(SurgeryError, match="sees space"):
        FactoredConv([{**spatial, "padding": "same", "bias": False}, {**spatial, "padding": 0}]).dense()
    rows = {**spatial, "kernel_size": (3, 1), "padding": (1, 0), "padding_mode": "reflect", "bias": False}
    with pytest.raises(SurgeryError, match="more than one way"):
        FactoredConv([rows, {**spatial, "kernel_size": (1, 3), "padding": (0, 1)}]).dense()
    with pytest.raises(SurgeryError, match="bias"):
        FactoredConv([spatial, spatial])


def test_factors_may_be_left_out() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1).double()
    whole = tucker2(conv.weight.detach(), 6, 4)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    no_inner = factor_conv(conv, tucker2(conv.weight.detach(), 6, 4).core[None], outer=whole.outer[None])
    assert len(no_inner.stages) == 2
    core = torch.einsum("qpij,cp->qcij", whole.core, whole.inner)
    assert_same(factor_conv(conv, core[None], outer=whole.outer[None]), conv, x)
    core = torch.einsum("qpij,nq->npij", whole.core, whole.outer)
    assert_same(factor_conv(conv, core[None], inner=whole.inner[None]), conv, x)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_pair(bias: bool) -> None:
    linear = nn.Linear(9, 7, bias=bias).double()
    svd = truncated_svd(linear.weight.detach(), 7)
    pair = factor_linear(linear, *svd.factors())
    x = torch.randn(3, 5, 9, dtype=torch.float64)
    assert_same(pair, linear, x)
    assert_same(pair.dense(), linear, x)
    assert_same(rebuilt(pair), linear, x)
    narrow = factor_linear(linear, *truncated_svd(linear.weight.detach(), 2).factors())
    assert sum(p.numel() for p in narrow.parameters()) == 2 * (9 + 7) + (7 if bias else 0)
    assert_same(narrow, narrow.dense(), x)


def test_full_map_linear_equals_the_linear_layer() -> None:
    shape = (5, 3, 2)
    linear = nn.Linear(30, 8).double()
    conv = as_conv(linear, shape)
    found = tucker2(conv.weight.detach(), 8, 5)
    layer = factor_full_map(linear, shape, found.core, inner=found.inner, outer=found.outer)
    x = torch.randn(4, 30, dtype=torch.float64)
    assert_same(layer, linear, x)
    assert_same(layer.dense(), linear, x)
    assert_same(rebuilt(layer), linear, x)
    assert isinstance(layer, FullMapLinear)


def test_the_new_layer_takes_type_mode_and_frozenness_and_leaves_the_old_alone() -> None:
    conv = nn.Conv2d(4, 6, 3).half().eval()
    conv.requires_grad_(False)
    before = copy.deepcopy(conv.state_dict())
    found = tucker2(conv.weight, 2, 2)
    chain = factor_conv(conv, found.core[None], inner=found.inner[None], outer=found.outer[None])
    assert {p.dtype for p in chain.parameters()} == {torch.float16}
    assert not chain.training
    assert not any(p.requires_grad for p in chain.parameters())
    assert all(torch.equal(before[name], value) for name, value in conv.state_dict().items())


def test_settings_are_json_and_name_everything() -> None:
    conv = nn.Conv2d(4, 6, (3, 2), stride=2, padding="valid", dilation=2, groups=2, bias=False, padding_mode="reflect")
    again = nn.Conv2d(**json.loads(json.dumps(conv_settings(conv))))
    assert conv_settings(again) == conv_settings(conv)
    assert FactoredLinear(4, 2, 3, bias=False).settings() == {
        "in_features": 4, "rank": 2, "out_features": 3, "bias": False,
    }  # fmt: skip
