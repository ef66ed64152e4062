"""Transfer sets: what a student is taught on, labelled or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, TensorDataset

from karui.data.batches import targets_of, tensors_of
from karui.model.task import split_sample
from karui.train.teaching import UNLABELLED


def with_unlabelled(labelled: Dataset, unlabelled: Dataset) -> Dataset:
    """One transfer set of both: samples without label count for the teachers' part of a loss only.

    Where both hold tensors in memory so does the result, which is then read by one operation for each batch.

    Args:
        labelled: (input, class number) pairs; of inputs alone, no sample of the result has a label.
        unlabelled: inputs alone, or pairs whose targets are not looked at; the inputs are of the same shapes.

    Example:
        >>> both = with_unlabelled(
        ...     TensorDataset(torch.zeros(2, 3), torch.tensor([4, 5])), TensorDataset(torch.ones(1, 3))
        ... )
        >>> [int(target) for _, target in both]
        [4, 5, -100]
    """
    known, targets = tensors_of(labelled), targets_of(labelled)
    fresh = tensors_of(unlabelled)
    if known is not None and fresh is not None and targets is not None:
        inputs, more = known[:-1], fresh[: len(known) - 1]
        if len(more) == len(inputs) and all(a.shape[1:] == b.shape[1:] for a, b in zip(inputs, more, strict=True)):
            silent = torch.full((len(more[0]), *targets.shape[1:]), UNLABELLED, dtype=targets.dtype)
            joined = (torch.cat([a, b.to(a)]) for a, b in zip(inputs, more, strict=True))
            return TensorDataset(*joined, torch.cat([targets, silent]))
    bare = len(labelled) > 0 and split_sample(labelled[0])[1] is None  # pyright: ignore[reportArgumentType]  (sized)
    return ConcatDataset([_WithoutLabels(labelled) if bare else labelled, _WithoutLabels(unlabelled)])


class _WithoutLabels(Dataset):
    def __init__(self, given: Any) -> None:
        self._given = given

    def __len__(self) -> int:
        return len(self._given)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        inputs, _ = split_sample(self._given[index])
        return inputs[0] if len(inputs) == 1 else inputs, torch.tensor(UNLABELLED)
