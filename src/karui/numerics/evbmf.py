"""The rank of a noisy matrix: global analytic empirical variational Bayesian matrix factorisation.

Nakajima, Sugiyama, Babacan, Tomioka 2013, "Global analytic solution of fully-observed variational Bayesian matrix
factorization", JMLR 14: the matrix is low rank plus white noise of unknown variance, and the factors have Gaussian
priors whose scale is estimated too (empirical Bayes). The solution is a threshold and a shrinkage of singular values,
once the noise variance is found, which takes one search over a scalar.

Paper -> here: `gamma_h` -> `values[h]`, `sigma^2` -> `variance`, `alpha` -> `aspect`, `tau underbar` -> `edge`,
`x underbar` -> `threshold`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor

# The solution of an equation of the paper, to its printed digits: tau underbar is close to it times sqrt(alpha).
_EDGE = 2.5129
# F is piecewise smooth with several minima: a grid finds the valley, the bounded search its floor.
_GRID = 257


@dataclass(frozen=True)
class Evbmf:
    """What was found: the rank, the variance of the noise, and the shrunk singular values (one for each rank)."""

    rank: int
    variance: float
    values: Float[Tensor, "rank"]


def evbmf(matrix: Float[Tensor, "rows columns"]) -> Evbmf:
    """Rank, noise variance and shrunk singular values of a matrix; 0 is a rank like any other (nothing but noise).

    The result does not depend on the scale or the orientation of the matrix.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> signal = torch.randn(64, 5, generator=generator) @ torch.randn(5, 288, generator=generator)
        >>> evbmf(signal + 0.5 * torch.randn(64, 288, generator=generator)).rank
        5
    """
    return evbmf_of_values(singular_values(matrix), (matrix.shape[0], matrix.shape[1]))


def singular_values(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "count"]:
    """All singular values in falling order, in float64, to about 1e-8 of the largest.

    They are the roots of the eigenvalues of the smaller Gram matrix, which are many times faster to find; weights
    stored in single precision are not known any better than that.
    """
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    return torch.linalg.eigvalsh(wide @ wide.T).clamp(min=0).sqrt().flip(0)


def evbmf_of_values(values: Float[Tensor, "count"], shape: tuple[int, int]) -> Evbmf:
    """The same from all the singular values of a matrix of this shape, in falling order."""
    short, long = min(shape), max(shape)
    size = float(values.double().square().mean().sqrt()) if values.numel() else 0.0
    if size == 0.0:
        return Evbmf(0, 0.0, values.new_zeros(0, dtype=torch.float64))
    scaled = values.double() / size
    edge = _EDGE * math.sqrt(short / long)
    threshold = (1 + edge) * (1 + short / long / edge)
    variance = _noise_variance(scaled, short, long, threshold)
    kept = scaled[scaled > math.sqrt(long * variance * threshold)]
    inner = 1 - (short + long) * variance / kept.square()
    root = (inner.square() - 4 * short * long * variance**2 / kept**4).clamp(min=0).sqrt()
    return Evbmf(len(kept), variance * size**2, size * kept / 2 * (inner + root))


def _noise_variance(values: Float[Tensor, "count"], short: int, long: int, threshold: float) -> float:
    squares = values.square()
    first = min(math.ceil(short / (1 + short / long)) - 1, short - 1)
    upper = float(squares.sum()) / (short * long)
    # A matrix of exactly low rank has no noise at all: rounding is the least variance that can be told from none.
    rounding = torch.finfo(torch.float64).eps * short * float(squares[0]) / long
    lower = max(float(squares[first]) / (long * threshold), float(squares[first:].mean()) / long, rounding)
    if lower >= upper:
        return upper
    grid = torch.linspace(math.log(lower), math.log(upper), _GRID, dtype=torch.float64)
    best = int(_free_energy(grid.exp(), squares, short, long, threshold).argmin())
    found = minimize_scalar(
        lambda log: float(_free_energy(torch.tensor([math.exp(log)]).double(), squares, short, long, threshold)[0]),
        bounds=(float(grid[max(best - 1, 0)]), float(grid[min(best + 1, _GRID - 1)])),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return math.exp(found.x)


def _free_energy(
    variances: Float[Tensor, "candidates"], squares: Float[Tensor, "count"], short: int, long: int, threshold: float
) -> Float[Tensor, "candidates"]:
    """The negative free energy per column, up to a constant, as a function of the noise variance (theorem 3)."""
    aspect = short / long
    x = (squares / (long * variances.unsqueeze(1))).clamp(min=torch.finfo(torch.float64).tiny)
    # Where x is below the threshold its tau is not used, and its root may not exist.
    safe = x.clamp(min=threshold)
    shifted = safe - (1 + aspect)
    tau = (shifted + (shifted.square() - 4 * aspect).sqrt()) / 2
    signal = safe - tau + ((tau + 1) / safe).log() + aspect * (tau / aspect + 1).log()
    return torch.where(x > threshold, signal, x - x.log()).sum(1)
