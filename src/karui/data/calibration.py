"""Calibration: seeded batches of inputs, without their targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from karui.data.batches import Batches
from karui.errors import DataError, require


def calibration_batches(dataset: Any, samples: int = 256, batch: int = 64, seed: int = 0) -> Iterator[tuple[Any, ...]]:
    """Batches of inputs of a random subset, the same for the same seed; all of the data where it has fewer samples.

    Each batch is the tuple of a model's inputs. Where a data set holds tensors, its samples never leave them but by one
    indexing operation for each batch.

    Raises:
        SettingError: `samples` or `batch` is not positive.
        DataError: the data set is empty.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.zeros(10, 3), torch.zeros(10))
        >>> [x.shape[0] for (x,) in calibration_batches(data, samples=5, batch=2)]
        [2, 2, 1]
    """
    require(samples > 0, f"samples is {samples}; give a positive number, for example 256")
    require(batch > 0, f"batch is {batch}; give a positive number, for example 64")
    require(len(dataset) > 0, "The calibration data has no samples.", "Give a data set that is not empty.", DataError)
    return _drawn(dataset, samples, batch, seed)


def _drawn(dataset: Any, samples: int, batch: int, seed: int) -> Iterator[tuple[Any, ...]]:
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:samples]
    batches = Batches(dataset)
    for index in order.split(batch):
        yield batches.fetch(index)[0]


@dataclass(frozen=True)
class Calibration:
    """Calibration batches that can be gone through any number of times, each time read anew.

    Settings:
        dataset, samples, batch, seed: as of `calibration_batches`.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> calibration = Calibration(TensorDataset(torch.zeros(10, 3), torch.zeros(10)), samples=5, batch=2)
        >>> len(list(calibration)), len(list(calibration))
        (3, 3)
    """

    dataset: Any
    samples: int = 256
    batch: int = 64
    seed: int = 0

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """The batches, the same each time."""
        return calibration_batches(self.dataset, self.samples, self.batch, self.seed)
