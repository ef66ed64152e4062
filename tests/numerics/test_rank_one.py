"""The nearest tensors of rank one."""

from __future__ import annotations

import torch

from karui.numerics.rank_one import outer, rank_one


def test_of_matrices_it_is_the_leading_singular_triple() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(6, 5, 4).double()
    scale, (left, right) = rank_one(matrices, sweeps=300)
    u, s, v = torch.linalg.svd(matrices)
    torch.testing.assert_close(scale, s[:, 0])
    torch.testing.assert_close(
        outer(scale, [left, right]), s[:, 0, None, None] * u[:, :, :1] @ v[:, :1], rtol=1e-6, atol=1e-8
    )


def test_a_tensor_of_rank_one_is_found_and_noise_moves_it_little() -> None:
    torch.manual_seed(0)
    made = torch.einsum("na,nb,nc->nabc", torch.randn(8, 6), torch.randn(8, 5), torch.randn(8, 3)).double()
    torch.testing.assert_close(outer(*rank_one(made)), made)
    noise = 0.01 * torch.randn_like(made)
    assert float((outer(*rank_one(made + noise)) - made).norm()) < float(noise.norm())


def test_the_error_does_not_rise_with_the_sweeps_and_zeros_stay() -> None:
    torch.manual_seed(0)
    tensors = torch.randn(10, 7, 5, 5)
    errors = [float((outer(*rank_one(tensors, sweeps)) - tensors.double()).norm()) for sweeps in (1, 3, 30)]
    assert errors == sorted(errors, reverse=True)
    assert not outer(*rank_one(torch.zeros(2, 3, 4))).any()
