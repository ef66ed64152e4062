"""Splits: what is trained on, what decisions look at, and what no decision sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from karui.data.batches import targets_of, tensors_of
from karui.errors import DataError, SettingError, require

VALIDATION_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The three parts of a data source: torch data sets of (input, target) pairs.

    Settings:
        train: what models are trained on.
        validation: what decisions (stopping, ratios, choices) look at.
        test: what no decision looks at; for the final report.
        classes: names of the classes by number; empty where targets are no class numbers.
        name: the source, as asked for.
        augment: a batch augmentation that suits the data, `(batch, generator) -> batch`, or None.
    """

    train: Any
    validation: Any
    test: Any
    classes: tuple[str, ...] = ()
    name: str = "data"
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None


def take(dataset: Any, index: Int[Tensor, "samples"]) -> Any:
    """The samples of these numbers, as tensors where the data set holds tensors."""
    tensors = tensors_of(dataset)
    if tensors is not None:
        return TensorDataset(*(tensor[index] for tensor in tensors))
    return Subset(dataset, index.tolist())


def hold_out(dataset: Any, share: float, seed: int) -> tuple[Any, Any]:
    """The data set in two: the rest, and a held-out share.

    Where class numbers can be read cheaply each class gives its share (largest remainders, so the total is exact);
    otherwise the samples are drawn at random. The same seed draws the same samples; their order is kept.

    Raises:
        SettingError: the share is not in (0, 1).
        DataError: the data set is too small to give a sample to each part.

    Example:
        >>> data = TensorDataset(torch.arange(10.0), torch.tensor([0, 1] * 5))
        >>> rest, held = hold_out(data, 0.2, seed=0)
        >>> len(rest), sorted(held.tensors[1].tolist())
        (8, [0, 1])
    """
    require(0 < share < 1, f"share is {share}; give a share in (0, 1), for example 0.1", error=SettingError)
    samples = len(dataset)
    wanted = round(share * samples)
    require(samples > 0, "The data to train on are empty.", "Give them some samples.", DataError)
    require(
        0 < wanted < samples,
        f"The data are too few: a share of {share} cannot be held out of {samples} samples.",
        "Give more, or data of their own to validate and test with.",
        DataError,
    )
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    targets = targets_of(dataset)
    if targets is not None and targets.ndim == 1 and not targets.is_floating_point():
        order = _evenly(order, targets)
    held = order[:wanted].sort().values
    return take(dataset, order[wanted:].sort().values), take(dataset, held)


def _evenly(order: Int[Tensor, "samples"], targets: Int[Tensor, "samples"]) -> Int[Tensor, "samples"]:
    """`order` rearranged so that every beginning of it holds each class in proportion.

    The k-th of a class's n samples is put at (k + 1/2) / n of the way, as in drawing from all classes in step; ties are
    broken by the random order.
    """
    shuffled = targets[order]
    _, number, counts = shuffled.unique(return_inverse=True, return_counts=True)
    by_class = number.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    within = torch.empty_like(number)
    within[by_class] = torch.arange(len(number)) - starts.repeat_interleave(counts)
    position = (within.double() + 0.5) / counts[number].double()
    return order[position.argsort(stable=True)]
