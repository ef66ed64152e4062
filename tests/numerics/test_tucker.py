"""Tucker-2: exact at full rank, orthonormal, monotone, within its bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karui.errors import SettingError
from karui.numerics.tucker import tucker2
from karui.numerics.unfold import unfold

pytestmark = pytest.mark.paper(12)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 3)),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_laws_of_the_decomposition(shape: tuple[int, ...], seed: int, data: st.DataObject) -> None:
    kernel = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rank_out, rank_in = data.draw(st.integers(1, shape[0])), data.draw(st.integers(1, shape[1]))
    found = tucker2(kernel, rank_out, rank_in)
    eye = torch.eye(max(rank_out, rank_in), dtype=torch.float64)
    torch.testing.assert_close(found.outer.T @ found.outer, eye[:rank_out, :rank_out])
    torch.testing.assert_close(found.inner.T @ found.inner, eye[:rank_in, :rank_in])

    total = float(kernel.square().sum())
    error = float((kernel - found.kernel()).square().sum())
    assert float(found.core.square().sum()) == pytest.approx(total - error, rel=1e-9)
    assert found.error**2 * total == pytest.approx(error, abs=1e-9 * total)
    assert list(found.errors) == sorted(found.errors, reverse=True)

    lost = sum(
        float(torch.linalg.svdvals(unfold(kernel, (mode,)))[rank:].square().sum())
        for mode, rank in ((0, rank_out), (1, rank_in))
    )
    assert error <= lost + 1e-9 * total


def test_full_ranks_are_exact() -> None:
    kernel = torch.randn(12, 7, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(tucker2(kernel, 12, 7).kernel(), kernel)


def test_planted_ranks_are_found_and_hooi_beats_hosvd_on_noise() -> None:
    generator = torch.Generator().manual_seed(1)
    outer, inner = torch.randn(20, 4, generator=generator), torch.randn(16, 3, generator=generator)
    planted = torch.einsum("nq,cp,qpij->ncij", outer, inner, torch.randn(4, 3, 3, 3, generator=generator))
    assert tucker2(planted, 4, 3).error < 1e-6
    noise = torch.randn(20, 16, 3, 3, generator=generator)
    refined = tucker2(noise, 6, 5)
    assert len(refined.errors) > 2
    assert refined.error < tucker2(noise, 6, 5, sweeps=0).error


def test_one_and_three_dimensions_of_space() -> None:
    for shape in ((6, 5, 3), (6, 5, 2, 3, 2), (6, 5)):
        kernel = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(tucker2(kernel, 6, 5).kernel(), kernel)
        assert tucker2(kernel, 2, 3).core.shape == (2, 3, *shape[2:])


def test_a_kernel_of_zeros_has_no_error() -> None:
    assert tucker2(torch.zeros(4, 3, 3, 3), 1, 1).error == 0.0


def test_impossible_ranks_are_refused() -> None:
    with pytest.raises(SettingError, match="rank_out"):
        tucker2(torch.zeros(4, 3, 3, 3), 5, 1)
    with pytest.raises(SettingError, match="rank_in"):
        tucker2(torch.zeros(4, 3, 3, 3), 1, 0)
