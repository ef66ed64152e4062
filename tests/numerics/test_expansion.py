"""Factored kernels fitted to responses (survey 13): never worse, and as good as the best map where that is known."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from karui.numerics.alternating import alternating_split
from karui.numerics.expansion import fit_expansion
from karui.numerics.regression import Moments, reduced_rank_regression

pytestmark = pytest.mark.paper(13)


def matrix(first: Sequence[Tensor], group: int) -> Tensor:
    return first[0][group]


def pairs(groups: int = 2) -> list[Moments]:
    torch.manual_seed(0)
    made = []
    for _ in range(groups):
        x = torch.randn(500, 8).double() @ torch.randn(8, 8).double() + 2
        made.append(Moments.of(x, x @ torch.randn(8, 5).double() + torch.randn(500, 5).double() + 3))
    return made


def test_plain_factors_reach_the_reduced_rank_regression() -> None:
    moments = pairs()
    start = (torch.randn(2, 2, 8).double(),)
    found = fit_expansion(moments, matrix, start, [torch.randn(5, 2).double()] * 2, 300)
    best = [reduced_rank_regression(one, 2) for one in moments]
    lost = sum(one.error(fit.matrix(), fit.offset) for one, fit in zip(moments, best, strict=True))
    total = sum(float(one.centred().yy.trace()) * one.count for one in moments)
    assert found.errors[-1] == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    for one, fit, offset, last, group in zip(
        moments, best, found.offsets(moments, matrix), found.last, range(2), strict=True
    ):
        assert one.error(last @ found.first[0][group], offset) == pytest.approx(
            one.error(fit.matrix(), fit.offset), rel=1e-2
        )


@pytest.mark.parametrize("iterations", [0, 1, 30])
def test_no_step_makes_it_worse(iterations: int) -> None:
    moments = pairs()
    found = fit_expansion(
        moments, matrix, (torch.randn(2, 3, 8).double(),), [torch.randn(5, 3).double()] * 2, iterations
    )
    assert all(after <= before for before, after in pairwise(found.errors))


def test_a_start_that_is_exact_stays() -> None:
    x = torch.randn(100, 6).double()
    weight = torch.randn(4, 2).double() @ torch.randn(2, 6).double()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    moments = [Moments.of(x, x @ weight.T)]
    found = fit_expansion(moments, matrix, (right[None, :2],), [left[:, :2] * values[:2]], 20)
    assert found.errors[-1] < 1e-6


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_alternation_reaches_the_closed_form_and_does_not_beat_it(rank: int) -> None:
    from karui.lowrank._split import joined_kernels, split_kernels

    kernels = torch.randn(2, 8, 6, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    errors = [
        float((joined_kernels(*solve(kernels, rank)) - kernels).norm()) for solve in (alternating_split, split_kernels)
    ]
    assert errors[1] * (1 - 1e-12) <= errors[0] <= 1.01 * errors[1]
