"""Data sources by name: `load_data` turns a word of the command line into splits."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset

from karui.data.splits import VALIDATION_SHARE, Splits, hold_out
from karui.errors import did_you_mean

DIGITS_TEST = 597


def load_data(spec: str, *, seed: int = 0) -> Splits:
    """The splits that a data specification names.

    Args:
        spec: `digits`.
        seed: draws what is held out for validation; the test split does not depend on it.

    Raises:
        UsageError: the specification is not known.

    Example:
        >>> splits = load_data("digits")
        >>> len(splits.train), len(splits.validation), len(splits.test), splits.train[0][0].shape
        (1080, 120, 597, torch.Size([1, 8, 8]))
    """
    if spec != "digits":
        did_you_mean(spec, ["digits"], "Data")
    return digits(seed=seed)


def digits(*, seed: int = 0) -> Splits:
    """scikit-learn's 1,797 handwritten digits, 8x8, gray, in [0, 1]: 1,200 to train on, 597 to test."""
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    inputs = torch.from_numpy(pictures).float().div(16).reshape(-1, 1, 8, 8)
    everything = TensorDataset(inputs, torch.from_numpy(labels).long())
    rest, test = hold_out(everything, DIGITS_TEST / len(everything), seed=0)
    train, validation = hold_out(rest, VALIDATION_SHARE, seed)
    return Splits(
        train=train, validation=validation, test=test, classes=tuple(str(digit) for digit in range(10)), name="digits"
    )
