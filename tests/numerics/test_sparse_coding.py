"""Convolutional sparse coding (survey 14): its parts are adjoint, its steps go down, its filters are found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from karui.errors import SettingError
from karui.numerics.separable import outer_products, spread
from karui.numerics.sparse_coding import _correlated, _gradient, _joined, learn_filters, sparse_maps

pytestmark = pytest.mark.paper(14)

TAPS = pytest.mark.parametrize("taps", [(3, 3), (4, 5), (2, 3, 4)])


def things(taps: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    space = (9, 8, 7)[: len(taps)]
    return torch.randn(2, 5, *space).double(), torch.randn(5, *taps).double(), torch.randn(2, 1, *space).double()


@TAPS
def test_correlation_is_the_adjoint_of_the_sum_of_maps(taps: tuple[int, ...]) -> None:
    maps, filters, rest = things(taps)
    there, back = (_joined(maps, filters) * rest).sum(), (maps * _correlated(rest, filters)).sum()
    torch.testing.assert_close(there, back)


@TAPS
def test_the_gradient_for_the_filters_is_that_of_back_propagation(taps: tuple[int, ...]) -> None:
    maps, filters, pictures = things(taps)
    filters.requires_grad_()
    rest = _joined(maps, filters) - pictures
    (wanted,) = torch.autograd.grad(0.5 * rest.square().sum(), filters)
    torch.testing.assert_close(_gradient(maps, rest.detach(), filters.detach()), wanted)


def test_maps_are_sparse_and_more_steps_are_no_worse() -> None:
    _, filters, pictures = things((3, 3))
    filters = filters / filters.flatten(1).norm(dim=1).reshape(-1, 1, 1)

    def objective(maps: Tensor) -> float:
        rest = _joined(maps, filters) - pictures
        return float(0.5 * rest.square().sum() + 0.3 * maps.abs().sum())

    values = [objective(sparse_maps(pictures, filters, 0.3, steps)) for steps in (0, 1, 2, 5, 20, 100)]
    assert values == sorted(values, reverse=True)
    maps = sparse_maps(pictures, filters, 0.3, 100)
    assert 0.2 < float((maps == 0).double().mean()) < 1


def made_of(filters: Tensor) -> Tensor:
    """Pictures with a few copies of these filters."""
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(200, len(filters), 16, 16, generator=generator)
    maps = maps * (torch.rand(maps.shape, generator=generator) < 0.01)
    return _joined(maps, filters.float()).squeeze(1)


def closeness(found: Tensor, planted: Tensor) -> list[float]:
    """For each planted filter the best absolute correlation with a found one, over shifts of one position."""
    best = []
    padded = torch.nn.functional.pad(found, (1, 1, 1, 1))
    for filter_ in planted:
        shifts = [padded[:, a : a + found.shape[1], b : b + found.shape[2]] for a in range(3) for b in range(3)]
        best.append(max(float((s * filter_).flatten(1).sum(1).abs().max()) for s in shifts))
    return best


@pytest.mark.parametrize("flatness", [0.0, 0.1])
def test_filters_that_pictures_are_made_of_are_learned(flatness: float) -> None:
    line, dot = torch.tensor([0.2, 0.6, 1.0, 0.6, 0.2]), torch.tensor([-0.5, 1.0, 1.0, -1.0, 0.3])
    planted = outer_products([torch.stack([line, dot]), torch.stack([dot, line])]).double()
    planted = planted / planted.flatten(1).norm(dim=1).reshape(-1, 1, 1)
    found = learn_filters(made_of(planted), 4, (5, 5), sparsity=0.6, flatness=flatness, rounds=60)
    assert min(closeness(found, planted)) > 0.9
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.ones(4).double(), rtol=1e-4, atol=1e-4)
    assert float(spread(found).max()) < 1e-6 if flatness else float(spread(found).max()) > 0.01


def test_one_dimension_is_refused() -> None:
    with pytest.raises(SettingError, match="two or three"):
        learn_filters(torch.rand(4, 9), 2, (3,))
