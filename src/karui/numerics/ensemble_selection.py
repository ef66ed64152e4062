"""Ensemble selection: which models of a library, and how often each, make the best mean (survey 36, section 2.1).

Greedy forward selection with replacement (Caruana and others, 2004): the model that helps the mean most on data held
out is added, again and again; the best ensemble on the way is taken. A model that is added twice weighs twice.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from karui.errors import require

Metric = Callable[[Float[np.ndarray, "samples outputs"], np.ndarray], float]
"""How good predictions are for targets; more is better."""


def minus_rmse(predictions: Float[np.ndarray, "samples outputs"], targets: np.ndarray) -> float:
    """The root of the mean squared error, negated; class numbers as targets stand for their indicators.

    Example:
        >>> minus_rmse(np.array([[0.5, 0.5]]), np.array([1]))
        -0.5
    """
    numbered = targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer)
    wanted = np.eye(predictions.shape[1])[targets] if numbered else targets.reshape(predictions.shape)
    return -float(np.sqrt(np.square(predictions - wanted).mean()))


def select_ensemble(
    predictions: Float[np.ndarray, "models samples outputs"],
    targets: np.ndarray,
    *,
    rounds: int = 50,
    metric: Metric = minus_rmse,
) -> Int[np.ndarray, "models"]:
    """How often each model is in the best ensemble on the way.

    Args:
        predictions: of each model of the library, probabilities or numbers, on data that none was trained on.
        targets: of these samples, class numbers or numbers.
        rounds: models that are added.
        metric: what is climbed.

    Raises:
        SettingError: there is no model or no round.

    Example:
        >>> sure = np.array([[[0.9, 0.1], [0.6, 0.4]], [[0.4, 0.6], [0.1, 0.9]], [[0.1, 0.9], [0.9, 0.1]]])
        >>> select_ensemble(sure, np.array([0, 1]), rounds=4).tolist()
        [1, 1, 0]
    """
    require(len(predictions) > 0 and rounds > 0, f"{len(predictions)} models and {rounds} rounds; give one at least")
    total = np.zeros(predictions.shape[1:])
    counts = np.zeros(len(predictions), dtype=np.int64)
    best, found = -np.inf, counts.copy()
    for number in range(1, rounds + 1):
        scores = [metric((total + one) / number, targets) for one in predictions]
        chosen = int(np.argmax(scores))
        total = total + predictions[chosen]
        counts[chosen] += 1
        if scores[chosen] > best:
            best, found = scores[chosen], counts.copy()
    return found
