"""What a model is for: the loss it is trained with and the score it is judged by, and what of a sample is for which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from karui.errors import require

if TYPE_CHECKING:
    from jaxtyping import Float, Int


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
        ignore: a target value that counts for nothing (a void class, padding), or None.

    Example:
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
        index = -100 if self.ignore is None else self.ignore
        return functional.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing, ignore_index=index)

    def scores(
        self, outputs: Float[Tensor, "batch classes *positions"], targets: Int[Tensor, "batch *positions"]
    ) -> Float[Tensor, "batch"]:
        """1 for a right answer, 0 for a wrong one (a share where a sample has several positions)."""
        right = (outputs.argmax(1) == targets).float()
        if right.ndim == 1:
            return right
        counted = torch.ones_like(right) if self.ignore is None else (targets != self.ignore).float()
        right, counted = (right * counted).flatten(1).sum(1), counted.flatten(1).sum(1)
        return right / counted.clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class Regression:
    """A number (or several) for each sample: mean squared error, which is also the metric (lower is better).

    Example:
        >>> Regression().scores(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [4.0]])).tolist()
        [0.0, 4.0]
    """

    metric: str = field(default="squared error", init=False)
    higher_is_better: bool = field(default=False, init=False)

    def loss(self, outputs: Float[Tensor, "*shape"], targets: Float[Tensor, "*shape"]) -> Tensor:
        """Mean squared error over the batch."""
        return functional.mse_loss(outputs, targets)

    def scores(
        self, outputs: Float[Tensor, "batch ..."], targets: Float[Tensor, "batch ..."]
    ) -> Float[Tensor, "batch"]:
        """Mean squared error of each sample."""
        return (outputs - targets).square().flatten(1).mean(1)


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
