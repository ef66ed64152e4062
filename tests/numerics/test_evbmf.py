"""EVBMF finds the rank and the noise that were planted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from karui.numerics.evbmf import evbmf, evbmf_of_values, singular_values

pytestmark = pytest.mark.paper(12)


def planted(rows: int, columns: int, rank: int, noise: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return normal(rows, rank) @ normal(rank, columns) + noise * normal(rows, columns)


@pytest.mark.parametrize(
    ("rows", "columns", "rank", "noise"), [(64, 288, 5, 0.5), (64, 288, 20, 0.5), (100, 900, 10, 1.0)]
)
def test_planted_rank_and_noise_are_recovered(rows: int, columns: int, rank: int, noise: float) -> None:
    found = [evbmf(planted(rows, columns, rank, noise, seed)) for seed in range(10)]
    assert [one.rank for one in found] == [rank] * 10
    # Single draws scatter: the worst of these thirty is 5.5 % off.
    assert sum(one.variance for one in found) / 10 == pytest.approx(noise**2, rel=0.05)
    assert all(one.variance == pytest.approx(noise**2, rel=0.07) for one in found)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("rows", "columns"), [(64, 288), (100, 900), (30, 30)])
def test_pure_noise_has_rank_zero(rows: int, columns: int, seed: int) -> None:
    found = evbmf(planted(rows, columns, 1, 0.7, seed) - planted(rows, columns, 1, 0.0, seed))
    assert found.rank == 0
    assert found.values.numel() == 0


@pytest.mark.parametrize("scale", [1e-6, 3.0, 1e6])
def test_scale_does_not_matter(scale: float) -> None:
    matrix = planted(48, 200, 7, 0.8, 3)
    plain, scaled = evbmf(matrix), evbmf(scale * matrix)
    assert plain.rank == scaled.rank
    assert scaled.variance == pytest.approx(scale**2 * plain.variance, rel=1e-6)
    torch.testing.assert_close(scaled.values, scale * plain.values, rtol=1e-6, atol=0)


def test_orientation_does_not_matter() -> None:
    matrix = planted(48, 200, 7, 0.8, 4)
    plain, turned = evbmf(matrix), evbmf(matrix.T)
    assert plain.rank == turned.rank
    assert turned.variance == pytest.approx(plain.variance, rel=1e-6)


def test_noise_variance_minimises_the_free_energy() -> None:
    """The search is global: no variance on a fine grid has a lower free energy, written here from the formula."""
    matrix = planted(40, 100, 6, 1.5, 5)
    values = torch.linalg.svdvals(matrix)
    long, a = 100, 40 / 100
    edge = 2.5129 * a**0.5
    threshold = (1 + edge) * (1 + a / edge)

    def free_energy(variance: float) -> float:
        total = 0.0
        for s in values.tolist():
            x = torch.tensor(s**2 / (long * variance), dtype=torch.float64)
            total += float(x - x.log())
            if x > threshold:
                tau = (x - (1 + a) + ((x - (1 + a)) ** 2 - 4 * a).sqrt()) / 2
                total += float((tau + 1).log() + a * (tau / a + 1).log() - tau)
        return total

    found = evbmf(matrix).variance
    best = min(free_energy(found * factor) for factor in torch.linspace(0.3, 3, 400).tolist())
    assert free_energy(found) <= best + 1e-6


def test_shrunk_values_lie_below_the_seen_ones_and_follow_the_formula() -> None:
    matrix = planted(64, 288, 5, 0.5, 6)
    found = evbmf(matrix)
    seen = torch.linalg.svdvals(matrix)[: found.rank]
    inner = 1 - (64 + 288) * found.variance / seen**2
    expected = seen / 2 * (inner + (inner**2 - 4 * 64 * 288 * found.variance**2 / seen**4).sqrt())
    torch.testing.assert_close(found.values, expected)
    assert bool((found.values < seen).all())


@pytest.mark.parametrize("shape", [(7, 30), (30, 7), (1, 4)])
def test_singular_values_by_the_gram_matrix(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(singular_values(matrix), torch.linalg.svdvals(matrix))


def test_matrices_without_noise_or_without_anything() -> None:
    exact = planted(30, 80, 4, 0.0, 7)
    assert evbmf(exact).rank == 4
    assert evbmf(torch.zeros(5, 9)).rank == 0
    assert evbmf(torch.ones(1, 1)).rank in (0, 1)
    assert evbmf_of_values(torch.tensor([3.0]), (1, 50)).rank in (0, 1)
