"""k-means of equal sizes and of points without a sign."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from karui.errors import SettingError
from karui.numerics.clusters import kmeans

pytestmark = [pytest.mark.paper(18), pytest.mark.paper(19)]


def least(points: Tensor, *, even: bool) -> float:
    """The least error of two clusters, by trying all."""
    best = float("inf")
    for chosen in itertools.product((0, 1), repeat=len(points)):
        labels = torch.tensor(chosen)
        sizes = torch.bincount(labels, minlength=2)
        if sizes.min() and (not even or sizes[0] == sizes[1]):
            error = sum(((points[labels == k] - points[labels == k].mean(0)) ** 2).sum() for k in (0, 1))
            best = min(best, float(error))
    return best


@pytest.mark.parametrize("even", [False, True])
def test_two_clusters_of_few_points_are_the_best_of_all(even: bool) -> None:
    torch.manual_seed(0)
    for seed in range(5):
        points = torch.randn(10, 2).double()
        found = kmeans(points, 2, even=even, restarts=20, seed=seed)
        assert found.error == pytest.approx(least(points, even=even), rel=1e-9)


def test_even_clusters_are_even_and_each_row_is_what_it_says() -> None:
    torch.manual_seed(0)
    points = torch.cat([torch.randn(9, 3), torch.randn(3, 3) + 9])
    found = kmeans(points, 4, even=True)
    assert torch.bincount(found.labels).tolist() == [3] * 4
    assert found.labels[found.order()].tolist() == sorted(found.labels.tolist())
    assert sorted(found.order().tolist()) == list(range(12))
    means = torch.stack([points[found.labels == k].mean(0) for k in range(4)]).double()
    torch.testing.assert_close(found.centres, means)
    assert kmeans(points, 4).error <= found.error


def test_a_sign_does_not_split_a_cluster() -> None:
    torch.manual_seed(0)
    lines = torch.eye(3)
    flips = torch.tensor([1.0, -1.0]).repeat(15)
    points = lines.repeat(10, 1) * flips[:, None] + 0.05 * torch.randn(30, 3)
    found = kmeans(points, 3, either_sign=True)
    assert found.error < 30 * 3 * 0.05**2 * 1.5
    assert kmeans(points, 3).error > 5 * found.error
    for k in range(3):
        assert len(set(found.labels[k::3].tolist())) == 1
    torch.testing.assert_close(found.signs * flips, (found.signs * flips)[:3].repeat(10))


def test_no_more_clusters_than_points_differ_are_used() -> None:
    points = torch.tensor([[0.0, 1.0], [2.0, 2.0]]).repeat(4, 1)
    found = kmeans(points, 5)
    assert found.error == 0
    assert len(found.labels.unique()) == 2
    assert kmeans(points, 4, even=True).error == 0


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SettingError, match="5 clusters"):
        kmeans(torch.zeros(4, 2), 5)
    with pytest.raises(SettingError, match="even"):
        kmeans(torch.zeros(4, 2), 3, even=True)
