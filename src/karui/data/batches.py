"""Reading a data set in batches: by indexing where it holds tensors, sample by sample where it does not."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Subset, TensorDataset, default_collate

from karui.errors import DataError
from karui.model.task import split_sample


def tensors_of(dataset: Any) -> tuple[Tensor, ...] | None:
    """The tensors behind a data set that holds all its samples in memory, the target last; None for any other.

    Example:
        >>> data = TensorDataset(torch.arange(4.0), torch.arange(4))
        >>> [t.tolist() for t in tensors_of(Subset(data, [3, 1]))]
        [[3.0, 1.0], [3, 1]]
    """
    if type(dataset) is TensorDataset:
        return dataset.tensors
    if type(dataset) is Subset:
        inner = tensors_of(dataset.dataset)
        if inner is not None:
            index = torch.as_tensor(dataset.indices, dtype=torch.long)
            return tuple(tensor[index] for tensor in inner)
    return None


def targets_of(dataset: Any) -> Tensor | None:
    """All targets of a data set where they can be had without reading its inputs; None otherwise."""
    tensors = tensors_of(dataset)
    if tensors is not None:
        return tensors[-1] if len(tensors) > 1 else None
    if isinstance(dataset, Subset):
        inner = targets_of(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(dataset.indices, dtype=torch.long)]
    targets = getattr(dataset, "targets", None)  # the name that torchvision's data sets use
    if targets is None or len(targets) != len(dataset):
        return None
    try:
        return torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError):  # targets that are no numbers, for example files of class maps
        return None


class Batches:
    """A data set that is asked for batches: `fetch(index)` gives their inputs, a tuple, and their targets.

    A `TensorDataset`, or a `Subset` of one, is read by one indexing operation for each tensor; any other data set is
    read sample by sample and collated.

    Example:
        >>> batches = Batches(TensorDataset(torch.arange(6.0).reshape(3, 2), torch.arange(3)))
        >>> (inputs,), targets = batches.fetch(torch.tensor([2, 0]))
        >>> inputs.tolist(), targets.tolist()
        ([[4.0, 5.0], [0.0, 1.0]], [2, 0])
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.tensors = tensors_of(dataset)
        try:
            self.samples = len(dataset)
        except TypeError as error:
            raise DataError(
                f"The data set is a {type(dataset).__name__} without a length.",
                "Give one with __len__ and __getitem__; a stream cannot be shuffled or resumed.",
            ) from error

    def __len__(self) -> int:
        return self.samples

    def fetch(self, index: Int[Tensor, "batch"]) -> tuple[tuple[Any, ...], Any]:
        """The samples of these numbers as one batch.

        Raises:
            DataError: the samples cannot be put together, for example because their shapes differ.
        """
        if self.tensors is not None:
            return split_sample(tuple(tensor[index] for tensor in self.tensors))
        numbers = index.tolist()
        samples = [self.dataset[number] for number in numbers]
        try:
            return split_sample(default_collate(samples))
        except (RuntimeError, TypeError) as error:
            raise DataError(
                f"Samples {numbers[:3]}... of the data set cannot be put in one batch: {str(error).splitlines()[0]}.",
                "Give each sample as (input tensor, target), all of one shape.",
            ) from error
