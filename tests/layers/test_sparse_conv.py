"""Convolutions that leave out zeros: torch's in everything but the work (survey 29)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from karui.layers import sparse_conv as module
from karui.layers.sparse_conv import SPARSE_CONVOLUTIONS
from karui.measuring import count
from karui.model import Model
from karui.numerics import kernels

pytestmark = pytest.mark.paper(29)

SETTINGS: Any = pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1}, {"stride": 2, "padding": 1, "bias": False}, {"dilation": 2, "groups": 2},
        {"padding": "same", "padding_mode": "reflect"}, {"padding": 1, "padding_mode": "circular", "groups": 4},
    ],
)  # fmt: skip


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many entries each call of the kernel took."""
    seen: list[int] = []

    def watched(padded: Any, entries: Any, geometry: Any) -> Any:
        seen.append(len(entries.values))
        return kernel(padded, entries, geometry)

    kernel = module.sparse_conv
    monkeypatch.setattr(module, "sparse_conv", watched)
    return seen


def pair(dims: int, share: float = 0.2, **settings: Any) -> tuple[Any, Any]:
    """A convolution of torch, and the same that leaves out zeros."""
    torch.manual_seed(0)
    conv: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    dense, light = conv(8, 12, 3, **settings).eval(), SPARSE_CONVOLUTIONS[dims](8, 12, 3, **settings).eval()
    with torch.no_grad():
        dense.weight.mul_(torch.rand_like(dense.weight) < share)
    light.load_state_dict(dense.state_dict())
    return dense, light


@SETTINGS
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_it_computes_what_torchs_does(dims: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen, (dense, light) = calls(monkeypatch), pair(dims, **settings)
    x = torch.randn(2, 8, *[7] * dims)
    with torch.no_grad():
        torch.testing.assert_close(light(x), dense(x), rtol=1e-5, atol=1e-5)
    assert seen == ([int(torch.count_nonzero(dense.weight))] if kernels.has_numba() else [])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_no_samples_at_all_are_fine(dims: int) -> None:
    dense, light = pair(dims, stride=2)
    x = torch.zeros(0, 8, *[7] * dims)
    with torch.no_grad():
        assert light(x).shape == dense(x).shape


def test_a_changed_weight_is_noticed_and_a_dense_one_goes_the_dense_way(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, (_, light) = calls(monkeypatch), pair(2)
    x = torch.randn(2, 8, 7, 7)
    with torch.no_grad():
        first = light(x)
        light.weight.mul_(2)
        torch.testing.assert_close(light(x) - light.bias[:, None, None], 2 * (first - light.bias[:, None, None]))
        light.load_state_dict({name: torch.zeros_like(value) for name, value in light.state_dict().items()})
        assert not light(x).any()
        met = len(seen)
        light.weight.fill_(1)
        light(x)
    assert len(seen) == met


def test_changes_that_torch_does_not_count_are_noticed_too() -> None:
    _, light = pair(2)
    x = torch.randn(2, 8, 7, 7)
    with torch.no_grad():
        before = light(x)
        light.weight.data.mul_(2)
        after = light(x)
        torch.testing.assert_close(after, nn.functional.conv2d(x, light.weight, light.bias), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, after)


def test_it_learns_is_exported_and_counted_as_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, (dense, light) = calls(monkeypatch), pair(2, padding=1)
    x = torch.randn(2, 8, 7, 7, requires_grad=True)
    light(x).square().sum().backward()
    dense(x).square().sum().backward()
    torch.testing.assert_close(light.weight.grad, dense.weight.grad)
    program = torch.export.export(nn.Sequential(light), (x.detach(),))
    assert "sparse_conv" not in str(program.graph)
    counted = [count(Model(one, example=(x.detach(),))).macs for one in (light, dense)]
    assert counted[0] == counted[1]
    assert not seen
