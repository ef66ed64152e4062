"""Pairs of inputs in additive models: which ones matter (FAST), a tree of two inputs, and purification."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Float, Int

FAST_BINS = 16
"""Bins of an input while pairs are ranked: enough for one cut each, and all pairs are gone through."""


def cross_cut(
    sums: Float[np.ndarray, "first second columns"], weights: Float[np.ndarray, "first second columns"], least: float
) -> tuple[Float[np.ndarray, "first second columns"], Float[np.ndarray, "columns"]]:
    """The best 2x2 cut of a table, one cut in each input: the mean of each quarter in its cells, and the gain.

    The gain is by how much the residual sum of squares falls, against no tree at all. A quarter lighter than `least`
    says nothing: zero.

    Example:
        >>> sums = np.array([[1.0, -1.0], [-1.0, 1.0]])[:, :, None]
        >>> cross_cut(sums, np.ones_like(sums), 1.0)[0][:, :, 0].tolist()
        [[1.0, -1.0], [-1.0, 1.0]]
    """
    rows, across, columns = sums.shape
    if rows < 2 or across < 2:
        return np.zeros_like(sums), np.zeros(columns)
    quarters = [_quarters(part) for part in (sums, weights)]
    means = [np.where(w >= least, s / np.maximum(w, least), 0.0) for s, w in zip(*quarters, strict=True)]
    gain = np.sum([mean * s for mean, s in zip(means, quarters[0], strict=True)], axis=0)
    best = gain.reshape(-1, columns).argmax(0)
    row, column, every = best // (across - 1), best % (across - 1), np.arange(columns)
    below = np.arange(rows)[:, None, None] <= row
    before = np.arange(across)[None, :, None] <= column
    a, b, c, d = (mean[row, column, every] for mean in means)
    return np.where(below, np.where(before, a, b), np.where(before, c, d)), gain[row, column, every]


def _quarters(table: np.ndarray) -> list[np.ndarray]:
    """Sums of the four parts that each pair of cuts leaves: both low, second high, first high, both high."""
    total = table.cumsum(0).cumsum(1)
    both, first, second, whole = total[:-1, :-1], total[:-1, -1:], total[-1:, :-1], total[-1:, -1:]
    return [both, first - both, second - both, whole - first - second + both]


def fast_pairs(
    residual: Float[np.ndarray, "samples outputs"],
    places: Sequence[Int[np.ndarray, "samples"]],
    sizes: Sequence[int],
    wait: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> tuple[tuple[int, int], ...]:
    """All pairs of inputs, the one whose best 2x2 cut explains most of the residual first (Lou et al. 2013, FAST).

    Args:
        residual: what the single inputs leave.
        places: for each input, the bin of each sample.
        sizes: for each input, the number of its bins.
        wait: is given the inputs to go through, and may show a bar.
    """
    steps = [-(-size // FAST_BINS) for size in sizes]
    coarse = [place // step for place, step in zip(places, steps, strict=True)]
    bins = [-(-size // step) for size, step in zip(sizes, steps, strict=True)]
    pairs = list(combinations(range(len(places)), 2))
    gains = {}
    for i in wait(range(len(places))):
        for j in range(i + 1, len(places)):
            cell, cells = coarse[i] * bins[j] + coarse[j], bins[i] * bins[j]
            shape = (bins[i], bins[j], -1)
            sums = np.stack([np.bincount(cell, column, cells) for column in residual.T], axis=1).reshape(shape)
            weights = np.bincount(cell, minlength=cells).reshape(bins[i], bins[j], 1).astype(np.float64)
            gains[i, j] = float(cross_cut(sums, np.broadcast_to(weights, sums.shape), 1.0)[1].sum())
    return tuple(sorted(pairs, key=lambda pair: -gains[pair]))


def purified(
    table: Float[np.ndarray, "first second columns"], weights: Float[np.ndarray, "first second"]
) -> tuple[
    Float[np.ndarray, "first second columns"], Float[np.ndarray, "first columns"], Float[np.ndarray, "second columns"]
]:
    """The table without what one input alone explains: every row and column then has the weighted mean zero.

    It is the residual of the weighted regression on rows and columns, so that one linear solve finds what the usual
    back and forth between rows and columns converges to.

    Returns:
        The pure table, what goes to the first input, and to the second; added up they are the table.

    Example:
        >>> table = np.add.outer([1.0, 2.0], [0.0, 5.0])[:, :, None]
        >>> pure, _, _ = purified(table, np.ones((2, 2)))
        >>> bool(np.abs(pure).max() < 1e-12)
        True
    """
    rows = len(table)
    weighted = weights[:, :, None] * table
    system = np.block([[np.diag(weights.sum(1)), weights], [weights.T, np.diag(weights.sum(0))]])
    right = np.concatenate([weighted.sum(1), weighted.sum(0)])
    found = np.linalg.lstsq(system, right, rcond=None)[0]
    first, second = found[:rows], found[rows:]
    return table - first[:, None] - second[None], first, second
