"""Mixtures of separable filters equal their dense form for every stride, padding, dilation, grouping and kernel."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karui.layers.factored import CONVOLUTIONS
from karui.layers.separable_bank import SeparableBank, outer, separable_bank


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
    shared=st.booleans(),
    seed=st.integers(0, 99),
)
def test_mixture_equals_its_convolution(  # noqa: PLR0917
    dimensions: int, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    groups: int, mode: Any, bias: bool, named: str | None, shared: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    told: dict[str, Any] = {"stride": tuple(stride[:dimensions]), "padding": tuple(padding[:dimensions])}
    if named is not None:
        told = {"padding": named} if named == "same" else {**told, "padding": named}
    conv: Any = CONVOLUTIONS[dimensions](
        2 * groups, 3 * groups, tuple(kernel[:dimensions]), dilation=tuple(dilation[:dimensions]), groups=groups,
        padding_mode=mode, bias=bias, **told,
    ).double()  # fmt: skip
    sets = 1 if shared else 2 * groups
    factors = [torch.randn(sets, 2, taps).double() for taps in kernel[:dimensions]]
    mix = torch.randn(3 * groups, 2, 2).double()
    basis = outer(factors).expand(2 * groups, *[-1] * (dimensions + 1)).unflatten(0, (groups, 2))
    with torch.no_grad():
        weight = torch.einsum("gncm,gcm...->gnc...", mix.unflatten(0, (groups, 3)), basis)
        conv.weight.copy_(weight.flatten(0, 1))
    layer = separable_bank(conv, factors, mix)
    x = torch.randn(2, 2 * groups, *(9, 10, 11)[:dimensions], dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), conv(x))
        torch.testing.assert_close(layer.kernel(), conv.weight)
        dense: Any = layer.dense()
        torch.testing.assert_close(dense(x), conv(x))
    again = SeparableBank(**json.loads(json.dumps(layer.settings()))).double()
    again.load_state_dict(layer.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(x), layer(x))


@pytest.mark.parametrize("shared", [True, False])
def test_shared_filters_are_stored_once_and_all_parts_learn(shared: bool) -> None:
    layer = SeparableBank(8, 6, (3, 5), rank=2, shared=shared, bias=False)
    sizes = sum(p.numel() for p in layer.parameters())
    assert sizes == (1 if shared else 8) * 2 * (3 + 5) + 8 * 2 * 6
    layer(torch.randn(1, 8, 9, 9)).square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in layer.parameters())
