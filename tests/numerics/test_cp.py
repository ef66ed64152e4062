"""CP: planted components are found, no solver does what it must not, and the steps are what they claim."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from karui.errors import SettingError
from karui.numerics import cp_normal
from karui.numerics.cp import CP, balanced, gram, khatri_rao, mttkrp
from karui.numerics.cp_als import _sweep, als, greedy, greedy_batch, hosvd_start, random_start
from karui.numerics.cp_fit import cp
from karui.numerics.cp_nls import gradient, nls
from karui.numerics.cp_normal import Normal
from karui.numerics.unfold import unfold

pytestmark = pytest.mark.paper(17)


def factors_of(sizes: tuple[int, ...], rank: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, rank, dtype=torch.float64, generator=generator) for size in sizes]


def planted(sizes: tuple[int, ...], rank: int, seed: int = 0) -> Tensor:
    return CP(tuple(factors_of(sizes, rank, seed)), (0.0,)).tensor()


def smooth(filters: int, channels: int, taps: int = 3, seed: int = 0) -> Tensor:
    """A kernel as trained ones are: a spectrum that falls, over noise."""
    torch.manual_seed(seed)
    parts = factors_of((filters, channels, taps, taps), 3 * filters, seed)
    strength = torch.linspace(2, 0, 3 * filters, dtype=torch.float64).exp()
    return CP((parts[0] * strength, *parts[1:]), (0.0,)).tensor() + torch.randn(filters, channels, taps, taps)


@pytest.mark.parametrize("sizes", [(24, 16, 3, 3), (16, 24, 5), (8, 6, 3, 3, 3), (12, 9)])
def test_a_planted_kernel_is_recovered(sizes: tuple[int, ...]) -> None:
    rank = 4
    tensor = planted(sizes, rank)
    found = cp(tensor, rank)
    assert found.error < 1e-4
    assert float((found.tensor() - tensor).norm() / tensor.norm()) < 1e-4
    if len(sizes) > 2:  # the components themselves, which a matrix does not determine
        cosines = torch.ones(rank, rank, dtype=torch.float64)
        for own, other in zip(found.factors, factors_of(sizes, rank), strict=True):
            cosines *= (own / own.norm(dim=0)).T @ (other / other.norm(dim=0))
        assert float(cosines.max(0).values.min()) > 1 - 1e-4


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=2, max_size=5), rank=st.integers(1, 7), seed=st.integers(0, 99))
def test_products_are_those_of_the_definition(sizes: list[int], rank: int, seed: int) -> None:
    factors = factors_of(tuple(sizes), rank, seed)
    tensor = torch.randn(sizes, dtype=torch.float64)
    letters = "abcde"[: len(sizes)]
    whole = torch.einsum(",".join(letter + "r" for letter in letters) + "->" + letters, *factors)
    torch.testing.assert_close(CP(tuple(factors), (0.0,)).tensor(), whole)
    torch.testing.assert_close(gram(factors).sum(), whole.square().sum())
    for mode, found in enumerate(mttkrp(unfold(tensor, (0,)), factors)):
        others = [factor for number, factor in enumerate(factors) if number != mode]
        torch.testing.assert_close(found, unfold(tensor, (mode,)) @ khatri_rao(others))
    even = CP(tuple(balanced(factors)), (0.0,))
    torch.testing.assert_close(even.tensor(), whole)
    norms = torch.stack([factor.norm(dim=0) for factor in even.factors])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))


def test_order_and_scale_of_the_components_do_not_matter() -> None:
    factors = factors_of((6, 5, 4), 3)
    scales = torch.tensor([2.0, -0.5, 3.0], dtype=torch.float64)
    changed = [factors[0] * scales, factors[1] / scales, factors[2]]
    shuffled = tuple(factor[:, [2, 0, 1]] for factor in changed)
    torch.testing.assert_close(CP(shuffled, (0.0,)).tensor(), CP(tuple(factors), (0.0,)).tensor())


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_the_gradient_is_that_of_finite_differences(ridge: float) -> None:
    factors, tensor = factors_of((5, 4, 3, 2), 3), torch.randn(5, 4, 3, 2, dtype=torch.float64)

    def value(parts: list[Tensor]) -> float:
        rest = tensor - CP(tuple(parts), (0.0,)).tensor()
        return 0.5 * float(rest.square().sum()) + 0.5 * ridge * sum(float(p.square().sum()) for p in parts)

    for mode, slope in enumerate(gradient(tensor, factors, ridge)):
        for place in np.ndindex(*slope.shape):
            moved = []
            for sign in (1, -1):
                parts = [factor.clone() for factor in factors]
                parts[mode][place] += sign * 1e-5
                moved.append(value(parts))
            assert float(slope[place]) == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-5, abs=1e-6)


def normal_and_jacobian(sizes: tuple[int, ...], rank: int, way: list[Tensor]) -> tuple[Normal, Tensor, Tensor]:
    """The normal equations at random factors, the Jacobian there, and the second derivative along a way."""
    factors = factors_of(sizes, rank)
    start, along = (torch.cat([part.flatten() for part in parts]) for parts in (factors, way))

    def model(flat: Tensor) -> Tensor:
        pieces = flat.split([size * rank for size in sizes])
        parts = [part.reshape(size, rank) for part, size in zip(pieces, sizes, strict=True)]
        return CP(tuple(parts), (0.0,)).tensor().flatten()

    def slope(flat: Tensor) -> Tensor:
        return torch.autograd.functional.jvp(model, flat, along, create_graph=True)[1]  # pyright: ignore

    jacobian: Tensor = torch.autograd.functional.jacobian(model, start)  # pyright: ignore
    second: Tensor = torch.autograd.functional.jvp(slope, start, along)[1]  # pyright: ignore
    arrays = [factor.numpy() for factor in factors]
    return Normal(arrays, [factor.T @ factor for factor in arrays]), jacobian, second


@pytest.mark.parametrize("sizes", [(5, 4, 3), (5, 4, 3, 2), (4, 6)])
def test_the_normal_equations_are_those_of_the_jacobian(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = 3
    way = factors_of(sizes, rank, 7)
    normal, jacobian, second = normal_and_jacobian(sizes, rank, way)
    parts, flat = [part.numpy() for part in way], torch.cat([part.flatten() for part in way])

    def joined(found: list[np.ndarray]) -> Tensor:
        return torch.cat([torch.from_numpy(part).flatten() for part in found])

    torch.testing.assert_close(joined(normal.product(parts)), jacobian.T @ (jacobian @ flat))
    torch.testing.assert_close(joined(normal.bend(parts)), jacobian.T @ second / 2)
    shifted = jacobian.T @ jacobian + 0.7 * torch.eye(len(flat), dtype=torch.float64)
    wanted = torch.linalg.solve(shifted, flat)
    for most, close in ((700, 1e-9), (0, 2e-2)):  # directly, and by conjugate gradients
        monkeypatch.setattr(cp_normal, "_DIRECT", most)
        solve = cp_normal.solver(normal, 0.7)
        assert solve is not None
        assert float((joined(solve(parts)) - wanted).norm() / wanted.norm()) < close


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_both_ways_to_solve_go_down_to_about_the_same_error(ridge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = smooth(12, 16)  # the largest mode is not the first
    start = als(tensor, hosvd_start(tensor, 10, torch.Generator().manual_seed(0)), sweeps=20, ridge=ridge).factors
    errors = []
    for most in (700, 0):
        monkeypatch.setattr(cp_normal, "_DIRECT", most)
        fit = nls(tensor, start, iterations=200, tolerance=1e-8, ridge=ridge)
        errors.append(fit.error)
        assert [len(factor) for factor in fit.factors] == [12, 16, 3, 3]
    assert errors[0] == pytest.approx(errors[1], rel=5e-3)


def test_sweeps_that_start_further_on_are_ahead_of_plain_ones() -> None:
    for seed in range(3):
        tensor = torch.randn(16, 12, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        start = balanced(random_start(tensor, 12, torch.Generator().manual_seed(seed)))
        flat, total = unfold(tensor, (0,)).numpy(), float(tensor.square().sum())
        plain, error = [factor.numpy() for factor in start], 1.0
        for _ in range(30):
            plain, error = _sweep(flat, plain, 0.0, total)
        assert als(tensor, start, sweeps=30, tolerance=0.0).error < error - 1e-3


def test_a_sweep_that_overshoots_is_undone_and_ends_nothing() -> None:
    tensor = planted((6, 5, 4), 3)
    fit = als(tensor, hosvd_start(tensor, 3, torch.Generator().manual_seed(0)), sweeps=60, tolerance=1e-7)
    stood = [sweep for sweep, (before, after) in enumerate(pairwise(fit.errors)) if before == after]
    assert stood
    assert stood[0] < len(fit.errors) - 2
    assert fit.error < 1e-5


def test_errors_never_rise() -> None:
    tensor = smooth(16, 12)
    start = hosvd_start(tensor, 20, torch.Generator().manual_seed(0))
    alternating = als(tensor, start, sweeps=60, tolerance=0.0)
    together = nls(tensor, alternating.factors, iterations=30, tolerance=0.0)
    for fit in (alternating, together, greedy(tensor, 12)):
        assert all(after <= before + 1e-12 for before, after in pairwise(fit.errors))
        rest = float((fit.tensor() - tensor).norm() / tensor.norm())
        assert fit.error == pytest.approx(rest, rel=1e-9)
    assert together.error < alternating.error


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("sizes", "rank"), [((16, 12), 8), ((16, 12), 24), ((24, 8), 12)])
def test_least_squares_is_not_above_alternating_nor_that_above_greedy(
    sizes: tuple[int, int], rank: int, seed: int
) -> None:
    tensor = smooth(*sizes, seed=seed)
    one, two, three = (cp(tensor, rank, solver=solver).error for solver in ("nls", "als", "greedy"))
    assert one <= two <= three


def test_a_rank_beyond_a_mode_pads_the_start_with_random_columns() -> None:
    tensor = smooth(8, 6)
    start = hosvd_start(tensor, 20, torch.Generator().manual_seed(0))
    assert [tuple(factor.shape) for factor in start] == [(8, 20), (6, 20), (3, 20), (3, 20)]
    assert all(bool(factor.isfinite().all()) for factor in start)
    assert cp(tensor, 54, sweeps=300, ridge=0.0).error < 1e-3  # the rank at which any such tensor is exact


def test_a_little_ridge_keeps_components_from_cancelling() -> None:
    """A tensor whose best approximation of rank 2 does not exist: plain components grow without bound."""
    a, b = torch.eye(2, dtype=torch.float64)
    border = sum(torch.einsum("a,b,c->abc", *parts) for parts in ((a, a, b), (a, b, a), (b, a, a)))
    assert isinstance(border, Tensor)
    plain, held = (cp(border, 2, sweeps=500, iterations=300, ridge=ridge, seed=1) for ridge in (0.0, 1e-3))
    assert plain.cancellation > 5
    assert held.cancellation < 0.5 * plain.cancellation
    assert held.error < plain.error + 0.15


def test_the_ridge_means_the_same_for_any_norm() -> None:
    tensor = smooth(12, 8)
    small, large = (cp(scale * tensor, 10, ridge=1e-3, sweeps=30, iterations=10) for scale in (1e-3, 1e3))
    assert small.error == pytest.approx(large.error, rel=1e-3)


def test_degenerate_tensors_are_fitted() -> None:
    for solver in ("nls", "als", "greedy"):
        zero = cp(torch.zeros(4, 3, 2), 2, solver=solver)
        assert zero.error == 0
        assert not zero.tensor().any()
        assert all(bool(factor.isfinite().all()) for factor in zero.factors)
    assert all(bool(factor.any()) for factor in cp(torch.zeros(4, 3, 2), 2).factors[1:])  # it can learn
    odd = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])  # its means vanish
    assert greedy(odd, 1).error < 1e-12
    assert cp(odd, 1).error < 1e-6


def test_a_batch_of_deflations_is_each_of_them() -> None:
    tensors = torch.stack([smooth(8, 6, seed=seed) for seed in range(3)])
    for tensor, fit in zip(tensors, greedy_batch(tensors, 4), strict=True):
        torch.testing.assert_close(fit.tensor(), greedy(tensor, 4).tensor())


def test_seeds_repeat_and_watchers_may_stop() -> None:
    tensor = smooth(8, 6)
    one, two = (cp(tensor, 6, seed=3, restarts=2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.factors, two.factors, strict=True))
    told: list[tuple[str, int, float]] = []

    def stop(solver: str, step: int, error: float) -> None:
        told.append((solver, step, error))
        if solver == "least squares":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cp(tensor, 6, watch=stop)
    assert told[0][:2] == ("alternating", 1)
    assert told[-1][:2] == ("least squares", 1)


def test_wrong_settings_are_told() -> None:
    with pytest.raises(SettingError, match="solver"):
        cp(torch.ones(2, 2, 2), 1, solver="newton")  # pyright: ignore
    with pytest.raises(SettingError, match="rank is 0"):
        cp(torch.ones(2, 2, 2), 0)
    with pytest.raises(SettingError, match="finite"):
        cp(torch.full((2, 2, 2), float("nan")), 1)
    with pytest.raises(SettingError, match="modes"):
        cp(torch.ones(3), 1)


@pytest.mark.slow
def test_on_trained_kernels_it_is_at_least_as_accurate_as_tensorly(shared_data: Path) -> None:
    from tensorly.decomposition import parafac

    weights = np.load(shared_data / "cifar10_resnets" / "resnet20.npz")
    for name in ("layer1.1.conv1", "layer2.0.conv1", "layer2.1.conv2", "layer3.0.conv1"):
        kernel = torch.from_numpy(weights[f"{name}.weight"]).double()
        rank = kernel.numel() // (4 * (kernel.shape[0] + kernel.shape[1] + 6))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of modes that are smaller than the rank
            options: Any = {"n_iter_max": 100, "tol": 1e-8, "init": "svd", "random_state": 0, "return_errors": True}
            _, errors = parafac(kernel.numpy(), rank, **options)
        assert cp(kernel, rank, restarts=0).error <= float(errors[-1])
        assert cp(kernel, rank, restarts=0, ridge=1e-4).error <= float(errors[-1])


def test_random_starts_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = (random_start(torch.zeros(4, 3), 2, generator) for _ in range(2))
    assert not torch.equal(one[0], two[0])
