"""The kernel of SVD-softmax's full view, against its plain form (survey 25)."""

from __future__ import annotations

import platform

import pytest
import torch

from karui.layers.svd_softmax import SvdSoftmaxHead
from karui.numerics import full_view as module
from karui.numerics import kernels as numba_kernels
from karui.numerics.full_view import full_view, kernel, largest, plain_full_view
from karui.numerics.kernels import has_numba

pytestmark = pytest.mark.paper(25)

needs_numba = pytest.mark.skipif(not has_numba(), reason="numba is not installed: pip install '.[fast]'")


def drawn(*batch: int, words: int = 700, width: int = 27) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(*batch, words), torch.randn(words, width), torch.randn(*batch, width)


def by_word(found: tuple[torch.Tensor, torch.Tensor], words: int) -> torch.Tensor:
    """Values in the places of their words."""
    return torch.zeros(*found[0].shape[:-1], words).scatter(-1, found[1], found[0])


@needs_numba
@pytest.mark.parametrize("count", [1, 20, 87, 88, 700])
@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3)])
def test_the_kernel_gives_what_plain_torch_gives(batch: tuple[int, ...], count: int) -> None:
    given = drawn(*batch)
    made, wanted = torch.ops.karui.full_view(*given, count), plain_full_view(*given, count)
    torch.testing.assert_close(by_word(made, 700), by_word(wanted, 700), rtol=1e-5, atol=1e-5)
    assert made[1].sort().values.equal(wanted[1].sort().values)
    wide = (given[0], given[1].T.contiguous().T, given[2])  # not contiguous
    torch.testing.assert_close(torch.ops.karui.full_view(*wide, count), made)


@pytest.mark.parametrize("count", [1, 10, 100, 125])
@pytest.mark.parametrize("kind", ["normal", "rising", "falling", "equal", "hidden from the sample", "not a number"])
def test_the_largest_are_found_whatever_a_sample_sees(kind: str, count: int) -> None:
    torch.manual_seed(0)
    values = torch.randn(1000)
    if kind in ("rising", "falling"):
        values = values.sort(descending=kind == "falling").values
    elif kind == "equal":
        values = torch.zeros(1000)
    elif kind == "hidden from the sample":
        values[::16] += 100  # all that the sample sees is larger than anything else
    elif kind == "not a number":
        values[7] = float("nan")
    found, places = largest(values, count)
    assert len(set(places.tolist())) == count
    torch.testing.assert_close(found, values[places], equal_nan=True)
    torch.testing.assert_close(found.sort().values, values.topk(count).values.sort().values, equal_nan=True)


@needs_numba
def test_it_is_an_operator_that_torch_can_trace() -> None:
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.karui.full_view.default, (*drawn(5), 20), test_utils=checks)


@needs_numba
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of registers are those of x86")
def test_its_loop_is_vectorised() -> None:
    torch.ops.karui.full_view(*drawn(5), 20)
    (assembly, *_) = kernel().inspect_asm().values()
    assert "ymm" in assembly or "zmm" in assembly or "addps" in assembly


def test_without_numba_and_where_gradients_are_wanted_it_is_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    previews, rest, remaining = drawn(5)
    remaining.requires_grad_()
    full_view(previews, rest, remaining, 20)[0].sum().backward()
    assert remaining.grad is not None
    given = previews, rest, remaining.detach()
    wanted = by_word(full_view(*given, 20), 700)
    monkeypatch.setattr(numba_kernels, "has_numba", lambda: False)

    def refused() -> None:
        raise AssertionError("the kernel was asked for")

    monkeypatch.setattr(module, "kernel", refused)
    torch.testing.assert_close(by_word(full_view(*given, 20), 700), wanted, rtol=1e-5, atol=1e-5)


@needs_numba
def test_a_layer_exports_and_compiles_around_it() -> None:
    torch.manual_seed(0)
    head = SvdSoftmaxHead.from_linear(torch.nn.Linear(32, 700), window=8, full_view=30).eval()
    x = torch.randn(3, 32)
    program = torch.export.export(torch.nn.Sequential(head), (x,))
    assert "full_view" not in str(program.graph)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), head(x), rtol=1e-5, atol=1e-5)
        compiled = torch.compile(head, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), head(x), rtol=1e-5, atol=1e-5)
