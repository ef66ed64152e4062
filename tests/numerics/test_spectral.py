"""Graphs of units, Laplacians, sketches, roots of covariances."""

from __future__ import annotations

import pytest
import torch

from karui.numerics.spectral import distances, laplacian, root, similarities, sketch, smoothest

pytestmark = pytest.mark.paper(41)


def activations(samples: int = 200, units: int = 12) -> torch.Tensor:
    return torch.randn(samples, units, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).relu()


def test_distances_are_those_of_the_activations() -> None:
    a = activations()
    apart = distances(a.T @ a / len(a))
    by_hand = (a[:, :, None] - a[:, None, :]).square().mean(0)
    torch.testing.assert_close(apart, by_hand)


@pytest.mark.parametrize("pairs", [False, True])
def test_the_rows_of_a_laplacian_sum_to_zero_and_its_eigenvectors_are_orthonormal(pairs: bool) -> None:
    a = activations()
    first = torch.arange(12) < 5
    edges = (first[:, None] != first[None, :]).double() if pairs else None
    weights = similarities(distances(a.T @ a / len(a)), edges)
    assert torch.equal(weights, weights.T)
    assert float(weights.diagonal().abs().max()) == 0
    assert bool((weights >= 0).all())
    if pairs:
        assert float(weights[:5, :5].sum() + weights[5:, 5:].sum()) == 0
        assert bool((weights[:5, 5:] > 0).all())
    graph = laplacian(weights)
    torch.testing.assert_close(graph.sum(1), torch.zeros(12, dtype=torch.float64), rtol=0, atol=1e-12)
    basis = smoothest(graph, 12)
    torch.testing.assert_close(basis.T @ basis, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-12)
    frequencies = torch.stack([u @ graph @ u for u in basis.T])
    assert bool((frequencies.diff() > -1e-12).all())
    assert float(frequencies[0]) == pytest.approx(0, abs=1e-12)
    few = smoothest(graph, 4, heat=0.5)
    torch.testing.assert_close(few, torch.linalg.matrix_exp(-0.5 * graph) @ basis[:, :4])


def test_a_sketch_preserves_distances_within_eps_and_is_drawn_by_its_seed() -> None:
    x = activations(30, 2000)
    projected = x @ sketch(2000, 600, seed=3)
    pairs = torch.pdist(projected) / torch.pdist(x)
    assert float((pairs - 1).abs().max()) < 0.2
    assert torch.equal(sketch(20, 5, 3), sketch(20, 5, 3))
    assert not torch.equal(sketch(20, 5, 3), sketch(20, 5, 4))


@pytest.mark.parametrize("rank", [2, 6])
def test_a_root_times_its_transpose_is_the_covariance(rank: int) -> None:
    half = torch.randn(6, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    covariance = half @ half.T
    r, mean = root(covariance), float(covariance.diagonal().mean())
    torch.testing.assert_close(r @ r.T, covariance, rtol=1e-9, atol=1e-9 if rank == 6 else 1e-5 * mean)


def test_roots_of_no_variance_and_of_rounded_covariances() -> None:
    assert torch.equal(root(torch.zeros(3, 3)), torch.zeros(3, 3))
    rows = activations(20, 40).float()
    covariance = torch.cov(rows.T, correction=0).double()
    r = root(covariance)
    off = float((r @ r.T - covariance).abs().max())
    assert off < 1e-3 * float(covariance.diagonal().mean()) + 1e-9
