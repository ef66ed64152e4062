"""NBE: a mixture of naive-Bayes clusters, fitted by EM and sampled from (survey 36, section 3.2).

Within a cluster attributes are independent: a continuous one normal, a nominal one with a probability for each value
(Lowd and Domingos, 2005).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp

from karui.errors import require

SPREAD = 0.05
"""A cluster's standard deviation is at least this share of the whole column's: no density grows about one sample."""
PASSES, GAIN = 100, 1e-4
"""EM ends after so many passes, or once the mean log-likelihood rises by no more."""
HELD = 0.2
"""Share of the rows that judge the number of clusters."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """A fitted mixture of products.

    Settings:
        weights: of the clusters.
        means, deviations: of the continuous columns in each cluster, `[clusters, columns]`.
        names: the values of each nominal column.
        chances: of each nominal column's values in each cluster, `[clusters, values]`.
        nominal: numbers of the nominal columns, rising.
    """

    weights: Float[np.ndarray, "clusters"]
    means: Float[np.ndarray, "clusters continuous"]
    deviations: Float[np.ndarray, "clusters continuous"]
    names: tuple[np.ndarray, ...]
    chances: tuple[np.ndarray, ...]
    nominal: tuple[int, ...]

    def log_likelihood(self, table: Float[np.ndarray, "rows attributes"]) -> Float[np.ndarray, "rows"]:
        """Of each row; a nominal value that was never seen tells nothing."""
        return logsumexp(_joint(self, table), axis=1)  # pyright: ignore[reportReturnType]

    def draw(self, rows: int, seed: int = 0) -> Float[np.ndarray, "rows attributes"]:
        """So many rows: a cluster by its weight, then each attribute on its own."""
        draw = np.random.default_rng(seed)
        cluster = draw.choice(len(self.weights), size=rows, p=self.weights)
        attributes = self.means.shape[1] + len(self.nominal)
        made = np.empty((rows, attributes))
        continuous = _continuous(attributes, self.nominal)
        noise = draw.standard_normal((rows, self.means.shape[1]))
        made[:, continuous] = self.means[cluster] + self.deviations[cluster] * noise
        for column, names, chances in zip(self.nominal, self.names, self.chances, strict=True):
            steps = chances.cumsum(1)[cluster]
            picks = (draw.random((rows, 1)) * steps[:, -1:] >= steps).sum(1)
            made[:, column] = names[np.minimum(picks, len(names) - 1)]
        return made


def naive_bayes(
    table: Float[np.ndarray, "samples attributes"],
    *,
    nominal: Sequence[int] = (),
    clusters: int | None = None,
    seed: int = 0,
) -> Mixture:
    """The mixture that EM finds.

    Args:
        table: of finite numbers; left as it is.
        nominal: columns whose numbers are names.
        clusters: how many; None doubles their number while the likelihood of a fifth of the rows, held out, rises.
        seed: draws the first centres, and what is held out.

    Raises:
        SettingError: there are no clusters, or more than rows.

    Example:
        >>> apart = np.concatenate([np.zeros((20, 2)), np.ones((20, 2))]) + np.arange(80).reshape(40, 2) % 3 / 10
        >>> mixture = naive_bayes(apart, clusters=2)
        >>> sorted(mixture.means[:, 0].round(1).tolist())
        [0.1, 1.1]
    """
    columns = tuple(sorted(set(nominal)))
    if clusters is not None:
        fits = 1 <= clusters <= len(table)
        require(fits, f"clusters is {clusters}; give a number from 1 to that of the rows, {len(table)}")
        return _fitted(table, columns, clusters, seed)
    order = np.random.default_rng(seed).permutation(len(table))
    held, rest = np.split(table[order], [max(1, round(HELD * len(table)))])
    best, number = -np.inf, 1
    while 2 * number <= max(2, len(rest)):
        score = float(_fitted(rest, columns, number, seed).log_likelihood(held).mean())
        if score <= best:
            break
        best, number = score, 2 * number
    return _fitted(table, columns, max(1, number // 2), seed)


def _fitted(table: np.ndarray, nominal: tuple[int, ...], clusters: int, seed: int) -> Mixture:
    draw = np.random.default_rng(seed)
    continuous = _continuous(table.shape[1], nominal)
    numbers = table[:, continuous]
    names = tuple(np.unique(table[:, column]) for column in nominal)
    spread = numbers.std(0)
    spread = np.where(spread > 0, spread, 1e-12)
    # Each row starts with the nearest of some centres, which are drawn far from one another (k-means++).
    apart = _apart(table, table[draw.integers(len(table))], continuous, spread)[:, None]
    for _ in range(clusters - 1):
        far = apart.min(1)
        centre = draw.choice(len(table), p=far / far.sum() if far.any() else None)
        apart = np.column_stack([apart, _apart(table, table[centre], continuous, spread)])
    shares = np.eye(clusters)[apart.argmin(1)]
    before = -np.inf
    for _ in range(PASSES):
        mixture = _maximised(table, shares, nominal, names, spread)
        joint = _joint(mixture, table)
        likelihood: np.ndarray = logsumexp(joint, axis=1)  # pyright: ignore[reportAssignmentType]
        shares = np.exp(joint - likelihood[:, None])
        if likelihood.mean() - before <= GAIN:
            break
        before = likelihood.mean()
    return _maximised(table, shares, nominal, names, spread)


def _apart(table: np.ndarray, centre: np.ndarray, continuous: np.ndarray, spread: np.ndarray) -> np.ndarray:
    differ = (table[:, ~continuous] != centre[~continuous]).sum(1)
    return np.square((table[:, continuous] - centre[continuous]) / spread).sum(1) + differ


def _maximised(
    table: np.ndarray, shares: np.ndarray, nominal: tuple[int, ...], names: tuple[np.ndarray, ...], spread: np.ndarray
) -> Mixture:
    """The mixture of greatest likelihood for these shares of rows in clusters; each nominal value is seen once more."""
    numbers = table[:, _continuous(table.shape[1], nominal)]
    mass = shares.sum(0) + 1e-9
    means = shares.T @ numbers / mass[:, None]
    apart = [share @ np.square(numbers - mean) for share, mean in zip(shares.T, means, strict=True)]
    counts = [shares.T @ (table[:, c, None] == known) + 1.0 for c, known in zip(nominal, names, strict=True)]
    return Mixture(
        weights=mass / mass.sum(),
        means=means,
        deviations=np.maximum(np.sqrt(np.stack(apart) / mass[:, None]), SPREAD * spread),
        names=names,
        chances=tuple(count / count.sum(1, keepdims=True) for count in counts),
        nominal=nominal,
    )


def _joint(mixture: Mixture, table: np.ndarray) -> Float[np.ndarray, "rows clusters"]:
    """Log of each row's density in each cluster, times the cluster's weight."""
    numbers = table[:, _continuous(table.shape[1], mixture.nominal)]
    joint = np.tile(np.log(mixture.weights), (len(table), 1))
    for cluster, (mean, deviation) in enumerate(zip(mixture.means, mixture.deviations, strict=True)):
        joint[:, cluster] -= (np.square((numbers - mean) / deviation) / 2 + np.log(deviation)).sum(1)
    for column, names, chances in zip(mixture.nominal, mixture.names, mixture.chances, strict=True):
        joint += (table[:, column, None] == names) @ np.log(chances).T
    return joint


def _continuous(attributes: int, nominal: Sequence[int]) -> np.ndarray:
    return ~np.isin(np.arange(attributes), list(nominal))
