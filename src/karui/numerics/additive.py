"""Additive models of one and two inputs (GA2M), fitted by cyclic gradient boosting on binned inputs.

The model is `b + sum of h_i(x_i) + sum of h_ij(x_i, x_j)`, with each h a table over bins. In every round each input
gets a tree of a few leaves in turn, fitted to what is left: round-robin, never the best input first, so that inputs
that go together share what they explain. Bags and outputs are columns of one fit, which costs little more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from karui.errors import require
from karui.numerics.additive_pairs import cross_cut, fast_pairs, purified

Loss = Literal["squared", "log"]
Wait = Callable[[Iterable[int]], Iterable[int]]
LEAST = {"squared": 2.0, "log": 0.5}
"""Smallest weight of a leaf: two samples, or as many as two of probability one half weigh in a Newton step."""


@dataclass(frozen=True, kw_only=True)
class Boosting:
    """How an additive model is grown.

    Settings:
        rounds: visits of every input, and afterwards of every pair.
        rate: share of each tree that is added, in (0, 1].
        leaves: of the trees of one input.
        bins: most bins of an input.
        pairs: number of pairs of inputs; those that FAST ranks first.
        pair_bins: most bins of an input within a pair.
        bags: fits on resampled data, which are averaged; 1 takes the data as they are.
        loss: "squared", or "log" for targets that are probabilities.
    """

    rounds: int = 200
    rate: float = 0.1
    leaves: int = 3
    bins: int = 64
    pairs: int = 0
    pair_bins: int = 32
    bags: int = 8
    loss: Loss = "squared"

    def __post_init__(self) -> None:
        for name, least in (("rounds", 0), ("leaves", 2), ("bins", 2), ("pairs", 0), ("pair_bins", 2), ("bags", 1)):
            require(getattr(self, name) >= least, f"{name} is {getattr(self, name)}; give a whole number from {least}")
        require(0 < self.rate <= 1, f"rate is {self.rate}; give a share in (0, 1], for example 0.1")
        require(self.loss in LEAST, f"loss is {self.loss!r}; choose from {', '.join(LEAST)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Shapes:
    """A fitted additive model: tables over bins, each of weighted mean zero.

    Settings:
        intercept: b, `[outputs]`.
        edges: for each input, where a new bin begins: x lies in the bin of as many edges as are not above it.
        mains: for each input, `[bins, outputs]`.
        bands: standard error of each entry of `mains` over the bags; zero for one bag.
        weights: for each input, the number of samples in each bin.
        pairs: inputs of each pair.
        coarse: for each input, the edges that pairs use, some of `edges`.
        tables: for each pair, `[bins of the first, bins of the second, outputs]`; rows and columns have mean zero.
    """

    intercept: Float[np.ndarray, "outputs"]
    edges: tuple[np.ndarray, ...]
    mains: tuple[np.ndarray, ...]
    bands: tuple[np.ndarray, ...]
    weights: tuple[np.ndarray, ...]
    pairs: tuple[tuple[int, int], ...]
    coarse: tuple[np.ndarray, ...]
    tables: tuple[np.ndarray, ...]

    def predict(self, inputs: Float[np.ndarray, "samples inputs"]) -> Float[np.ndarray, "samples outputs"]:
        """The intercept and the entries of all tables, added up."""
        total = np.repeat(self.intercept[None], len(inputs), axis=0)
        for column, edges, main in zip(inputs.T, self.edges, self.mains, strict=True):
            total = total + main[binned(column, edges)]
        for (i, j), table in zip(self.pairs, self.tables, strict=True):
            total = total + table[binned(inputs[:, i], self.coarse[i]), binned(inputs[:, j], self.coarse[j])]
        return total

    def importance(self) -> Float[np.ndarray, "inputs outputs"]:
        """The standard deviation of each input's shape over the data."""
        weights = zip(self.mains, self.weights, strict=True)
        return np.stack([np.sqrt((w[:, None] * h**2).sum(0) / w.sum()) for h, w in weights])


def edges_of(column: Float[np.ndarray, "samples"], bins: int) -> Float[np.ndarray, "edges"]:
    """Where bins begin: between neighbouring values where there are few, else at quantiles.

    Example:
        >>> edges_of(np.array([0.0, 1.0, 1.0, 3.0], dtype=np.float32), 8).tolist()
        [0.5, 2.0]
    """
    values, counts = np.unique(column, return_counts=True)
    starts = np.arange(1, len(values))
    if len(values) > bins:
        wanted = np.linspace(0, len(column), bins + 1)[1:-1]
        starts = np.unique(np.searchsorted(np.cumsum(counts), wanted, side="right"))
        starts = starts[(starts > 0) & (starts < len(values))]
    below, above = values[starts - 1], values[starts]
    middle = (below + (above.astype(np.float64) - below) / 2).astype(values.dtype)
    return np.where(middle > below, middle, above)  # of two neighbours among the numbers, the middle is one of them


def binned(column: Float[np.ndarray, "samples"], edges: Float[np.ndarray, "edges"]) -> Int[np.ndarray, "samples"]:
    """The bin of each value: the number of edges that are not above it."""
    return np.searchsorted(edges, column, side="right")


def tree_on_bins(
    sums: Float[np.ndarray, "bins columns"], weights: Float[np.ndarray, "bins columns"], leaves: int, least: float
) -> Float[np.ndarray, "bins columns"]:
    """The tree of so many leaves on one binned input, grown best split first: its value in each bin.

    Args:
        sums: of residuals (for a Newton step, of gradients), by bin.
        weights: of samples (of second derivatives), by bin.
        leaves: at most; fewer where a split would leave a side lighter than `least`.
        least: the smallest weight of a leaf.

    Example:
        >>> tree_on_bins(np.array([[2.0], [2.0], [-4.0]]), np.full((3, 1), 2.0), 2, 1.0)[:, 0].tolist()
        [1.0, 1.0, -2.0]
    """
    bins, columns = sums.shape
    place, every = np.arange(bins)[:, None], np.arange(columns)
    first, last = np.zeros((bins, columns), dtype=np.int64), np.full((bins, columns), bins - 1)
    total, mass = (np.concatenate([np.zeros((1, columns)), part.cumsum(0)]) for part in (sums, weights))
    for _ in range(leaves - 1):
        left, left_mass = total[1:] - total[first, every], mass[1:] - mass[first, every]
        right, right_mass = total[last + 1, every] - total[1:], mass[last + 1, every] - mass[1:]
        allowed = (left_mass >= least) & (right_mass >= least) & (place < last)
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = left**2 / left_mass + right**2 / right_mass - (left + right) ** 2 / (left_mass + right_mass)
        gain = np.where(allowed, gain, -np.inf)
        cut = gain.argmax(0)
        inside = (first == first[cut, every]) & (gain[cut, every] > 0)
        last = np.where(inside & (place <= cut), cut, last)
        first = np.where(inside & (place > cut), cut + 1, first)
    leaf, leaf_mass = (part[last + 1, every] - part[first, every] for part in (total, mass))
    return np.where(leaf_mass >= least, leaf / np.maximum(leaf_mass, least), 0.0)


@dataclass(frozen=True, eq=False)
class _Bins:
    """For each input, its edges and the bin of each sample."""

    edges: tuple[np.ndarray, ...]
    places: list[np.ndarray]


class _Fit:
    """One fit on its way: scores of all samples in columns (bag by bag, all outputs of a bag together)."""

    def __init__(self, targets: np.ndarray, settings: Boosting, rng: np.random.Generator) -> None:
        samples, self.outputs = targets.shape
        self.settings = settings
        self.targets = np.tile(targets, (1, settings.bags))
        draws = rng.multinomial(samples, np.full(samples, 1 / samples), settings.bags).T.astype(np.float64)
        self.weights = np.repeat(np.ones((samples, 1)) if settings.bags == 1 else draws, self.outputs, axis=1)
        mean = (self.weights * self.targets).sum(0) / samples
        if settings.loss == "log":
            mean = np.clip(mean, 1e-6, 1 - 1e-6)
            mean = np.log(mean / (1 - mean)) if self.outputs == 1 else np.log(mean)
        self.intercept = mean
        self.scores = np.repeat(mean[None], samples, axis=0)

    def left(self) -> tuple[np.ndarray, np.ndarray]:
        """What is left to explain and what it weighs, sample by sample, weighted by the bags."""
        if self.settings.loss == "squared":
            return self.weights * (self.targets - self.scores), self.weights
        p = self._probabilities()
        return self.weights * (self.targets - p), self.weights * p * (1 - p)

    def _probabilities(self) -> np.ndarray:
        if self.outputs == 1:
            return 1 / (1 + np.exp(-self.scores))
        z = self.scores.reshape(len(self.scores), -1, self.outputs)
        z = np.exp(z - z.max(2, keepdims=True))
        return (z / z.sum(2, keepdims=True)).reshape(self.scores.shape)


def fit_additive(
    inputs: Float[np.ndarray, "samples inputs"],
    targets: Float[np.ndarray, "samples outputs"],
    settings: Boosting,
    seed: int = 0,
    wait: Wait = iter,
) -> Shapes:
    """The additive model of these data.

    Args:
        inputs: one column for each input; categories as numbers, each value a bin where there are few.
        targets: numbers; for the loss "log", probabilities: of class 1 where there is one column, else of each class.
        settings: how it is grown.
        seed: of the bags.
        wait: is given the rounds to go through, and may show a bar.

    Example:
        >>> x = np.linspace(-1, 1, 200, dtype=np.float32)[:, None]
        >>> shapes = fit_additive(x, 3 * x**2, Boosting(bags=1))
        >>> bool(np.abs(shapes.predict(x) - 3 * x**2).max() < 0.1)
        True
    """
    fit = _Fit(targets.astype(np.float64), settings, np.random.default_rng(seed))
    edges = tuple(edges_of(column, settings.bins) for column in inputs.T)
    places = [binned(column, e) for column, e in zip(inputs.T, edges, strict=True)]
    mains = _boosted_mains(fit, places, [len(e) + 1 for e in edges], wait)
    coarse = tuple(_some(e, settings.pair_bins) for e in edges)
    within = [binned(column, e) for column, e in zip(inputs.T, coarse, strict=True)]
    sizes = [len(e) + 1 for e in coarse]
    pairs: tuple[tuple[int, int], ...] = ()
    if settings.pairs:
        residual = _unweighted(fit)
        pairs = fast_pairs(residual, within, sizes, wait)[: settings.pairs]
    tables = _boosted_pairs(fit, pairs, within, sizes, wait)
    return _tidied(fit, _Bins(edges, places), _Bins(coarse, within), mains, dict(zip(pairs, tables, strict=True)))


def _some(edges: np.ndarray, bins: int) -> np.ndarray:
    """Some of the edges, evenly spread: a coarse bin is then a union of fine ones."""
    if len(edges) < bins:
        return edges
    return edges[np.unique(np.linspace(0, len(edges) - 1, bins + 1).round().astype(int)[1:-1])]


def _unweighted(fit: _Fit) -> np.ndarray:
    """What the mean of the bags leaves, for each output."""
    residual, _ = fit.left()
    weights = np.maximum(fit.weights, 1e-12)
    residual = np.where(fit.weights > 0, residual / weights, fit.targets - fit.scores)
    return residual.reshape(len(residual), -1, fit.outputs).mean(1)


def _boosted_mains(fit: _Fit, places: list[np.ndarray], sizes: list[int], wait: Wait) -> list[np.ndarray]:
    settings, columns = fit.settings, fit.scores.shape[1]
    mains = [np.zeros((size, columns)) for size in sizes]
    orders = [np.argsort(place, kind="stable") for place in places]
    starts = [
        np.searchsorted(place[order], np.arange(n)) for place, order, n in zip(places, orders, sizes, strict=True)
    ]
    least = LEAST[settings.loss]
    for _ in wait(range(settings.rounds)):
        for number, (place, order, start) in enumerate(zip(places, orders, starts, strict=True)):
            left, weight = fit.left()
            sums, weights = (np.add.reduceat(part[order], start, axis=0) for part in (left, weight))
            step = settings.rate * tree_on_bins(sums, weights, settings.leaves, least)
            mains[number] += step
            fit.scores += step[place]
    return mains


def _boosted_pairs(
    fit: _Fit, pairs: tuple[tuple[int, int], ...], within: list[np.ndarray], sizes: list[int], wait: Wait
) -> list[np.ndarray]:
    """Trees of two inputs on what the mains leave; the mains stay."""
    settings, columns = fit.settings, fit.scores.shape[1]
    tables = [np.zeros((sizes[i] * sizes[j], columns)) for i, j in pairs]
    cells = [within[i] * sizes[j] + within[j] for i, j in pairs]
    for _ in wait(range(settings.rounds if pairs else 0)):
        for number, ((i, j), cell) in enumerate(zip(pairs, cells, strict=True)):
            shape = (sizes[i], sizes[j], columns)
            sums, weights = (_by_cell(part, cell, sizes[i] * sizes[j]).reshape(shape) for part in fit.left())
            value, _ = cross_cut(sums, weights, LEAST[settings.loss])
            step = settings.rate * value.reshape(-1, columns)
            tables[number] += step
            fit.scores += step[cell]
    return [table.reshape(sizes[i], sizes[j], columns) for (i, j), table in zip(pairs, tables, strict=True)]


def _by_cell(values: np.ndarray, cell: np.ndarray, cells: int) -> np.ndarray:
    return np.stack([np.bincount(cell, weights=column, minlength=cells) for column in values.T], axis=1)


def _tidied(
    fit: _Fit, fine: _Bins, coarse: _Bins, mains: list[np.ndarray], pairs: dict[tuple[int, int], np.ndarray]
) -> Shapes:
    """Tables without what belongs elsewhere: means of pairs go to the mains, those of mains to the intercept."""
    pure = []
    for (i, j), table in pairs.items():
        counts = np.zeros(table.shape[:2])
        np.add.at(counts, (coarse.places[i], coarse.places[j]), 1.0)
        rest, *moved = purified(table, counts)
        for number, part in zip((i, j), moved, strict=True):
            inside = binned(np.concatenate([[-np.inf], fine.edges[number]]), coarse.edges[number])
            mains[number] = mains[number] + part[inside]
        pure.append(rest)
    weights = tuple(np.bincount(place, minlength=len(main)) for place, main in zip(fine.places, mains, strict=True))
    means = [(w[:, None] * main).sum(0) / w.sum() for w, main in zip(weights, mains, strict=True)]
    mains = [main - mean for main, mean in zip(mains, means, strict=True)]
    bags, outputs = fit.settings.bags, fit.outputs

    def over_bags(table: np.ndarray) -> np.ndarray:
        return table.reshape(*table.shape[:-1], bags, outputs)

    def band(main: np.ndarray) -> np.ndarray:
        return over_bags(main).std(-2, ddof=1) / np.sqrt(bags) if bags > 1 else np.zeros_like(main)

    return Shapes(
        intercept=over_bags(fit.intercept + np.sum(means, axis=0)).mean(-2),
        edges=fine.edges,
        mains=tuple(over_bags(main).mean(-2) for main in mains),
        bands=tuple(band(main) for main in mains),
        weights=weights,
        pairs=tuple(pairs),
        coarse=coarse.edges,
        tables=tuple(over_bags(table).mean(-2) for table in pure),
    )
