"""A matrix as a low-rank plus a sparse one, fitted to data by greedy bilateral steps, without its singular values.

What is minimised is `||Y - (U V + S) X||_F^2` over factors of a bounded rank and a matrix of a bounded number of
entries that are not zero. It depends on the data through `X X^T` and `Y X^T` alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from karui.errors import require
from karui.numerics.regression import inverse


@dataclass(frozen=True)
class LowRankSparse:
    """The matrix `left right + sparse`, and its squared errors after each half-step of the fit (relative to Y's)."""

    left: Float[Tensor, "outputs rank"]
    right: Float[Tensor, "rank inputs"]
    sparse: Float[Tensor, "outputs inputs"]
    errors: tuple[float, ...]

    def matrix(self) -> Float[Tensor, "outputs inputs"]:
        """The sum."""
        return self.left @ self.right + self.sparse


def low_rank_sparse(
    cross: Float[Tensor, "outputs inputs"],
    gram: Float[Tensor, "inputs inputs"],
    size: float,
    rank: int,
    nonzeros: int,
    *,
    sweeps: int = 60,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> LowRankSparse:
    """The sum of a matrix of that rank and one of that many entries with a small error on the data.

    Factors start at a fifth of the rank. A sweep solves for the left factor, orthonormalises it, solves for the right
    one, takes a step of the sparse part down the gradient, keeps its largest entries, and solves for these. None of
    these raises the error. When it falls by less than `tolerance` in a sweep, the rank grows by another fifth, along
    the leading directions of the gradient, found by QR of a sketch.

    Args:
        cross: `Y X^T`.
        gram: `X X^T`.
        size: `||Y||_F^2`.
        rank: largest rank, 0 for none.
        nonzeros: largest number of entries of the sparse part, 0 for none.
        sweeps: at the final rank.
        tolerance: relative decrease of the error below which the rank grows, or the fit ends.
        seed: of the sketches.

    Raises:
        SettingError: the rank or the number of entries does not fit the matrix.

    Example:
        >>> weight, eye = torch.tensor([[3.0, -1.0], [0.5, -2.0]]).double(), torch.eye(2).double()
        >>> low_rank_sparse(weight, eye, float(weight.square().sum()), 0, 2).sparse.round(decimals=4).tolist()
        [[3.0, 0.0], [0.0, -2.0]]
    """
    outputs, inputs = cross.shape
    require(0 <= rank <= min(outputs, inputs), f"rank is {rank}; give 0 to {min(outputs, inputs)}")
    require(0 <= nonzeros <= outputs * inputs, f"nonzeros is {nonzeros}; give 0 to {outputs * inputs}")
    fit = _Fit(cross.double(), gram.double(), size, nonzeros, torch.Generator().manual_seed(seed))
    part = max(1, rank // 5)
    if rank:
        fit.grow(min(part, rank))
    done = 0
    before = fit.error()
    while done < sweeps:
        fit.sweep()
        before, gained = fit.errors[-1], before - fit.errors[-1]
        full = fit.left.shape[1] == rank
        done += full
        if gained > tolerance * (before + gained):
            continue
        if full:
            break
        fit.grow(min(part, rank - fit.left.shape[1]))
        before = fit.errors[-1]
    return LowRankSparse(fit.left, fit.right, fit.sparse, tuple(fit.errors))


class _Fit:
    """The state of a fit; its steps change it in place.

    Products with the Gram matrix are most of the work, so that those of both parts are kept beside them, and errors
    follow from products of small matrices.
    """

    def __init__(self, cross: Tensor, gram: Tensor, size: float, nonzeros: int, generator: torch.Generator) -> None:
        self.cross, self.gram, self.size, self.nonzeros, self.generator = cross, gram, size, nonzeros, generator
        self.inverted = inverse(gram)
        self.step = 1 / max(float(torch.linalg.eigvalsh(gram)[-1]), 1e-300)  # a Gram matrix is symmetric
        outputs, inputs = cross.shape
        self.left, self.right = cross.new_zeros(outputs, 0), cross.new_zeros(0, inputs)
        self.seen = torch.zeros_like(self.right)  # what the right factor makes of the Gram matrix
        self.sparse, self.sparse_seen = torch.zeros_like(cross), torch.zeros_like(cross)
        self.errors: list[float] = []

    def error(self) -> float:
        rest = self.cross - self.sparse_seen
        lost = self.size - float((self.sparse * (self.cross + rest)).sum())
        lost -= 2 * float((self.left * (rest @ self.right.T)).sum())
        lost += float(((self.left.T @ self.left) * (self.seen @ self.right.T)).sum())
        return max(0.0, lost) / max(self.size, 1e-300)

    def sweep(self) -> None:
        if self.left.shape[1]:
            rest = self.cross - self.sparse_seen
            self.left = rest @ self.right.T @ inverse(self.seen @ self.right.T)
            self._note()
            self._turn(torch.linalg.qr(self.left).Q, rest)
        if self.nonzeros:
            rest = self.cross - self.left @ self.seen
            self._put(keep_largest(self.sparse + self.step * (rest - self.sparse_seen), self.nonzeros))
            self._put(solved_on(self.sparse != 0, rest, self.gram))

    def grow(self, by: int) -> None:
        """More columns for the left factor, out of the gradient's range; the right one starts at its best for them."""
        rest = self.cross - self.sparse_seen
        gradient = rest - self.left @ self.seen
        sketch = gradient @ torch.randn(gradient.shape[1], by, generator=self.generator, dtype=gradient.dtype)
        sketch = gradient @ (gradient.T @ sketch)
        self._turn(torch.linalg.qr(torch.cat((self.left, sketch), 1)).Q, rest)

    def _turn(self, left: Tensor, rest: Tensor) -> None:
        """An orthonormal left factor, and the right one that is best for it."""
        self.left, self.right = left, left.T @ rest @ self.inverted
        self.seen = self.right @ self.gram
        self._note()

    def _put(self, sparse: Tensor) -> None:
        self.sparse, self.sparse_seen = sparse, sparse @ self.gram
        self._note()

    def _note(self) -> None:
        self.errors.append(self.error())


def keep_largest(matrix: Float[Tensor, "rows columns"], number: int) -> Float[Tensor, "rows columns"]:
    """The matrix with its `number` largest entries, and zeros elsewhere."""
    kept = torch.zeros_like(matrix)
    index = matrix.abs().flatten().topk(number).indices
    return kept.flatten().scatter(0, index, matrix.flatten()[index]).reshape(matrix.shape)


def solved_on(
    support: Bool[Tensor, "outputs inputs"],
    cross: Float[Tensor, "outputs inputs"],
    gram: Float[Tensor, "inputs inputs"],
) -> Float[Tensor, "outputs inputs"]:
    """The least-squares solution with entries on a support only, row by row."""
    solution = torch.zeros_like(cross)
    for row, places in enumerate(support):
        index = places.nonzero().flatten()
        if len(index):
            part = gram[index.unsqueeze(1), index]
            # A ridge far below the data keeps constant inputs from blowing up.
            part.diagonal().add_(1e-10 * part.diagonal().mean())
            solution[row, index] = torch.linalg.solve(part, cross[row, index])
    return solution
