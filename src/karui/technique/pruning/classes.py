"""A bench for some of the classes only: pruning a network for the part of its task that is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Subset

from karui.data import targets_of
from karui.errors import DataError, require

if TYPE_CHECKING:
    from karui.technique.bench import Bench


def of_classes(bench: Bench, classes: Sequence[int]) -> Bench:
    """The bench with the samples of some classes only, in every split: scores, training and test for a subset.

    Raises:
        DataError: a class has no sample, or targets are no class numbers.
    """
    splits = {"train": bench.train, "validation": bench.validation, "test": bench.test}
    return replace(
        bench, **{name: None if data is None else _only(data, classes, name) for name, data in splits.items()}
    )


def _only(data: Any, classes: Sequence[int], split: str) -> Subset[Any]:
    targets = targets_of(data)
    if targets is None:
        targets = torch.as_tensor([int(data[number][-1]) for number in range(len(data))])
    require(
        targets.ndim == 1 and not targets.is_floating_point(),
        f"The targets of the {split} split are no class numbers, so classes cannot be chosen.",
        "Leave classes empty.",
        DataError,
    )
    missing = sorted(set(classes) - set(targets.tolist()))
    require(
        not missing, f"The {split} split has no sample of class {missing[:3]}.", "Choose among its classes.", DataError
    )
    return Subset(data, torch.isin(targets, torch.tensor(list(classes))).nonzero().flatten().tolist())
