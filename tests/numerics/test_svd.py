"""Truncated SVD is the best of its rank, and each policy keeps what it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karui.errors import SettingError
from karui.numerics.svd import Energy, Error, Fixed, Parameters, Vbmf, Worth, factored_size, saves, truncated_svd

pytestmark = pytest.mark.paper(11)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(2, 12), columns=st.integers(2, 12), seed=st.integers(0, 1000), data=st.data())
def test_errors_are_the_discarded_values_and_no_random_matrix_beats_them(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    rank = data.draw(st.integers(1, min(rows, columns)))
    found = truncated_svd(matrix, rank)
    difference = matrix - found.matrix()
    lost = float(found.discarded.square().sum())
    assert float(difference.square().sum()) == pytest.approx(lost, abs=1e-10)
    spectral = float(found.discarded[0]) if len(found.discarded) else 0.0
    assert float(torch.linalg.matrix_norm(difference, 2)) == pytest.approx(spectral, abs=1e-9)
    assert found.error == pytest.approx((lost / float(matrix.square().sum())) ** 0.5, abs=1e-9)
    for _ in range(5):
        left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
        # The best right factor for a random left one: even so it does not win.
        rival = left @ torch.linalg.lstsq(left, matrix).solution
        assert float((matrix - rival).norm()) >= lost**0.5 - 1e-9


@pytest.mark.parametrize("balanced", [False, True])
def test_both_splits_are_the_same_function(balanced: bool) -> None:
    matrix = torch.randn(9, 7, dtype=torch.float64)
    found = truncated_svd(matrix, 4)
    left, right = found.factors(balanced=balanced)
    torch.testing.assert_close(left @ right, found.matrix())
    if balanced:
        torch.testing.assert_close(left.T @ left, right @ right.T)
    else:
        torch.testing.assert_close(left.T @ left, torch.eye(4, dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(0.01, 100), min_size=1, max_size=30),
    share=st.floats(0.01, 1.0),
    squared=st.booleans(),
)
def test_energy_rule_is_minimal(values: list[float], share: float, squared: bool) -> None:
    spectrum = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    rank = Energy(share, squared=squared)(spectrum, (len(values), len(values)))
    mass = spectrum**2 if squared else spectrum
    total = float(mass.sum())
    assert float(mass[:rank].sum()) >= share * total * (1 - 1e-9)
    assert rank == 1 or float(mass[: rank - 1].sum()) < share * total


def test_sum_and_squares_are_different_rules() -> None:
    spectrum = torch.tensor([10.0, 5.0, 5.0, 5.0])
    assert Energy(0.75)(spectrum, (4, 4)) == 3
    assert Energy(0.75, squared=True)(spectrum, (4, 4)) == 3
    assert Energy(0.55)(spectrum, (4, 4)) == 2
    assert Energy(0.55, squared=True)(spectrum, (4, 4)) == 1


def test_other_policies() -> None:
    spectrum = torch.linspace(10, 1, 20)
    assert Fixed(7)(spectrum, (20, 50)) == 7
    assert Fixed(70)(spectrum, (20, 50)) == 20
    rank = Parameters(0.4)(spectrum, (20, 50))
    assert factored_size((20, 50), rank) <= 0.4 * 1000 < factored_size((20, 50), rank + 1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20, 50, generator=generator)
    signal = 3 * torch.randn(20, 3, generator=generator) @ torch.randn(3, 50, generator=generator)
    assert Vbmf()(torch.linalg.svdvals(noise + signal), (20, 50)) == 3
    assert Vbmf()(torch.linalg.svdvals(noise), (20, 50)) == 1


@pytest.mark.parametrize("limit", [0.02, 0.3, 0.7, 0.999])
def test_the_error_is_kept_to_and_no_rank_is_wasted(limit: float) -> None:
    matrix = torch.randn(12, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rank = Error(limit)(torch.linalg.svdvals(matrix), (12, 30))
    assert truncated_svd(matrix, rank).error <= limit
    assert rank == 1 or truncated_svd(matrix, rank - 1).error > limit


def test_one_threshold_spends_a_budget_best() -> None:
    """Of all pairs of ranks that cost no more, none keeps a larger sum of the two matrices' shares of energy."""
    shapes = ((8, 20), (12, 6))
    spectra = [torch.linspace(5, 1, 8) ** 2, torch.linspace(3, 1, 6)]

    def spent(ranks: list[int]) -> int:
        return sum(factored_size(shape, rank) for shape, rank in zip(shapes, ranks, strict=True))

    def held(ranks: list[int]) -> float:
        return sum(float(s[:r].square().sum() / s.square().sum()) for s, r in zip(spectra, ranks, strict=True))

    for threshold in (0.02, 0.01, 0.005, 0.002, 0.001):
        ranks = [Worth(threshold)(s, shape) for s, shape in zip(spectra, shapes, strict=True)]
        rivals = [[a, b] for a in range(1, 9) for b in range(1, 7) if spent([a, b]) <= spent(ranks)]
        assert held(ranks) == pytest.approx(max(held(rival) for rival in rivals))


def test_saving_is_told_from_growing() -> None:
    assert saves((64, 64), 31)
    assert not saves((64, 64), 32)


@pytest.mark.parametrize("rank", [0, 5])
def test_impossible_ranks_are_refused(rank: int) -> None:
    with pytest.raises(SettingError, match="rank"):
        truncated_svd(torch.zeros(4, 6), rank)
