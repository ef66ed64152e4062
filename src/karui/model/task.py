"""What a model is for: the loss it is trained with and the score it is judged by, and what of a sample is for which."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from karui.errors import require

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

UNLABELLED = -100
"""The class number of a sample, or of a position, that has no label, whatever the task."""
NO_NUMBER = -math.inf
"""The same where targets are numbers. It is not NaN, which faulty data have, and which stops a training."""


@runtime_checkable
class Task(Protocol):
    """The loss and the metric of a model.

    `loss` is a scalar, the mean over the batch. `scores` gives one number for each sample (shape `[batch]`), whose mean
    over a data set is the metric: so every metric comes with a confidence interval. `labels` says whether targets are
    class numbers.
    """

    @property
    def metric(self) -> str:
        """The metric's name, as printed: "accuracy"."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger metric is a better model."""
        ...

    def loss(self, outputs: Any, targets: Any, /) -> Tensor:
        """The training loss of a batch."""
        ...

    def scores(self, outputs: Any, targets: Any, /) -> Tensor:
        """The metric's value for each sample of a batch, shape `[batch]`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Classification:
    """One class for each sample, or for each position of a sample: cross-entropy, judged by accuracy.

    Outputs are logits `[batch, classes, ...]` and targets class numbers `[batch, ...]`.

    Settings:
        label_smoothing: share of the target's probability spread over all classes, in [0, 1).
        ignore: a target value that counts for nothing (a void class, padding), or None. So does -100 in any case.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> Classification().scores(logits, torch.tensor([0, 0])).tolist()
        [1.0, 0.0]
    """

    label_smoothing: float = 0.0
    ignore: int | None = None
    metric: str = field(default="accuracy", init=False)
    higher_is_better: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        require(0 <= self.label_smoothing < 1, f"label_smoothing is {self.label_smoothing}; give a share in [0, 1)")

    def loss(
        self, outputs: Float[Tensor, "batch classes *positions"], targets: Int[Tensor, "batch *positions"]
    ) -> Tensor:
        """Cross-entropy, averaged over the batch (and positions)."""
        return self._cross_entropy(outputs, targets, "mean")

    def terms(
        self, outputs: Float[Tensor, "batch classes *positions"], targets: Int[Tensor, "batch *positions"]
    ) -> Float[Tensor, "batch *positions"]:
        """What each sample (or position) gives to the loss, which is their mean over those with a label; else 0."""
        return self._cross_entropy(outputs, targets, "none")

    def _cross_entropy(self, outputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
        index = UNLABELLED
        if self.ignore is not None:  # torch knows one such number only
            index, targets = self.ignore, targets.masked_fill(targets.long() == UNLABELLED, self.ignore)
        smoothing = self.label_smoothing
        return functional.cross_entropy(
            outputs, targets, label_smoothing=smoothing, ignore_index=index, reduction=reduction
        )

    def scores(
        self, outputs: Float[Tensor, "batch classes *positions"], targets: Int[Tensor, "batch *positions"]
    ) -> Float[Tensor, "batch"]:
        """1 for a right answer, 0 for a wrong one (a share where a sample has several positions)."""
        right = (outputs.argmax(1) == targets).float()
        if right.ndim == 1:
            return right
        counted = labelled(targets, self).float()
        right, counted = (right * counted).flatten(1).sum(1), counted.flatten(1).sum(1)
        return right / counted.clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class Regression:
    """A number (or several) for each sample: mean squared error, which is also the metric (lower is better).

    A target of minus infinity is none: the loss is the mean over the others.

    Example:
        >>> import torch
        >>> Regression().scores(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [4.0]])).tolist()
        [0.0, 4.0]
    """

    metric: str = field(default="squared error", init=False)
    higher_is_better: bool = field(default=False, init=False)

    def loss(self, outputs: Float[Tensor, "*shape"], targets: Float[Tensor, "*shape"]) -> Tensor:
        """Mean squared error over the batch."""
        known = labelled(targets, self)
        if bool(known.all()):
            return functional.mse_loss(outputs, targets)
        return functional.mse_loss(outputs[known], targets[known])

    def scores(
        self, outputs: Float[Tensor, "batch ..."], targets: Float[Tensor, "batch ..."]
    ) -> Float[Tensor, "batch"]:
        """Mean squared error of each sample, over the numbers that it has; 0 where it has none."""
        known, gaps = labelled(targets, self), outputs - targets
        if bool(known.all()):
            return gaps.square().flatten(1).mean(1)
        gaps = gaps.masked_fill(~known, 0)
        return gaps.square().flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class CustomTask:
    """Any task, given by its loss and its score.

    Settings:
        loss: `(outputs, targets) -> scalar`, the mean over the batch.
        scores: `(outputs, targets) -> [batch]`, one value of the metric for each sample.
        metric: the metric's name, as printed.
        higher_is_better: whether a larger metric is a better model.
    """

    loss: Callable[[Any, Any], Tensor]
    scores: Callable[[Any, Any], Tensor]
    metric: str = "score"
    higher_is_better: bool = True


def labelled(targets: Tensor, task: Task | None = None) -> Bool[Tensor, "..."]:
    """Where targets are labels: class numbers but -100 and the task's own `ignore`, numbers but -inf.

    Example:
        >>> import torch
        >>> labelled(torch.tensor([3, -100, 255]), Classification(ignore=255)).tolist()
        [True, False, False]
        >>> labelled(torch.tensor([3.0, -torch.inf])).tolist()
        [True, False]
    """
    known = targets != NO_NUMBER if targets.is_floating_point() else targets.long() != UNLABELLED
    ignore = ignored_by(task)
    return known if ignore is None else known & (targets != ignore)


def judged(targets: Any, samples: int, task: Task | None = None) -> Bool[Tensor, "batch"]:
    """Which samples of a batch have a label at all: the others say nothing of a model, and no metric counts them.

    Args:
        targets: of the batch: a tensor, or a dict and the like of such.
        samples: how many there are.
        task: whose `ignore` is no label.

    Example:
        >>> import torch
        >>> judged(torch.tensor([[3, -100], [-100, -100]]), 2).tolist()
        [True, False]
    """
    parts = [x for x in tree_leaves(targets) if isinstance(x, Tensor) and x.ndim > 0 and len(x) == samples]
    # A picture without objects has an empty target, and that is a label.
    known = [labelled(x, task).reshape(samples, -1).any(1) for x in parts if x.numel() > 0]
    return torch.stack(known).any(0) if known else torch.ones(samples, dtype=torch.bool)


def ignored_by(task: Task | None) -> int | None:
    """The target that a task counts for nothing, if it names one as `ignore`."""
    return getattr(task, "ignore", None)


def split_sample(sample: Any) -> tuple[tuple[Any, ...], Any]:
    """A sample or batch `(input, target)` as its tuple of inputs and its target; a bare input has the target None."""
    if not isinstance(sample, (tuple, list)):
        return (sample,), None
    if len(sample) == 1:
        return (sample[0],), None
    *inputs, target = sample
    if len(inputs) == 1 and isinstance(inputs[0], (tuple, list)):
        inputs = list(inputs[0])
    return tuple(inputs), target
