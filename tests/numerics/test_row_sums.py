"""The kernel of layers that go by tables, against its plain form (survey 19)."""

from __future__ import annotations

import platform

import pytest
import torch
from torch import nn

from karui.layers.product_quantized import QuantizedLinear
from karui.numerics import kernels as numba_kernels
from karui.numerics import row_sums as module
from karui.numerics.kernels import has_numba
from karui.numerics.row_sums import kernels, plain_row_sums, row_sums

pytestmark = pytest.mark.paper(19)

needs_numba = pytest.mark.skipif(not has_numba(), reason="numba is not installed: pip install '.[fast]'")


@needs_numba
@pytest.mark.parametrize("columns", [1, 2, 7, 64])
@pytest.mark.parametrize("parts", [1, 4, 10])
def test_the_kernel_gives_what_plain_torch_gives(parts: int, columns: int) -> None:
    torch.manual_seed(0)
    tables, codes = torch.randn(parts, 16, columns), torch.randint(16, (33, parts), dtype=torch.uint8)
    made = torch.ops.karui.row_sums(tables, codes)
    torch.testing.assert_close(made, plain_row_sums(tables, codes), rtol=1e-5, atol=1e-5)
    wide = tables.transpose(0, 2).contiguous().transpose(0, 2)  # not contiguous
    torch.testing.assert_close(torch.ops.karui.row_sums(wide, codes), made)


@needs_numba
@pytest.mark.parametrize("columns", [2, 8, 64])
def test_the_loop_of_several_columns_does_where_bags_are_not_taken(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    tables, codes = torch.randn(19, 16, columns), torch.randint(16, (33, 19), dtype=torch.uint8)
    monkeypatch.setattr(module, "_BAGS", False)
    made = torch.ops.karui.row_sums(tables, codes)
    torch.testing.assert_close(made, plain_row_sums(tables, codes), rtol=1e-5, atol=1e-5)


@needs_numba
@pytest.mark.parametrize("inference", [False, True])
def test_codes_that_change_are_seen(inference: bool) -> None:
    torch.manual_seed(0)
    tables = torch.randn(4, 16, 8)
    with torch.inference_mode(inference):
        codes = torch.randint(16, (33, 4), dtype=torch.uint8)
        for _ in range(2):
            made = row_sums(tables, codes)
            torch.testing.assert_close(made, plain_row_sums(tables, codes), rtol=1e-5, atol=1e-5)
            codes.copy_(torch.randint(16, (33, 4), dtype=torch.uint8))
        other = codes[:7]  # the same memory, fewer rows
        torch.testing.assert_close(row_sums(tables, other), plain_row_sums(tables, other), rtol=1e-5, atol=1e-5)


@needs_numba
def test_it_is_an_operator_that_torch_can_trace() -> None:
    torch.manual_seed(0)
    tables, codes = torch.randn(4, 16, 8), torch.randint(16, (5, 4), dtype=torch.uint8)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.karui.row_sums.default, (tables, codes), test_utils=checks)


@needs_numba
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of registers are those of x86")
def test_its_loop_is_vectorised() -> None:
    several = kernels()[0]
    several(torch.randn(4, 16, 8).numpy(), torch.zeros(5, 4, dtype=torch.uint8).numpy(), torch.empty(5, 8).numpy())
    (assembly,) = kernels()[0].inspect_asm().values()
    assert "ymm" in assembly or "zmm" in assembly or "addps" in assembly


def test_without_numba_and_where_gradients_are_wanted_it_is_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tables, codes = torch.randn(4, 16, 8, requires_grad=True), torch.randint(16, (5, 4), dtype=torch.uint8)
    row_sums(tables, codes).sum().backward()
    assert tables.grad is not None
    wanted = row_sums(tables.detach(), codes)
    monkeypatch.setattr(numba_kernels, "has_numba", lambda: False)

    def refused() -> None:
        raise AssertionError("the kernel was asked for")

    monkeypatch.setattr(module, "kernels", refused)
    torch.testing.assert_close(row_sums(tables.detach(), codes), wanted)


@needs_numba
def test_a_layer_exports_and_compiles_around_it() -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear(16, 10, subspaces=4, codewords=8, lookup=True).eval()
    layer.codes.copy_(torch.randint(8, (10, 4)))
    x = torch.randn(3, 16)
    program = torch.export.export(nn.Sequential(layer), (x,))
    assert "row_sums" not in str(program.graph)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-5)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
