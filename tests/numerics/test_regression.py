"""Least squares from streamed moments equals least squares on the samples, at any rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from karui.errors import SettingError
from karui.numerics.regression import AffineMap, Moments, reduced_rank_regression


def pairs(rows: int = 400, inputs: int = 7, outputs: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(rows, inputs, dtype=torch.float64) @ torch.randn(inputs, inputs).double() + 3
    y = x @ torch.randn(inputs, outputs).double() + 0.5 * torch.randn(rows, outputs).double() - 1
    return x, y


def error(found: AffineMap, x: Tensor, y: Tensor) -> float:
    return float((y - found(x)).square().sum())


def test_moments_may_come_in_batches() -> None:
    x, y = pairs()
    whole, parts = Moments.of(x, y), Moments.zeros(7, 5)
    for a, b in zip(x.split(37), y.split(37), strict=True):
        parts.add(a, b)
    assert parts.count == whole.count == len(x)
    for name in ("x", "y", "xx", "yx", "yy"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    centred = whole.centred()
    torch.testing.assert_close(centred.xx, torch.cov(x.T, correction=0))
    torch.testing.assert_close(centred.yx, ((y - y.mean(0)).T @ (x - x.mean(0))) / len(x))


def test_the_error_needs_no_samples() -> None:
    x, y = pairs()
    weight, offset = torch.randn(5, 7).double(), torch.randn(5).double()
    moments = Moments.of(x, y)
    assert moments.error(weight, offset) == pytest.approx(float((y - x @ weight.T - offset).square().sum()))
    assert moments.error(weight) == pytest.approx(float((y - x @ weight.T).square().sum()))


def test_isotropic_pairs_add_the_error_of_the_weight_alone() -> None:
    x, y = pairs()
    weight, other, offset = torch.randn(5, 7).double(), torch.randn(5, 7).double(), torch.randn(5).double()
    moments = Moments.of(x, y)
    held = moments.with_isotropic(weight, 0.3)
    more = 0.3 * len(x) * float((other - weight).square().sum())
    assert held.error(other, offset) == pytest.approx(moments.error(other, offset) + more)
    torch.testing.assert_close(held.centred().xx, moments.centred().xx + 0.3 * torch.eye(7).double())


@pytest.mark.paper(16)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_other_map_of_the_rank_is_better(rank: int) -> None:
    x, y = pairs()
    found = reduced_rank_regression(Moments.of(x, y), rank)
    assert torch.linalg.matrix_rank(found.matrix()) == rank
    torch.testing.assert_close(found.left.T @ found.left, torch.eye(rank).double())
    least = error(found, x, y)
    generator = torch.Generator().manual_seed(1)
    for step in (1e-3, 1e-2, 1e-1, 1.0):
        for _ in range(50):
            noise = [torch.randn(t.shape, generator=generator).double() for t in (found.left, found.right)]
            other = AffineMap(found.left + step * noise[0], found.right + step * noise[1], found.offset)
            best = AffineMap(other.left, other.right, y.mean(0) - other.matrix() @ x.mean(0))
            assert error(best, x, y) >= least * (1 - 1e-12)


@pytest.mark.paper(16)
def test_alternating_descent_from_random_starts_finds_nothing_better() -> None:
    """A brute solver of the same problem: alternate least squares in the two factors, from many starts."""
    x, y = pairs()
    least = error(reduced_rank_regression(Moments.of(x, y), 2), x, y)
    xc, yc = x - x.mean(0), y - y.mean(0)
    found = []
    for seed in range(10):
        left = torch.randn(5, 2, generator=torch.Generator().manual_seed(seed)).double()
        for _ in range(300):
            right = torch.linalg.lstsq(left, torch.linalg.lstsq(xc, yc).solution.T).solution
            left = torch.linalg.lstsq(xc @ right.T, yc).solution.T
        found.append(float((yc - xc @ right.T @ left.T).square().sum()))
    assert min(found) == pytest.approx(least, rel=1e-6)


@pytest.mark.paper(16)
def test_it_is_principal_component_analysis_where_target_and_regressor_are_one() -> None:
    x, _ = pairs()
    found = reduced_rank_regression(Moments.of(x, x), 3)
    _, _, right = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    torch.testing.assert_close(found.matrix(), right[:3].T @ right[:3])
    torch.testing.assert_close(found(x.mean(0)), x.mean(0))


@pytest.mark.paper(16)
def test_at_full_rank_nothing_changes() -> None:
    x, _ = pairs()
    found = reduced_rank_regression(Moments.of(x, x), 7)
    torch.testing.assert_close(found.matrix(), torch.eye(7).double(), rtol=0, atol=1e-8)
    torch.testing.assert_close(found.offset, torch.zeros(7).double(), rtol=0, atol=1e-8)


def test_constant_and_repeated_regressors_do_no_harm() -> None:
    x, y = pairs()
    wide = torch.cat([x, x[:, :2], torch.full((len(x), 1), 4.0)], 1)
    plain, found = (reduced_rank_regression(Moments.of(r, y), 5) for r in (x, wide))
    assert error(found, wide, y) == pytest.approx(error(plain, x, y), rel=1e-6)


def test_wrong_ranks_are_told() -> None:
    x, y = pairs()
    with pytest.raises(SettingError, match="rank is 6"):
        reduced_rank_regression(Moments.of(x, y), 6)
    with pytest.raises(SettingError, match="no samples"):
        Moments.zeros(2, 2).centred()
