"""Data sources by name: `load_data` turns a word of the command line into splits."""

from __future__ import annotations

from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch
from torch.utils.data import TensorDataset

from karui.data.arrays import npz, npz_inputs
from karui.data.cifar import cifar10
from karui.data.pictures import folder
from karui.data.splits import VALIDATION_SHARE, Splits, hold_out
from karui.errors import DataError, KaruiError, UsageError, did_you_mean, require
from karui.model.importing import load_callable

DIGITS_TEST = 597


def load_data(spec: str, *, seed: int = 0) -> Splits:
    """The splits that a data specification names.

    Args:
        spec: one of
            `digits`: 8x8 handwritten digits, built in;
            `folder:PATH`: pictures, one folder a class, with options as in `folder:PATH?size=32&channels=1`;
            `npz:PATH`: arrays train_x, train_y, test_x, test_y, or x and y;
            `cifar10:PATH`: CIFAR-10 as sheets;
            `package.module:function` or `file.py:function`, which returns (train, test), (train, validation, test)
            or a `Splits`.
        seed: draws what is held out for validation; the test split never depends on it.

    Raises:
        UsageError: the specification is not known, or the function is not there.
        DataError: the data cannot be read.

    Example:
        >>> splits = load_data("digits")
        >>> len(splits.train), len(splits.validation), len(splits.test), splits.train[0][0].shape
        (1080, 120, 597, torch.Size([1, 8, 8]))
    """
    if spec == "digits":
        return digits(seed=seed)
    kind, colon, rest = spec.partition(":")
    require(
        bool(colon and rest) or kind not in _READERS,
        f"'{kind}' needs a path.",
        f"Write {kind}:PATH.",
        UsageError,
    )
    if kind in _READERS:
        where, _, query = rest.partition("?")
        return _READERS[kind](Path(where).expanduser(), seed=seed, **_options(kind, query))
    if not colon:
        names = ["digits", *(f"{name}:PATH" for name in _READERS), "package.module:function", "file.py:function"]
        did_you_mean(spec, names, "Data")
    return _own(spec, seed)


def load_unlabelled(spec: str, *, seed: int = 0) -> Any:
    """A pool of samples whose labels are not looked at: the training split of what a data specification names.

    Args:
        spec: as for `load_data`; in an .npz file an array `x` (or `train_x`) is enough.
        seed: as for `load_data`.

    Raises:
        UsageError: the specification is not known.
        DataError: the data cannot be read.

    Example:
        >>> len(load_unlabelled("digits"))
        1080
    """
    kind, _, rest = spec.partition(":")
    if kind == "npz" and rest:
        return npz_inputs(Path(rest).expanduser())
    return load_data(spec, seed=seed).train


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


_READERS: dict[str, Callable[..., Splits]] = {"folder": folder, "npz": npz, "cifar10": cifar10}
_OPTIONS = {"folder": ("size", "channels"), "npz": (), "cifar10": ()}


def _options(kind: str, query: str) -> dict[str, int]:
    """The options after the question mark, all whole positive numbers."""
    given = parse_qsl(query, keep_blank_values=True)
    for name, value in given:
        if name not in _OPTIONS[kind]:
            did_you_mean(name, list(_OPTIONS[kind]), f"{kind}: option")
        require(
            value.isdecimal() and int(value) > 0,
            f"{kind}: {name} is '{value}'; give a positive number, as in {kind}:PATH?{name}=32.",
            error=UsageError,
        )
    return {name: int(value) for name, value in given}


def _own(spec: str, seed: int) -> Splits:
    """What a user's function returns, as splits."""
    function = load_callable(spec)
    try:
        made = function()
    except KaruiError:
        raise
    except Exception as error:
        raise DataError(f"The function '{spec}' failed: {type(error).__name__}: {error}.") from error
    if isinstance(made, Splits):
        return made
    parts: tuple[Any, ...] = made if isinstance(made, tuple) else ()
    require(
        len(parts) in (2, 3) and all(callable(getattr(part, "__getitem__", None)) for part in parts),
        f"The function '{spec}' returned a {type(made).__name__}, not data sets.",
        "Return (train, test), two torch data sets of (input, target) pairs.",
        DataError,
    )
    endless = next((type(part).__name__ for part in parts if not isinstance(part, Sized)), "")
    require(
        not endless,
        f"The function '{spec}' returned a {endless}, which has no length.",
        "Give data sets with __len__ and __getitem__; a stream cannot be split, shuffled or resumed.",
        DataError,
    )
    train, *validation, test = parts
    if validation:
        return Splits(train=train, validation=validation[0], test=test, name=spec)
    train, held = hold_out(train, VALIDATION_SHARE, seed)
    return Splits(train=train, validation=held, test=test, name=spec)
