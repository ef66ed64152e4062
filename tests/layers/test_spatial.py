"""Convolutions split over space equal their dense form for every stride, padding, dilation, grouping and kernel."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from karui.layers.factored import CONVOLUTIONS, FactoredConv
from karui.layers.spatial import split_space
from karui.lowrank._split import joined_kernels, split_full, split_kernels
from karui.numerics.unfold import split_groups


# A remark of torch on the speed of even kernels, which are drawn on purpose.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=60, deadline=None)
@given(
    dimensions=st.integers(2, 3),
    kernel=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    stride=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    padding=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    dilation=st.lists(st.integers(1, 2), min_size=3, max_size=3),
    groups=st.integers(1, 3),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    bias=st.booleans(),
    named=st.sampled_from([None, "same", "valid"]),
    outer=st.booleans(),
    seed=st.integers(0, 99),
)
def test_split_chain_equals_its_convolution(  # noqa: PLR0917
    dimensions: int, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    groups: int, mode: Any, bias: bool, named: str | None, outer: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    told: dict[str, Any] = {"stride": tuple(stride[:dimensions]), "padding": tuple(padding[:dimensions])}
    if named is not None:
        told = {"padding": named} if named == "same" else {**told, "padding": named}
    conv: Any = CONVOLUTIONS[dimensions](
        2 * groups, 3 * groups, tuple(kernel[:dimensions]), dilation=tuple(dilation[:dimensions]), groups=groups,
        padding_mode=mode, bias=bias, **told,
    ).double()  # fmt: skip
    kernels = split_groups(conv.weight.detach(), groups)
    full = min(2 * kernel[0], 3 * kernels[0, 0, 0, 0].numel())
    vertical, horizontal = split_kernels(kernels, full)
    torch.testing.assert_close(joined_kernels(vertical, horizontal), kernels)
    mix = torch.eye(3).double().expand(groups, 3, 3) if outer else None
    chain = split_space(conv, vertical, horizontal, outer=mix)
    x = torch.randn(2, 2 * groups, *(9, 10, 11)[:dimensions], dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(chain(x), conv(x))
    assert [stage.bias is not None for stage in chain] == [False] * (1 + outer) + [bias]
    again = FactoredConv(**json.loads(json.dumps(chain.settings()))).double()
    again.load_state_dict(chain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(x), chain(x))


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_strides_and_padding_go_with_what_a_factor_sees_and_the_dense_form_is_found(mode: Any) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, (3, 5), stride=(2, 3), padding=(1, 2), padding_mode=mode).double()
    vertical, horizontal = split_kernels(conv.weight.detach()[None], 5)
    chain = split_space(conv, vertical, horizontal)
    tall, wide = chain.stages
    assert (tall.kernel_size, tall.stride, tall.padding) == ((3, 1), (2, 1), (1, 0))
    assert (wide.kernel_size, wide.stride, wide.padding) == ((1, 5), (1, 3), (0, 2))
    dense: Any = chain.dense()
    torch.testing.assert_close(dense.weight.detach(), joined_kernels(vertical, horizontal)[0])
    x = torch.randn(1, 4, 11, 13).double()
    with torch.no_grad():
        torch.testing.assert_close(dense(x), chain(x))


def test_kernels_without_two_dimensions_have_nothing_to_split() -> None:
    assert split_full(8, 8, (3,)) == split_full(8, 8, (3, 1)) == split_full(8, 8, (1, 3)) == 0
    assert split_full(8, 4, (3, 5)) == 20
