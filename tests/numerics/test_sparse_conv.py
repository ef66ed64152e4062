"""The kernel of convolutions most of whose entries are zero, against torch's convolution (survey 29)."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from karui.numerics.columns import Geometry
from karui.numerics.kernels import has_numba
from karui.numerics.sparse_conv import compiled, entries_of, sparse_conv

pytestmark = [
    pytest.mark.paper(29),
    pytest.mark.skipif(not has_numba(), reason="numba is not installed: pip install '.[fast]'"),
]

CASES = [
    (nn.Conv1d(4, 6, 3, stride=2, dilation=3, bias=False), (31,)),
    (nn.Conv2d(6, 8, 3, bias=False), (9, 11)),
    (nn.Conv2d(6, 8, 1, bias=False), (5, 4)),
    (nn.Conv2d(6, 8, (3, 2), stride=(2, 3), dilation=(1, 2), groups=2, bias=False), (14, 13)),
    (nn.Conv2d(4, 8, 1, stride=2, groups=4, bias=False), (7, 8)),
    (nn.Conv3d(2, 3, (2, 1, 3), stride=(2, 1, 2), dilation=(1, 1, 2), bias=False), (5, 6, 9)),
    (nn.Conv2d(3, 2, 3, bias=False), (70, 66)),
]
NAMES = ["1d", "2d", "pointwise", "strided, dilated, grouped", "pointwise, strided", "3d", "several blocks"]


def sparse(layer: Any, share: float = 0.3) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight) * (torch.rand_like(layer.weight) < share))
        layer.weight[0] = 0  # a filter of which nothing is left
    return layer


def by_kernel(layer: Any, x: Tensor) -> Tensor:
    geometry = Geometry(layer.kernel_size, layer.stride, layer.dilation)
    return sparse_conv(x, entries_of(layer.weight, layer.groups), geometry)


@pytest.mark.parametrize(("layer", "space"), CASES, ids=NAMES)
def test_it_is_torchs_convolution(layer: Any, space: tuple[int, ...]) -> None:
    layer = sparse(layer)
    x = torch.randn(3, layer.in_channels, *space)
    with torch.no_grad():
        torch.testing.assert_close(by_kernel(layer, x), layer(x), rtol=1e-5, atol=1e-5)
        turned = x.transpose(0, 1).contiguous().transpose(0, 1)  # not contiguous
        torch.testing.assert_close(by_kernel(layer, turned), layer(x), rtol=1e-5, atol=1e-5)


def test_entries_that_are_zero_do_no_work() -> None:
    layer = sparse(nn.Conv2d(6, 8, 3, bias=False))
    entries = entries_of(layer.weight)
    assert len(entries.values) == len(entries.channels) == len(entries.taps) == int(torch.count_nonzero(layer.weight))
    assert entries.share == len(entries.values) / layer.weight.numel()
    nothing = entries_of(torch.zeros(2, 3, 3))
    assert torch.equal(sparse_conv(torch.randn(1, 3, 5), nothing, Geometry((3,), (1,), (1,))), torch.zeros(1, 2, 3))


def test_it_is_an_operator_that_torch_can_trace() -> None:
    layer = sparse(nn.Conv2d(6, 8, (3, 2), stride=(2, 1), bias=False))
    given = (torch.randn(2, 6, 7, 8), *entries_of(layer.weight)[:4], [3, 2], [2, 1], [1, 1])
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.karui.sparse_conv.default, given, test_utils=checks)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of registers are those of x86")
def test_its_loop_is_vectorised() -> None:
    by_kernel(sparse(nn.Conv2d(6, 8, 3, bias=False)), torch.randn(1, 6, 7, 8))
    assert any("ymm" in code or "zmm" in code for code in compiled().inspect_asm().values())
