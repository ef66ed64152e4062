"""Banks as mixtures of separable filters by tensor decomposition (survey 14)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import check_grad

from karui.errors import SettingError
from karui.numerics.separable import exact_filters, outer_products, spread
from karui.numerics.separable_cp import _objective, by_tensor

pytestmark = pytest.mark.paper(14)


@pytest.mark.parametrize("shape", [(7, 4), (6, 3, 4), (5, 3, 2, 4)])
def test_the_gradient_is_that_of_finite_differences(shape: tuple[int, ...]) -> None:
    draw = np.random.default_rng(0)
    bank, sizes = draw.standard_normal(shape), [(3, length) for length in shape]
    point = draw.standard_normal(3 * sum(shape))
    off = check_grad(lambda x: _objective(x, bank, sizes)[0], lambda x: _objective(x, bank, sizes)[1], point)
    assert off < 1e-5 * np.linalg.norm(_objective(point, bank, sizes)[1])


@pytest.mark.parametrize(("taps", "count"), [((5, 5), 3), ((3, 7), 2), ((9, 9), 6), ((3, 4, 5), 4)])
def test_planted_filters_are_found(taps: tuple[int, ...], count: int) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        factors = [torch.randn(count, size).double() for size in taps]
        bank = torch.einsum("jk,k...->j...", torch.randn(40, count).double(), outer_products(factors))
        assert by_tensor(bank, count, restarts=5).error < 1e-4


def test_every_filter_is_separable_and_nothing_of_them_is_left() -> None:
    torch.manual_seed(0)
    bank, errors = torch.randn(60, 5, 5).double(), []
    for count in (1, 3, 6, 12, 20):
        found = by_tensor(bank, count)
        assert float(spread(found.filters()).max()) < 1e-6
        rest = bank - found.bank()
        assert float((rest.flatten(1) @ found.filters().flatten(1).T).abs().max()) < 1e-6
        errors.append(found.error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * errors[0]


@pytest.mark.parametrize("shape", [(7, 3, 4), (3, 5, 5), (8, 2, 3, 2)])
def test_more_filters_are_never_worse(shape: tuple[int, ...]) -> None:
    bank = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    errors = [by_tensor(bank, count).error for count in range(1, len(exact_filters(bank)) + 1)]
    # Where the descent comes to nothing it ends at the size of its smallest gradient, not at none.
    assert all(after <= before + 1e-6 for before, after in pairwise(errors)), errors
    assert errors[-1] < 1e-10


def test_enough_filters_are_exact_and_more_starts_no_worse() -> None:
    bank = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0))
    assert len(exact_filters(bank)) == 3 * 5
    assert by_tensor(bank, 15).error < 1e-10
    bank = torch.randn(30, 5, 5, generator=torch.Generator().manual_seed(0))
    assert by_tensor(bank, 6, restarts=5).error <= by_tensor(bank, 6, restarts=1).error
    with pytest.raises(SettingError, match="count is 0"):
        by_tensor(bank, 0)
