"""CP by alternating least squares and by greedy deflation, and the points to start from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg.lapack import dposv  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor

from karui.errors import require
from karui.numerics.cp import CP, Watch, balanced, gram, relative_error, ridge_weight
from karui.numerics.rank_one import outer, rank_one
from karui.numerics.unfold import unfold

# Weight of the pull towards the factor before, relative to the mean of the Gram matrix's diagonal: what keeps a
# singular system solvable, far below what changes a result.
_PROXIMAL = 1e-12
# Sweeps between two times that the components' weights are spread evenly.
_BALANCE = 10
# Share of the last sweep's change that the next one starts further on, and by how much it grows at each.
_MOMENTUM, _GROWTH = 0.5, 1.2


def hosvd_start(tensor: Float[Tensor, "..."], rank: int, generator: torch.Generator) -> list[Tensor]:
    """Leading left singular vectors of each unfolding, and random columns where a mode is smaller than the rank."""
    factors = []
    for mode in range(tensor.ndim):
        flat = unfold(tensor, (mode,))
        _, vectors = torch.linalg.eigh(flat @ flat.T)
        kept = vectors[:, -min(rank, len(flat)) :].flip(1)
        more = torch.randn(len(flat), rank - kept.shape[1], dtype=tensor.dtype, generator=generator)
        factors.append(torch.cat([kept, more / math.sqrt(len(flat))], dim=1))
    return factors


def random_start(tensor: Float[Tensor, "..."], rank: int, generator: torch.Generator) -> list[Tensor]:
    """Factors with normal entries."""
    return [torch.randn(size, rank, dtype=tensor.dtype, generator=generator) for size in tensor.shape]


def als(
    tensor: Float[Tensor, "..."],
    start: Sequence[Float[Tensor, "size rank"]],
    *,
    sweeps: int = 100,
    tolerance: float = 1e-6,
    ridge: float = 0.0,
    watch: Watch | None = None,
) -> CP:
    """Alternating least squares from `start`: each factor in turn is the best one for the others.

    Sweeps creep, each a little further the same way. So each starts from where the last two lead, about as far again as
    the last one went (Mitchell, Ye, De Sterck 2020, "Nesterov acceleration of alternating least squares for canonical
    tensor decomposition"), and one that ends above the last is undone: the error falls as ever, in half the sweeps.

    It ends after `sweeps`, or when a sweep lowers the relative error by less than `tolerance`. `ridge` is the weight
    of the factors' squared norms in the objective, for a tensor of norm 1: a little of it keeps components from
    cancelling one another, and the error then may rise by as little.
    """
    flat = unfold(tensor, (0,)).numpy()
    factors = _as_large(flat, balanced([factor.numpy() for factor in start]))
    weight, total = ridge_weight(ridge, tensor), float(np.vdot(flat, flat))
    errors, before, momentum = [relative_error(flat, factors)], None, _MOMENTUM
    require(math.isfinite(errors[0]), "the tensor, or the start of its decomposition, has values that are not finite")
    for sweep in range(sweeps):
        after, error = _sweep(flat, _further(factors, before, momentum), weight, total)
        undone = before is not None and error > errors[-1]
        if undone:
            error, before, momentum = errors[-1], None, momentum / 2
        else:
            momentum = min(1.0, _GROWTH * momentum) if before is not None else momentum
            before, factors = factors, after
        if sweep % _BALANCE == 0:
            before, factors = None, balanced(factors)  # the change of the last sweep was in other scales
        errors.append(error)
        if watch is not None:
            watch("alternating", sweep + 1, error)
        if not undone and errors[-2] - error < tolerance:
            break
    factors = balanced(factors)
    found = tuple(torch.from_numpy(factor) for factor in factors)
    return CP(found, (*errors[:-1], relative_error(flat, factors)))


def _further(factors: list[np.ndarray], before: list[np.ndarray] | None, share: float) -> list[np.ndarray]:
    """The factors, moved on by a share of how they have changed."""
    if before is None:
        return factors
    return [factor + share * (factor - last) for factor, last in zip(factors, before, strict=True)]


def _as_large(flat: np.ndarray, factors: list[np.ndarray]) -> list[np.ndarray]:
    """A start whose sum has the tensor's norm, so that a ridge weighs the same from the first sweep on."""
    norm, total = math.sqrt(max(0.0, float(gram(factors).sum()))), float(np.linalg.norm(flat))
    return [factor * (total / norm) ** (1 / len(factors)) for factor in factors] if norm and total else factors


def _sweep(
    flat: np.ndarray, factors: Sequence[np.ndarray], ridge: float, total: float
) -> tuple[list[np.ndarray], float]:
    """All factors once, and the relative error after the last of them.

    The tensor is multiplied by each factor as soon as it is renewed, and by the Khatri-Rao product of those that are
    not: of these, and of their Gram matrices' products, a sweep makes one chain from behind before it starts.
    """
    rank = factors[0].shape[1]
    late, grams = [factors[-1]], [factors[-1].T @ factors[-1]]
    for factor in factors[-2:0:-1]:
        late.append((factor[:, None] * late[-1]).reshape(-1, rank))
        grams.append(grams[-1] * (factor.T @ factor))
    inner, left = (flat @ late.pop()).T, flat
    factor = _solve(inner, grams.pop(), factors[0].T, ridge)
    renewed, done = [factor.T], factor @ factor.T
    for old in factors[1:]:
        left = factor @ left if left is flat else (factor[:, None] @ left)[:, 0]
        if late:
            left = left.reshape(rank, len(old), -1)
            inner, others = (left @ late.pop().T[:, :, None])[:, :, 0], done * grams.pop()
        else:
            inner, others = left, done
        factor = _solve(inner, others, old.T, ridge)
        renewed.append(factor.T)
        done = done * (factor @ factor.T)
    rest = total - 2 * float(np.vdot(inner, factor)) + float(done.sum())
    return renewed, math.sqrt(max(0.0, rest) / total) if total else 0.0


def _solve(inner: np.ndarray, others: np.ndarray, before: np.ndarray, ridge: float) -> np.ndarray:
    """The factor, transposed, that is best for the others, with a pull to where it was that keeps it solvable."""
    size = float(others.trace()) / len(others)
    pull = _PROXIMAL
    while True:
        system = others.copy()
        system.flat[:: len(system) + 1] += ridge + pull * size
        _, factor, failed = dposv(system, inner + pull * size * before)
        if not failed:
            return factor
        pull *= 100
        require(pull < 1, "the tensor, or the start of its decomposition, has values that are not finite")


def greedy(tensor: Float[Tensor, "..."], rank: int, *, sweeps: int = 64, watch: Watch | None = None) -> CP:
    """Deflation: the best single component by the power method from mean vectors, subtract it, repeat.

    The method of Denton et al. (survey 18) for its biclusters, and the usual stand-in for CP. Components are never
    looked at again, so it stays above alternating least squares.
    """
    (fit,) = greedy_batch(tensor.unsqueeze(0), rank, sweeps=sweeps, watch=watch)
    return fit


def greedy_batch(
    tensors: Float[Tensor, "batch *sizes"], rank: int, *, sweeps: int = 64, watch: Watch | None = None
) -> list[CP]:
    """The same for many tensors of one shape at once; `watch` is told their error together."""
    left, totals = tensors.double(), tensors.double().flatten(1).norm(dim=1).clamp(min=1e-300)
    components, errors = [], [left.flatten(1).norm(dim=1) / totals]
    for number in range(rank):
        scale, vectors = rank_one(left, sweeps, [_mean_vectors(left, mode) for mode in range(1, left.ndim)])
        components.append([scale.unsqueeze(1) * vectors[0], *vectors[1:]])
        left = left - outer(scale, vectors)
        errors.append(left.flatten(1).norm(dim=1) / totals)
        if watch is not None:
            watch("greedy", number + 1, float(left.norm() / totals.norm()))
    factors = [torch.stack(parts, 2) for parts in zip(*components, strict=True)]
    told = torch.stack(errors, 1).tolist()
    return [CP(tuple(balanced([factor[i] for factor in factors])), tuple(told[i])) for i in range(len(tensors))]


def _mean_vectors(tensors: Float[Tensor, "batch *sizes"], mode: int) -> Float[Tensor, "batch size"]:
    """Means over all other modes; where one vanishes (odd filters), the slice of largest norm."""
    flat = tensors.movedim(mode, 1).flatten(2)
    mean = flat.mean(2)
    largest = flat.square().sum(1).argmax(1)
    slices = flat.gather(2, largest[:, None, None].expand(-1, flat.shape[1], 1)).squeeze(2)
    vanishes = mean.norm(dim=1) <= 1e-9 * flat.flatten(1).norm(dim=1)
    return torch.where(vanishes[:, None], slices, mean)
