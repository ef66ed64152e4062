"""Banks of filters as mixtures of separable ones by tensor decomposition: the bank, stacked, and its CP form.

`F[j, a, b] ~ sum_k mix[j, k] left[a, k] right[b, k]` (Sironi et al. 2015, survey 14). All factors are fitted at once by
non-linear conjugate gradients (CP-OPT: Acar, Dunlavy, Kolda 2011), which has no weight to tune.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor

from karui.errors import require
from karui.numerics.separable import Mixture, exact_filters, mixed, outer_products, rank_one


def by_tensor(
    bank: Float[Tensor, "bank *taps"], count: int, *, restarts: int = 3, iterations: int = 1000, seed: int = 0
) -> Mixture:
    """Separable filters for a bank by its CP decomposition, the best of several random starts.

    Args:
        bank: the filters, in one to three dimensions of space.
        count: how many separable ones.
        restarts: how many starts.
        iterations: most steps of conjugate gradients for each.
        seed: of the starts.

    Example:
        >>> bank = torch.einsum("jk,ka,kb->jab", torch.randn(20, 2), torch.randn(2, 5), torch.randn(2, 5))
        >>> by_tensor(bank, 2).error < 1e-4
        True
    """
    require(count >= 1, f"count is {count}; give a number of separable filters from 1")
    whole = exact_filters(bank)
    if count >= len(whole):
        return mixed(bank, rank_one(whole.repeat(math.ceil(count / len(whole)), *[1] * (bank.ndim - 1))[:count]))
    stacked = bank.double()
    if len(bank) > math.prod(bank.shape[1:]):
        # A turn of the stack changes no error, and leaves as many rows as a filter has positions.
        stacked = torch.linalg.qr(stacked.flatten(1)).R.reshape(-1, *bank.shape[1:])
    generator = torch.Generator().manual_seed(seed)
    found = [mixed(bank, _descend(stacked, count, iterations, generator)) for _ in range(restarts)]
    return min(found, key=lambda one: one.error)


def _descend(
    stacked: Float[Tensor, "bank *taps"], count: int, iterations: int, generator: torch.Generator
) -> tuple[Float[Tensor, "filters taps"], ...]:
    """From one random start, at the scale of the bank; the filters' factors."""
    size = float(stacked.square().mean().sqrt()) or 1.0
    bank = stacked.numpy() / size
    sizes = [(count, length) for length in bank.shape]
    start = torch.cat([torch.randn(a, b, generator=generator, dtype=torch.float64).flatten() for a, b in sizes]).numpy()
    start *= count ** (-0.5 / bank.ndim)
    found = minimize(
        _objective, start, args=(bank, sizes), jac=True, method="CG", options={"maxiter": iterations, "gtol": 1e-7}
    ).x
    _, *factors = (torch.from_numpy(part) for part in _parts(found, sizes))
    return rank_one(outer_products(factors))


def _parts(flat: np.ndarray, sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    cuts = np.cumsum([a * b for a, b in sizes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(flat, cuts), sizes, strict=True)]


def _objective(flat: np.ndarray, bank: np.ndarray, sizes: list[tuple[int, int]]) -> tuple[float, np.ndarray]:
    """Half the squared error and its gradient.

    That of a factor is its unfolding of the residual times the product of the others, filter by filter.
    """
    factors = _parts(flat, sizes)
    mix, *others = factors
    basis = others[0]
    for factor in others[1:]:
        basis = (basis[:, :, None] * factor[:, None, :]).reshape(len(basis), -1)
    rest = mix.T @ basis - bank.reshape(len(bank), -1)
    gradients = [basis @ rest.T]
    pulled = (mix @ rest).reshape(len(mix), *bank.shape[1:])  # the gradient of each filter as a whole
    for place in range(len(others)):
        moved = np.moveaxis(pulled, 1 + place, 1)
        for other in reversed([number for number in range(len(others)) if number != place]):
            moved = np.einsum("k...a,ka->k...", moved, others[other])
        gradients.append(moved)
    return 0.5 * float(np.square(rest).sum()), np.concatenate([part.ravel() for part in gradients])
