"""CP of a tensor, from several starts and by the solver that is asked for."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from karui.errors import SettingError, did_you_mean, require
from karui.numerics.cp import CP, Watch
from karui.numerics.cp_als import als, greedy, hosvd_start, random_start
from karui.numerics.cp_nls import nls

Solver = Literal["nls", "als", "greedy"]
SOLVERS: tuple[str, ...] = get_args(Solver)


def cp(
    tensor: Float[Tensor, "..."],
    rank: int,
    *,
    solver: Solver = "nls",
    restarts: int = 1,
    sweeps: int = 100,
    iterations: int = 60,
    ridge: float = 0.0,
    seed: int = 0,
    watch: Watch | None = None,
) -> CP:
    """The tensor as a sum of `rank` outer products.

    "nls" is alternating least squares from every start, and non-linear least squares from the best of the results, so
    that it never ends above "als" with the same settings. "greedy" is deflation, and looks at `sweeps` alone.

    Args:
        tensor: two modes or more.
        rank: components, from 1.
        solver: "nls", "als" or "greedy".
        restarts: random starts beside the one from the singular vectors of the unfoldings (HOSVD).
        sweeps: most sweeps of alternating least squares from each start; power iterations of a greedy component.
        iterations: most steps of non-linear least squares.
        ridge: weight of the factors' squared norms, for a tensor of norm 1; 0 fits the tensor alone.
        seed: of the random starts.
        watch: told after each step; may raise to stop.

    Raises:
        SettingError: a setting is out of range, or the tensor holds values that are not finite.

    Example:
        >>> parts = [torch.randn(size, 2, dtype=torch.float64) for size in (5, 4, 3)]
        >>> cp(torch.einsum("ar,br,cr->abc", *parts), 2).error < 1e-4
        True
    """
    if solver not in SOLVERS:
        did_you_mean(solver, list(SOLVERS), "solver", SettingError)
    require(rank >= 1, f"rank is {rank}; give a number from 1")
    require(tensor.ndim >= 2, f"the tensor has {tensor.ndim} modes; CP is for two or more")
    require(math.isfinite(float(tensor.double().square().sum())), "the tensor has values that are not finite")
    whole = tensor.detach().double()
    if solver == "greedy":
        return greedy(whole, rank, sweeps=sweeps, watch=watch)
    generator = torch.Generator().manual_seed(seed)
    if not whole.any():
        # Exactly zero, and still able to learn: a gradient reaches the first factor through the others.
        first, *others = random_start(whole, rank, generator)
        return CP((torch.zeros_like(first), *others), (0.0,))
    starts = [hosvd_start(whole, rank, generator), *(random_start(whole, rank, generator) for _ in range(restarts))]
    fits = [als(whole, start, sweeps=sweeps, ridge=ridge, watch=watch) for start in starts]
    best = min(fits, key=lambda fit: fit.error)
    if solver == "als":
        return best
    polished = nls(whole, best.factors, iterations=iterations, ridge=ridge, watch=watch)
    return CP(polished.factors, (*best.errors, *polished.errors[1:]))
