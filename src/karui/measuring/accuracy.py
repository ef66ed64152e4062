"""How good a model is on a data set, with the uncertainty of a finite sample."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import Subset, TensorDataset, default_collate

from karui.errors import DataError, NeedError, require
from karui.measuring import values
from karui.measuring.bar import bar
from karui.measuring.inference import inference, tensors_of
from karui.model import Classification, Model
from karui.model.task import judged, split_sample

Z95 = 1.959963984540054
"""The normal quantile of a two-sided 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """A metric over a data set.

    Settings:
        value: the mean over the samples that have a label.
        low, high: its 95 % interval: Wilson's where each sample is right or wrong, else the normal one.
        count: number of these samples.
        metric: the metric's name.
        higher_is_better: whether a larger value is a better model.
    """

    value: float
    low: float
    high: float
    count: int
    metric: str
    higher_is_better: bool = True

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return values.to_json(self)

    def __str__(self) -> str:
        if self.metric == "accuracy":
            return f"{self.metric} {self.value:.2%} [{self.low:.2%}, {self.high:.2%}] on {self.count} samples"
        return f"{self.metric} {self.value:.4g} [{self.low:.4g}, {self.high:.4g}] on {self.count} samples"


def evaluate(model: Model, dataset: Any, batch_size: int = 256, *, progress: bool = False) -> Score:
    """The model's metric on a data set of (input, target) pairs, with a 95 % interval.

    Raises:
        NeedError: the model has no task, or there is no data.
        DataError: the data set is empty or has no label, or its samples do not fit the model.
    """
    scores = sample_scores(model, dataset, batch_size, progress=progress)
    assert model.task is not None  # noqa: S101  (sample_scores refused it)
    value, low, high = mean_interval(scores)
    return Score(
        value=value,
        low=low,
        high=high,
        count=len(scores),
        metric=model.task.metric,
        higher_is_better=model.task.higher_is_better,
    )


def sample_scores(
    model: Model, dataset: Any, batch_size: int = 256, *, progress: bool = False
) -> Float[Tensor, "samples"]:
    """The metric of each sample that has a label, in the order of the data set.

    Raises:
        NeedError: the model has no task, or there is no data.
        DataError: the data set is empty or has no label, or its samples do not fit the model.
    """
    task = model.task
    if task is None:
        raise NeedError("The model has no task to judge it by.", "Give Model(..., task=karui.Classification()).")
    require(dataset is not None, "There is no data to evaluate on.", "Give Bench(test=...), or --data.", NeedError)
    require(len(dataset) > 0, "The data set is empty: nothing can be evaluated on it.", "Check the split.", DataError)
    device = next((t.device for t in model.module.parameters()), torch.device("cpu"))
    found = []
    with inference(model.module) as module, bar("evaluate", len(dataset), progress) as advance:
        for pair in _batches(dataset, batch_size):
            inputs, targets = tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, pair)
            outputs = None
            try:
                outputs = module(*inputs)
                scores = task.scores(outputs, targets).detach().double().cpu()
                found.append(scores[judged(targets, len(scores), task).cpu()])
            except (RuntimeError, IndexError, ValueError, TypeError, AttributeError) as error:
                line = str(error).strip().partition("\n")[0].rstrip(".")
                raise DataError(
                    f"The model cannot be evaluated on inputs {_shapes(inputs)}, targets {_shapes(targets)}: {line}.",
                    _remedy(model, outputs, targets),
                ) from error
            advance(len(scores))
    told = torch.cat(found)
    require(len(told) > 0, "No sample of the data set has a label.", "Give labelled ones to judge by.", DataError)
    return told


def _remedy(model: Model, outputs: Any, targets: Any) -> str:
    """What to do about data or outputs that do not fit."""
    if outputs is None:
        return f"Its example inputs are {_shapes(model.example)}; give data of that form."
    pair = isinstance(outputs, Tensor) and isinstance(targets, Tensor) and outputs.ndim > 2
    if pair and isinstance(model.task, Classification) and outputs.shape[:-1] == targets.shape:
        return "Logits are [batch, classes, ...]: end its forward with logits.movedim(-1, 1)."
    return f"Its outputs are {_shapes(outputs)}; see {type(model.task).__name__} for the form that it takes."


def _shapes(values: Any) -> str:
    return ", ".join(str(list(t.shape)) for t in tensors_of(values))


def mean_interval(scores: Float[Tensor, "samples"]) -> tuple[float, float, float]:
    """The mean and its 95 % interval.

    Wilson's for scores of 0 and 1, which holds near 0 and 1 too; else the normal one.

    Example:
        >>> [round(v, 3) for v in mean_interval(torch.tensor([1.0, 1.0, 1.0, 0.0]))]
        [0.75, 0.301, 0.954]
    """
    scores = scores.double()
    n, mean = len(scores), scores.mean().item()
    if bool(((scores == 0) | (scores == 1)).all()):
        middle = (mean + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 / (1 + Z95**2 / n) * math.sqrt(mean * (1 - mean) / n + Z95**2 / (4 * n**2))
        return mean, min(max(0.0, middle - half), mean), max(min(1.0, middle + half), mean)
    if n < 2:
        return mean, -math.inf, math.inf
    half = Z95 * scores.std().item() / math.sqrt(n)
    return mean, mean - half, mean + half


def _batches(dataset: Any, size: int) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Batches in order. Data sets that hold tensors are sliced, which saves collating sample by sample."""
    picks, whole = None, dataset
    while isinstance(whole, Subset):
        indices = torch.as_tensor(list(whole.indices))
        picks, whole = indices if picks is None else indices[picks], whole.dataset
    for start in range(0, len(dataset), size):
        if isinstance(whole, TensorDataset):
            part = slice(start, start + size) if picks is None else picks[start : start + size]
            batch: Any = tuple(t[part] for t in whole.tensors)
        else:
            batch = default_collate([dataset[number] for number in range(start, min(start + size, len(dataset)))])
        inputs, targets = split_sample(batch)
        require(
            targets is not None,
            "The data set's samples are not (input, target) pairs.",
            "Return a pair from __getitem__; of several inputs each comes before the target, or all in a tuple.",
            DataError,
        )
        yield inputs, targets
