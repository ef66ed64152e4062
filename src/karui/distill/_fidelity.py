"""How true a student is to its teacher, and how right: over repeated splits, with paired intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats
from sklearn.metrics import roc_auc_score


def r_squared(told: Float[np.ndarray, "samples outputs"], wanted: Float[np.ndarray, "samples outputs"]) -> float:
    """Share of the variance of `wanted` that `told` explains; 1 where they are equal.

    Example:
        >>> r_squared(np.array([[1.0], [2.0]]), np.array([[1.0], [2.0]]))
        1.0
    """
    rest, whole = ((wanted - told) ** 2).sum(), ((wanted - wanted.mean(0)) ** 2).sum()
    return float(1 - rest / whole) if whole > 0 else float(rest == 0)


def auc(scores: Float[np.ndarray, "samples outputs"], classes: np.ndarray) -> float:
    """Area under the curve: of one score for class 1, or the mean over classes of each one's score against the rest.

    Not a number where only one class is there.
    """
    if scores.shape[1] == 1:
        return float(roc_auc_score(classes, scores[:, 0])) if len(np.unique(classes)) > 1 else float("nan")
    present = [k for k in range(scores.shape[1]) if 0 < (classes == k).sum() < len(classes)]
    areas = [roc_auc_score(classes == k, scores[:, k]) for k in present]
    return float(np.mean(areas)) if areas else float("nan")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One statistic over repeated splits.

    Settings:
        name: what it is.
        values: one for each split.
    """

    name: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the splits."""
        return float(np.mean(self.values))

    @property
    def deviation(self) -> float:
        """Standard deviation over the splits; 0 for one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        return f"{self.name}: {self.mean:.3f} +- {self.deviation:.3f}"


@dataclass(frozen=True, kw_only=True)
class Difference(Spread):
    """A paired difference over repeated splits, with its 95 % interval by Student's t.

    Splits of one data set share samples, so that the interval is narrower than new data would make it.

    Example:
        >>> print(Difference(name="fidelity, distilled - direct", values=(0.2, 0.3, 0.25)))
        fidelity, distilled - direct: 0.250 [0.126, 0.374]
    """

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high; infinite for one split."""
        number = len(self.values)
        if number < 2:
            return -np.inf, np.inf
        half = float(stats.t.ppf(0.975, number - 1)) * self.deviation / np.sqrt(number)
        return float(self.mean - half), float(self.mean + half)

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves out zero."""
        low, high = self.interval
        return low > 0 or high < 0

    def __str__(self) -> str:
        low, high = self.interval
        doubt = "" if self.is_significant else " (not significant)"
        return f"{self.name}: {self.mean:.3f} [{low:.3f}, {high:.3f}]{doubt}"


def differences(name: str, a: Sequence[float], b: Sequence[float]) -> Difference:
    """What is paired split by split."""
    return Difference(name=name, values=tuple(x - y for x, y in zip(a, b, strict=True)))
