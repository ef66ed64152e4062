"""Banks as mixtures of separable filters by the nuclear norm (survey 13, 14)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from karui.errors import SettingError
from karui.numerics.proximal import shrink, shrink_singular_values
from karui.numerics.separable import by_nuclear_norm, exact_filters, mixed, outer_products, rank_one, spread

pytestmark = [pytest.mark.paper(13), pytest.mark.paper(14)]


def planted(bank: int, count: int, taps: tuple[int, ...], seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    factors = [torch.randn(count, size).double() for size in taps]
    return torch.einsum("jk,k...->j...", torch.randn(bank, count).double(), outer_products(factors))


def test_the_operator_is_the_minimiser() -> None:
    torch.manual_seed(0)
    z = torch.randn(6, 4).double()

    def objective(x: Tensor, threshold: float) -> float:
        return float(0.5 * (x - z).square().sum() + threshold * torch.linalg.svdvals(x).sum())

    for threshold in (0.1, 0.7, 2.0):
        x = shrink_singular_values(z, threshold)
        least = objective(x, threshold)
        for step in (1e-4, 1e-2, 1.0):
            for _ in range(50):
                assert objective(x + step * torch.randn(6, 4).double(), threshold) >= least
        values = torch.linalg.svdvals(z)
        torch.testing.assert_close(torch.linalg.svdvals(x), (values - threshold).clamp(min=0))
    torch.testing.assert_close(shrink_singular_values(z, 0.0), z)
    assert float(shrink_singular_values(z, 10.0).abs().max()) < 1e-12
    batch = torch.stack([z, 2 * z])
    several = shrink_singular_values(batch, torch.tensor([0.1, 0.7]).double())
    torch.testing.assert_close(several[1], shrink_singular_values(2 * z, 0.7))
    values = torch.linspace(-2, 2, 9)
    assert torch.equal(shrink(values, 0.5), values.sign() * (values.abs() - 0.5).clamp(min=0))


@pytest.mark.parametrize("taps", [(5, 5), (3, 7), (3, 4, 5)])
def test_planted_filters_are_found(taps: tuple[int, ...]) -> None:
    assert by_nuclear_norm(planted(20, 2, taps), 2).error < 1e-4


def test_every_filter_is_separable_and_nothing_of_them_is_left() -> None:
    torch.manual_seed(0)
    bank = torch.randn(30, 5, 5).double()
    for count in (1, 6, 12):
        found = by_nuclear_norm(bank, count)
        assert float(spread(found.filters()).max()) < 1e-6
        rest = bank - found.bank()
        assert float((rest.flatten(1) @ found.filters().flatten(1).T).abs().max()) < 1e-8
        assert found.error == pytest.approx(float(rest.norm() / bank.norm()))


def test_it_is_better_than_cutting_the_leading_filters() -> None:
    bank = torch.randn(40, 7, 7, generator=torch.Generator().manual_seed(0)).double()
    bank = torch.nn.functional.avg_pool2d(bank, 3, 1, 1)
    cut = mixed(bank, rank_one(torch.linalg.svd(bank.flatten(1))[2][:8].reshape(8, 7, 7)))
    assert by_nuclear_norm(bank, 8).error < 0.97 * cut.error


@pytest.mark.parametrize("shape", [(3, 5, 5), (40, 3, 3), (10, 2, 3, 2), (6, 4)])
def test_enough_filters_are_exact(shape: tuple[int, ...]) -> None:
    bank = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    count = len(exact_filters(bank))
    if bank.ndim == 3:
        assert count == min(shape[0] * min(shape[1:]), shape[1] * shape[2])
    assert by_nuclear_norm(bank, count).error < 1e-10
    assert by_nuclear_norm(bank, count + 3).error < 1e-10


def test_rank_one_is_the_closest_outer_product() -> None:
    torch.manual_seed(0)
    filters = torch.randn(4, 5, 6).double()
    left, values, right = torch.linalg.svd(filters, full_matrices=False)
    best = left[:, :, :1] * values[:, None, :1] @ right[:, :1]
    torch.testing.assert_close(outer_products(rank_one(filters)), best)
    solid = outer_products([torch.randn(4, size).double() for size in (3, 4, 5)])
    torch.testing.assert_close(outer_products(rank_one(solid)), solid)


def test_none_is_no_number() -> None:
    with pytest.raises(SettingError, match="count is 0"):
        by_nuclear_norm(torch.randn(4, 3, 3), 0)
