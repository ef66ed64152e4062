"""Low rank plus sparse by greedy bilateral steps (survey 24): what must hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from karui.errors import SettingError
from karui.numerics.bilateral import keep_largest, low_rank_sparse, solved_on
from karui.numerics.regression import Moments, reduced_rank_regression

pytestmark = pytest.mark.paper(24)


def planted(rank: int = 4, entries: int = 60) -> tuple[Tensor, int]:
    weight = torch.randn(48, rank).double() @ torch.randn(rank, 40).double() / rank**0.5
    places = torch.randperm(weight.numel())[:entries]
    weight.view(-1)[places] += 6 * torch.randn(entries).double()
    return weight, entries


def seen(weight: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, float]:
    responses = weight @ inputs
    return responses @ inputs.T, inputs @ inputs.T, float(responses.square().sum())


def test_a_planted_sum_is_found() -> None:
    torch.manual_seed(0)
    weight, entries = planted()
    mixing = torch.eye(40) + 0.3 * torch.randn(40, 40) / 40**0.5  # correlated inputs of full row rank
    fit = low_rank_sparse(*seen(weight, mixing.double() @ torch.randn(40, 400).double()), 4, entries, sweeps=200)
    assert float((fit.matrix() - weight).norm() / weight.norm()) < 1e-3


@pytest.mark.parametrize(("rank", "entries"), [(6, 100), (0, 150), (9, 0), (5, 1)])
def test_sizes_are_kept_and_no_half_step_raises_the_error(rank: int, entries: int) -> None:
    torch.manual_seed(1)
    weight, inputs = torch.randn(30, 24).double(), torch.randn(24, 24).double() @ torch.randn(24, 200).double()
    cross, gram, size = seen(weight, inputs)
    fit = low_rank_sparse(cross, gram, size, rank, entries)
    assert fit.left.shape == (30, rank)
    assert fit.right.shape == (rank, 24)
    assert int((fit.sparse != 0).sum()) <= entries
    assert all(after <= before + 1e-9 for before, after in zip(fit.errors, fit.errors[1:], strict=False))
    lost = (weight @ inputs - fit.matrix() @ inputs).square().sum()
    assert fit.errors[-1] == pytest.approx(float(lost) / size, rel=1e-6)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_without_a_sparse_part_it_is_reduced_rank_regression(rank: int) -> None:
    torch.manual_seed(2)
    x = torch.randn(400, 20).double() @ torch.diag(torch.linspace(3, 0.2, 20).double())
    y = x @ torch.randn(20, 26).double() + 0.1 * torch.randn(400, 26).double()
    moments = Moments.of(x, y)
    centred = moments.centred()
    fit = low_rank_sparse(centred.yx, centred.xx, float(centred.yy.trace()), rank, 0, tolerance=1e-5)
    best = reduced_rank_regression(moments, rank)
    lost = moments.error(fit.matrix(), centred.y - fit.matrix() @ centred.x)
    assert lost <= 1.01 * moments.error(best.matrix(), best.offset)


def test_without_a_low_rank_part_on_orthonormal_inputs_it_is_magnitude_pruning() -> None:
    torch.manual_seed(3)
    weight = torch.randn(12, 16).double()
    inputs = torch.linalg.qr(torch.randn(50, 16).double()).Q.T
    fit = low_rank_sparse(*seen(weight, inputs), 0, 40)
    torch.testing.assert_close(fit.sparse, keep_largest(weight, 40), rtol=1e-6, atol=1e-8)


def test_on_a_support_the_solution_is_least_squares_row_by_row() -> None:
    torch.manual_seed(4)
    inputs, weight = torch.randn(10, 60).double(), torch.randn(5, 10).double()
    support = torch.rand(5, 10) < 0.4
    support[2] = False
    cross, gram, _ = seen(weight, inputs)
    found = solved_on(support, cross, gram)
    assert (found[~support] == 0).all()
    for row in (0, 1, 3, 4):
        best = torch.linalg.lstsq(inputs[support[row]].T, (weight @ inputs)[row].unsqueeze(1)).solution.squeeze(1)
        torch.testing.assert_close(found[row][support[row]], best, rtol=1e-6, atol=1e-8)


def test_sizes_that_do_not_fit_are_refused() -> None:
    eye = torch.eye(4).double()
    with pytest.raises(SettingError, match="rank"):
        low_rank_sparse(eye, eye, 4.0, 5, 0)
    with pytest.raises(SettingError, match="nonzeros"):
        low_rank_sparse(eye, eye, 4.0, 1, 17)
