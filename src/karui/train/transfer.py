"""Transfer sets: what a student is taught on, labelled or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import ConcatDataset, Dataset, TensorDataset

from karui.data.batches import targets_of, tensors_of
from karui.errors import DataError, require
from karui.model import Task
from karui.model.task import NO_NUMBER, UNLABELLED, ignored_by, split_sample


def with_unlabelled(labelled: Dataset, unlabelled: Dataset, task: Task | None = None) -> Dataset:
    """One transfer set of both: samples without label count for the teachers' part of a loss only.

    Their targets have the form of the labelled ones, and are the class that the task ignores, or -100; of numbers, they
    are minus infinity. Where both hold tensors in memory so does the result, which is then read by one operation for
    each batch.

    Args:
        labelled: (input, target) pairs, or several inputs and a target; of one input alone, no sample of the result has
            a label.
        unlabelled: inputs alone, or with targets that are not looked at; the inputs are of the same number and shapes.
        task: whose `ignore`, if it has one, marks samples without label; -100 does under any `Classification`.

    Raises:
        DataError: a sample of the pool has another number of inputs.

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
            silent = _silent(targets[:1], task).expand(len(more[0]), *targets.shape[1:])
            joined = (torch.cat([a, b.to(a)]) for a, b in zip(inputs, more, strict=True))
            return TensorDataset(*joined, torch.cat([targets, silent]))
    samples = len(labelled)  # pyright: ignore[reportArgumentType]  (sized)
    require(samples > 0, "The labelled data have no samples.", "Give one: the pool's take its form.", DataError)
    sample = labelled[0]
    inputs, target = split_sample(sample)
    nested = isinstance(sample, tuple | list) and isinstance(sample[0], tuple | list)
    silent = UNLABELLED if target is None else tree_map(lambda leaf: _silent(leaf, task), target)
    pool = _WithoutLabels(unlabelled, len(inputs), silent, nested=nested)
    if len(pool):
        pool[0]  # one that does not fit is told now
    return ConcatDataset([_WithoutLabels(labelled, 1, silent) if target is None else labelled, pool])


def _silent(target: Any, task: Task | None) -> Any:
    """A target of the same kind and shape that is no label; samples of one kind alone can be put in one batch."""
    ignore = ignored_by(task)
    if isinstance(target, Tensor):
        mark = _mark(target.is_floating_point(), ignore)
        # Bytes hold no negative number: it would wrap round to a class.
        kind = target.dtype if target.dtype.is_signed or mark >= 0 else torch.int64
        return torch.full_like(target, mark, dtype=kind)
    if isinstance(target, np.ndarray | np.generic):
        floating = np.issubdtype(target.dtype, np.floating)
        mark = _mark(bool(floating), ignore)
        kind = target.dtype if floating or mark >= 0 or np.issubdtype(target.dtype, np.signedinteger) else np.int64
        return np.full_like(target, mark, dtype=kind)[()]
    return _mark(isinstance(target, float), ignore)


def _mark(floating: bool, ignore: int | None) -> float:
    """What stands for no label."""
    if ignore is not None:
        return ignore
    return NO_NUMBER if floating else UNLABELLED


class _WithoutLabels(Dataset):
    """Inputs of a pool, each with the same target.

    Args:
        given: the pool.
        inputs: how many there are in a sample; what comes behind them is a target.
        silent: the target of all.
        nested: whether inputs are to be a tuple of their own before the target, as in the data that they join.
    """

    def __init__(self, given: Any, inputs: int, silent: Any, *, nested: bool = False) -> None:
        self._given, self._inputs, self._silent, self._nested = given, inputs, silent, nested

    def __len__(self) -> int:
        return len(self._given)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        sample = self._given[index]
        inputs, _ = split_sample(sample)
        if len(inputs) != self._inputs and isinstance(sample, tuple | list):  # without a target, all are inputs
            inputs = tuple(sample[0] if len(sample) == 1 and isinstance(sample[0], tuple | list) else sample)
        require(
            len(inputs) == self._inputs,
            f"A sample of the unlabelled pool has {len(inputs)} inputs, and a labelled one {self._inputs}.",
            "Give the same inputs in the same order, without a target or with one behind them.",
            DataError,
        )
        return (inputs, self._silent) if self._nested else (*inputs, self._silent)
