"""Banks of filters as mixtures of fewer separable ones, by the nuclear norm (survey 13, section 2.2; survey 14).

`bank[j] ~ sum_k mix[j, k] s_k`, where each `s_k` is an outer product of one vector for each dimension of space. The
problem is solved for free `s_k` under a penalty on their nuclear norms, which is raised until every one is of rank 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from karui.errors import require
from karui.numerics.proximal import shrink_singular_values

FLAT = 1e-6
"""A filter counts as of rank 1 when its second singular value is below this share of the first."""


@dataclass(frozen=True)
class Mixture:
    """A bank as a mixture of separable filters.

    Settings:
        factors: the vectors, a matrix `[filters, taps]` for each dimension of space, in float64.
        mix: `[bank, filters]`.
        error: relative Frobenius error of the bank.
    """

    factors: tuple[Float[Tensor, "filters taps"], ...]
    mix: Float[Tensor, "bank filters"]
    error: float

    def filters(self) -> Float[Tensor, "filters *taps"]:
        """The separable filters."""
        return outer_products(self.factors)

    def bank(self) -> Float[Tensor, "bank *taps"]:
        """The bank that they mix to."""
        return torch.einsum("jk,k...->j...", self.mix, self.filters())


def outer_products(factors: Sequence[Float[Tensor, "filters taps"]]) -> Float[Tensor, "filters *taps"]:
    """The outer product of the rows of one matrix for each dimension."""
    made = factors[0]
    for factor in factors[1:]:
        made = made.unsqueeze(-1) * factor.reshape(len(factor), *[1] * (made.ndim - 1), -1)
    return made


def mixed(bank: Float[Tensor, "bank *taps"], factors: Sequence[Float[Tensor, "filters taps"]]) -> Mixture:
    """The best mixture of given separable filters: least squares, so that what is left is orthogonal to all of them."""
    flat, basis = bank.double().flatten(1), outer_products(factors).flatten(1)
    mix = flat @ torch.linalg.pinv(basis, rtol=1e-12)
    lost = float((flat - mix @ basis).square().sum() / flat.square().sum().clamp(min=1e-300))
    return Mixture(tuple(factors), mix, math.sqrt(lost))


def rank_one(filters: Float[Tensor, "filters *taps"], sweeps: int = 50) -> tuple[Float[Tensor, "filters taps"], ...]:
    """The closest outer product of each filter; the first vector holds its size, the others are of length 1.

    For two dimensions the leading singular pair. For more, power iterations from the leading vectors of the unfoldings.
    """
    dims = filters.ndim - 1
    if dims == 1:
        return (filters.double(),)
    vectors = [
        torch.linalg.svd(_unfolded(filters.double(), dim), full_matrices=False)[0][..., 0] for dim in range(dims)
    ]
    for _ in range(sweeps if dims > 2 else 1):
        for dim in range(dims):
            vectors[dim] = _contracted(filters.double(), vectors, dim)
            if dim:
                vectors[dim] = vectors[dim] / vectors[dim].norm(dim=1, keepdim=True).clamp(min=1e-300)
        vectors[0] = _contracted(filters.double(), vectors, 0)
    return tuple(vectors)


def spread(filters: Float[Tensor, "filters *taps"]) -> Float[Tensor, "filters"]:
    """How far each is from separable: the second singular value over the first, the largest of its unfoldings."""
    worst = torch.zeros(len(filters), dtype=torch.float64)
    for dim in range(filters.ndim - 1):
        values = torch.linalg.svdvals(_unfolded(filters.double(), dim))
        if values.shape[1] > 1:
            worst = torch.maximum(worst, values[:, 1] / values[:, 0].clamp(min=1e-300))
    return worst


def by_nuclear_norm(
    bank: Float[Tensor, "bank *taps"], count: int, *, sweeps: int = 20, growth: float = 1.2, polish: int = 200
) -> Mixture:
    """Separable filters for a bank by a penalty on their nuclear norms that rises until each is of rank 1.

    In turns: mixtures by least squares, then a step of proximal gradient on the filters, each with a step size of its
    own. Filters are kept at length 1, which the mixtures make up for, so that small filters cannot evade the penalty.
    Then every filter is cut to its leading outer product, and the same turns go on with that in place of the penalty,
    which takes away its bias. At last the mixtures are found once more.

    Args:
        bank: the filters, in one to three dimensions of space.
        count: how many separable ones.
        sweeps: turns at each penalty.
        growth: how much the penalty rises after them.
        polish: turns after the cut.

    Example:
        >>> left, right = torch.randn(2, 5).double(), torch.randn(2, 5).double()
        >>> bank = torch.einsum("jk,ka,kb->jab", torch.randn(20, 2).double(), left, right)
        >>> by_nuclear_norm(bank, 2).error < 1e-4
        True
    """
    require(count >= 1, f"count is {count}; give a number of separable filters from 1")
    whole = exact_filters(bank)
    if count >= len(whole):
        return mixed(bank, rank_one(whole.repeat(math.ceil(count / len(whole)), *[1] * (bank.ndim - 1))[:count]))
    flat, filters = bank.double().flatten(1), leading_filters(bank, count)
    if len(flat) > flat.shape[1]:
        flat = torch.linalg.qr(flat).R  # only products of its columns are looked at
    threshold = 1e-3
    while threshold < 0.5 and float(spread(filters).max()) >= FLAT:
        for _ in range(sweeps):
            filters = _unit(_shrunk(_descended(flat, filters), threshold), filters)
        threshold *= growth
    filters = outer_products(rank_one(filters))
    for _ in range(polish):
        filters = _unit(outer_products(rank_one(_descended(flat, filters))), filters)
    return mixed(bank, rank_one(filters))


def exact_filters(bank: Float[Tensor, "bank *taps"]) -> Float[Tensor, "filters *taps"]:
    """Separable filters that mix to any bank of this size, or to this one: the fewer of the two.

    Single positions; or, in two dimensions, the singular pairs of every filter.
    """
    places = math.prod(bank.shape[1:])
    if bank.ndim != 3 or len(bank) * min(bank.shape[1:]) >= places:
        return torch.eye(places, dtype=torch.float64).reshape(places, *bank.shape[1:])
    left, values, right = torch.linalg.svd(bank.double(), full_matrices=False)
    return torch.einsum("jak,jk,jkb->jkab", left, values, right).flatten(0, 1)


def leading_filters(bank: Float[Tensor, "bank *taps"], count: int) -> Float[Tensor, "filters *taps"]:
    """The leading right singular vectors of the bank as filters, then single positions."""
    right = torch.linalg.svd(bank.double().flatten(1), full_matrices=False)[2]
    places = torch.eye(right.shape[1], dtype=torch.float64)
    return torch.cat([right, places])[:count].reshape(count, *bank.shape[1:])


def _descended(flat: Tensor, filters: Tensor) -> Tensor:
    """Least squares for the mixtures, then a step down the gradient for each filter, as long as is safe for all."""
    basis = filters.flatten(1)
    mix = flat @ torch.linalg.pinv(basis, rtol=1e-10)
    gram = mix.T @ mix
    # The matrix with these sums on its diagonal is above the Gram matrix, so the error cannot rise.
    steps = 1 / gram.abs().sum(1, keepdim=True).clamp(min=1e-300)
    return (basis - steps * (gram @ basis - mix.T @ flat)).reshape(filters.shape)


def _shrunk(filters: Tensor, threshold: float) -> Tensor:
    """Smaller singular values; in three dimensions those of every unfolding, in turns."""
    for dim in range(1 if filters.ndim == 3 else filters.ndim - 1):
        filters = _refolded(shrink_singular_values(_unfolded(filters, dim), threshold), dim, filters.shape)
    return filters


def _unit(filters: Tensor, before: Tensor) -> Tensor:
    """At length 1; a filter that has vanished is taken as it was before."""
    length = filters.flatten(1).norm(dim=1).reshape(-1, *[1] * (filters.ndim - 1))
    return torch.where(length > 1e-12, filters / length.clamp(min=1e-12), before)


def _unfolded(filters: Tensor, dim: int) -> Float[Tensor, "filters size rest"]:
    return filters.movedim(1 + dim, 1).flatten(2) if filters.ndim > 2 else filters.unsqueeze(2)


def _refolded(matrices: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    moved = [shape[0], shape[1 + dim], *(size for place, size in enumerate(shape[1:]) if place != dim)]
    return matrices.reshape(moved).movedim(1, 1 + dim)


def _contracted(filters: Tensor, vectors: Sequence[Tensor], dim: int) -> Float[Tensor, "filters size"]:
    """Each filter against the vectors of all dimensions but one."""
    made = filters.movedim(1 + dim, 1)
    for other in reversed([place for place in range(len(vectors)) if place != dim]):
        made = (made * vectors[other].reshape(len(made), *[1] * (made.ndim - 2), -1)).sum(-1)
    return made
