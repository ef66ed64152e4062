"""The normal equations of CP's damped Gauss-Newton steps, and two ways to solve them.

`J^T J` has a block of unknowns for each factor. Its product with a direction needs only Gram matrices of rank x rank.

Directly: the block of one mode is the same small matrix for each of its rows, so that the largest mode is eliminated at
the cost of a product (the Schur complement), and a Cholesky factor of the rest solves for any number of right-hand
sides. Up to some hundred unknowns this costs little more than the many small products of conjugate gradients, and it is
exact where components are nearly parallel and those converge badly. Beyond, conjugate gradients, preconditioned by the
diagonal blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Float
from scipy.linalg.lapack import dpotrf, dpotrs  # pyright: ignore[reportAttributeAccessIssue]

Factors = Sequence[Float[np.ndarray, "size rank"]]
Solve = Callable[[list[np.ndarray]], list[np.ndarray]]
"""From a right-hand side, mode by mode, the solution."""

# Unknowns of all modes but the first, up to which steps are solved for directly. On kernels of published networks they
# took as long as those by conjugate gradients at 330 unknowns and ended lower; two to four times as long at 460 to 570,
# lower by more; ten times as long at 1,200.
_DIRECT = 700
_CG_STEPS = 40


class Normal:
    """`J^T J` at a point, by its factors and their Gram matrices.

    Attributes:
        factors: one for each mode.
        grams: their Gram matrices.
        pairs: by two modes, the element-wise product of all other Gram matrices.
        blocks: the same for one mode: the diagonal block of each of its rows.
    """

    def __init__(self, factors: Factors, grams: Sequence[Float[np.ndarray, "rank rank"]]) -> None:
        self.factors, self.grams = factors, grams
        modes = range(len(factors))
        self.pairs: dict[tuple[int, int], np.ndarray] = {}
        for mode in modes:
            for other in range(mode):
                self.pairs[mode, other] = self.pairs[other, mode] = _product(grams, {mode, other})
        self.blocks = [self.pairs[mode, mode - 1] * grams[mode - 1] for mode in modes[1:]]
        self.blocks.insert(0, self.pairs[0, 1] * grams[1])

    @property
    def direct(self) -> bool:
        """Whether few enough unknowns are left for a direct solution."""
        return sum(factor.size for factor in self.factors[1:]) <= _DIRECT

    @property
    def size(self) -> float:
        """Mean of the diagonal: what the damping is measured in."""
        return float(np.mean([block.trace() for block in self.blocks])) / len(self.blocks[0])

    def product(self, direction: Factors) -> list[np.ndarray]:
        """`J^T J` times a direction."""
        crossed = [way.T @ factor for way, factor in zip(direction, self.factors, strict=True)]
        found = []
        for mode, factor in enumerate(self.factors):
            mixed = np.zeros_like(crossed[0])
            for other, one in enumerate(crossed):
                if other != mode:
                    mixed += self.pairs[mode, other] * one
            found.append(direction[mode] @ self.blocks[mode] + factor @ mixed)
        return found

    def bend(self, direction: Factors) -> list[np.ndarray]:
        """`J^T` times half the residual's second derivative along a direction.

        By the factors of order 0, 1 and 2 of the product of `gram + t crossed` over all modes but one.
        """
        crossed = [way.T @ factor for way, factor in zip(direction, self.factors, strict=True)]
        found = []
        for mode, factor in enumerate(self.factors):
            none, one, two = np.ones_like(crossed[0]), 0.0, np.zeros_like(crossed[0])
            for other, (gram, more) in enumerate(zip(self.grams, crossed, strict=True)):
                if other != mode:
                    none, one, two = none * gram, one * gram + none * more, two * gram + one * more
            found.append(direction[mode] @ one + factor @ two)
        return found

    @cached_property
    def rest(self) -> tuple[np.ndarray, np.ndarray]:
        """The lower triangle of the blocks of all modes but the first, and what joins them to the first's rows.

        The block of the first mode's row `i` and these is the second `[unknowns, rank]` times `factors[0][i]`, with
        columns by the other index of the component.
        """
        factors, rank = self.factors[1:], len(self.grams[0])
        ends = np.cumsum([0, *(factor.size for factor in factors)])
        matrix = np.zeros((ends[-1], ends[-1]))
        for mode, factor in enumerate(factors):
            start, end = ends[mode], ends[mode + 1]
            for row in range(start, end, rank):
                matrix[row : row + rank, row : row + rank] = self.blocks[mode + 1]
            for other in range(mode):
                mixed = factors[other].T[:, :, None] * self.pairs[mode + 1, other + 1][:, None]
                block = factor[:, None, None] * mixed
                matrix[start:end, ends[other] : ends[other + 1]] = block.reshape(end - start, -1)
        joined = [(one[:, None] * self.pairs[0, mode]).reshape(-1, rank) for mode, one in enumerate(factors, 1)]
        return matrix, np.concatenate(joined)


def solver(normal: Normal, shift: float) -> Solve | None:
    """What solves `(J^T J + shift) x = right`; None where it is too near to singular for the arithmetic."""
    return (_directly if normal.direct else _by_gradients)(normal, shift)


def _directly(normal: Normal, shift: float) -> Solve | None:
    """By a Cholesky factor of the Schur complement that is left of all modes but the first."""
    matrix, joined = normal.rest
    first, *others = normal.factors
    rank = joined.shape[1]
    inverse = _inverse(normal.blocks[0], shift)
    if inverse is None:
        return None
    taken = joined @ inverse @ joined.T
    by_index = taken.reshape(len(taken) // rank, rank, -1, rank)
    by_index *= normal.grams[0][:, None]
    # its lower triangle is the upper one of the transposed, which is laid out as LAPACK wants it
    upper, failed = _cholesky(np.subtract(matrix, taken, out=taken).T, shift)
    if failed:
        return None
    ends = np.cumsum([factor.size for factor in others])[:-1]

    def solve(right: list[np.ndarray]) -> list[np.ndarray]:
        mixed = (right[0] @ inverse).T @ first
        left = [right[mode] - factor @ (normal.pairs[0, mode] * mixed) for mode, factor in enumerate(others, 1)]
        found = dpotrs(upper, _joined(left))[0]
        parts, back = [part.reshape(-1, rank) for part in np.split(found, ends)], np.zeros((rank, rank))
        for mode, (part, factor) in enumerate(zip(parts, others, strict=True), 1):
            back += normal.pairs[0, mode] * (part.T @ factor)
        return [(right[0] - first @ back) @ inverse, *parts]

    return solve


def _by_gradients(normal: Normal, shift: float) -> Solve | None:
    """By conjugate gradients, preconditioned by the diagonal blocks."""
    inverses = [_inverse(block, shift) for block in normal.blocks]
    if any(inverse is None for inverse in inverses):
        return None

    def precondition(residual: list[np.ndarray]) -> list[np.ndarray]:
        return [one @ inverse for one, inverse in zip(residual, inverses, strict=True)]

    ends = np.cumsum([factor.size for factor in normal.factors])[:-1]

    def parts(vector: np.ndarray) -> list[np.ndarray]:
        """Views of it, mode by mode."""
        return [part.reshape(-1, len(normal.grams[0])) for part in np.split(vector, ends)]

    def solve(right: list[np.ndarray]) -> list[np.ndarray]:
        residual = _joined(right)
        found, left = np.zeros_like(residual), parts(residual)
        way = _joined(precondition(left))
        size = float(np.vdot(residual, way))
        start, ways = size, parts(way)
        # solved to a share that falls with the gradient, so that the last steps converge faster than linearly
        for _ in range(_CG_STEPS):
            image = _joined(normal.product(ways))
            image += shift * way
            curvature = float(np.vdot(way, image))
            if curvature <= 0:
                break
            length = size / curvature
            found += length * way
            residual -= length * image
            eased = _joined(precondition(left))
            before, size = size, float(np.vdot(residual, eased))
            if size <= 1e-4 * start:
                break
            way *= size / before
            way += eased
        return parts(found)

    return solve


def _joined(parts: Factors) -> np.ndarray:
    return np.concatenate([part.ravel() for part in parts])


def dot(first: Factors, second: Factors) -> float:
    """Inner product over all modes."""
    return float(sum(np.vdot(a, b) for a, b in zip(first, second, strict=True)))


def _cholesky(matrix: np.ndarray, shift: float) -> tuple[np.ndarray, int]:
    """The upper factor of a matrix (which is lost) with a shifted diagonal, and whether it failed."""
    matrix.flat[:: len(matrix) + 1] += shift
    return dpotrf(matrix, clean=0, overwrite_a=1)


def _inverse(block: np.ndarray, shift: float) -> np.ndarray | None:
    upper, failed = _cholesky(block.copy(), shift)
    return None if failed else dpotrs(upper, np.eye(len(block)))[0]


def _product(matrices: Sequence[np.ndarray], without: set[int]) -> np.ndarray:
    product = np.ones_like(matrices[0])
    for number, one in enumerate(matrices):
        if number not in without:
            product = product * one
    return product
