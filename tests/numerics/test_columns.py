"""The kernel that gathers rows of the patch matrix, against its plain form and against torch's unfold (survey 26)."""

from __future__ import annotations

import platform

import pytest
import torch
from torch import Tensor, nn

from karui.layers.group_sparse import GroupSparseConv
from karui.numerics import columns as module
from karui.numerics import kernels as numba_kernels
from karui.numerics.columns import Geometry, compiled, patch_rows, plain_patch_rows
from karui.numerics.kernels import has_numba

pytestmark = pytest.mark.paper(26)

needs_numba = pytest.mark.skipif(not has_numba(), reason="numba is not installed: pip install '.[fast]'")

CASES = [
    ((3, 11), Geometry((3,), (2,), (2,))),
    ((4, 9, 7), Geometry((3, 2), (1, 1), (1, 1))),
    ((4, 9, 11), Geometry((2, 3), (1, 3), (2, 1))),
    ((2, 5, 6, 7), Geometry((2, 1, 3), (2, 1, 2), (1, 1, 2))),
]


def asked(channels: int, taps: int) -> tuple[Tensor, list[int]]:
    """A few channels at every second position of the kernel."""
    counts = [channels - 1 if tap % 2 == 0 else 0 for tap in range(taps)]
    rows = [torch.randperm(channels)[:count] for count in counts]
    return torch.cat(rows).int(), counts


@needs_numba
@pytest.mark.parametrize(("shape", "geometry"), CASES, ids=["1d", "2d", "strided, dilated", "3d"])
def test_the_kernel_gives_what_plain_torch_gives(shape: tuple[int, ...], geometry: Geometry) -> None:
    torch.manual_seed(0)
    channels, counts = asked(shape[0], torch.Size(geometry.kernel).numel())
    x = torch.randn(2, *shape)
    plain = plain_patch_rows(x, channels, counts, geometry)
    assert torch.equal(torch.ops.karui.patch_rows(x, channels, counts, *map(list, geometry)), plain)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)  # not contiguous
    assert torch.equal(torch.ops.karui.patch_rows(turned, channels, counts, *map(list, geometry)), plain)


def test_all_rows_are_torchs_unfold() -> None:
    torch.manual_seed(0)
    x, geometry = torch.randn(2, 3, 7, 8), Geometry((3, 2), (2, 1), (1, 2))
    made = patch_rows(x, torch.arange(3).repeat(6).int(), [3] * 6, geometry)
    unfolded = nn.functional.unfold(x, (3, 2), dilation=(1, 2), stride=(2, 1))
    by_tap = unfolded.unflatten(1, (3, 6)).transpose(1, 2).flatten(1, 2)
    assert torch.equal(made.flatten(2), by_tap)


@needs_numba
def test_it_is_an_operator_that_torch_can_trace() -> None:
    channels, counts = asked(3, 6)
    given = (torch.randn(2, 3, 7, 8), channels, counts, [3, 2], [1, 1], [1, 1])
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.karui.patch_rows.default, given, test_utils=checks)


@needs_numba
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of registers are those of x86")
def test_its_loop_is_vectorised() -> None:
    channels, counts = asked(3, 6)
    patch_rows(torch.randn(1, 3, 7, 8), channels, counts, Geometry((3, 2), (1, 1), (1, 1)))
    assert any("ymm" in code or "zmm" in code or "movups" in code for code in compiled().inspect_asm().values())


def test_without_numba_and_where_gradients_are_wanted_it_is_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = GroupSparseConv(4, 6, (3, 3), live=[[2, 0, 1, 0, 4, 0, 1, 0, 2]], padding=(1, 1))
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    wanted = layer(x.detach())
    monkeypatch.setattr(numba_kernels, "has_numba", lambda: False)

    def refused() -> None:
        raise AssertionError("the kernel was asked for")

    monkeypatch.setattr(module, "compiled", refused)
    torch.testing.assert_close(layer(x.detach()), wanted)
