"""Detection: objects of a picture by class and box, for networks that judge a fixed set of anchors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from karui.errors import require
from karui.model.task import labelled
from karui.numerics.boxes import Found, assigned, boxes_at, hits, offsets_from, suppressed

if TYPE_CHECKING:
    from jaxtyping import Float, Int

IGNORED = -1
"""The class of an anchor that counts as neither object nor background."""


def grid_anchors(
    size: tuple[int, int], stride: int, sides: Sequence[tuple[float, float]]
) -> tuple[tuple[float, ...], ...]:
    """Anchors of some sizes around every cell of a grid: cell by cell, row by row, and all sizes of a cell together.

    Args:
        size: rows and columns of the grid.
        stride: width of a cell.
        sides: width and height of each anchor of a cell.

    Example:
        >>> grid_anchors((1, 2), 8, [(8, 4)])
        ((0.0, 2.0, 8.0, 6.0), (8.0, 2.0, 16.0, 6.0))
    """
    return tuple(
        ((x + 0.5) * stride - w / 2, (y + 0.5) * stride - h / 2, (x + 0.5) * stride + w / 2, (y + 0.5) * stride + h / 2)
        for y in range(size[0])
        for x in range(size[1])
        for w, h in sides
    )


@dataclass(frozen=True, kw_only=True)
class Detection:
    """Objects by class and box: cross-entropy over anchors and a smooth L1 distance of boxes, judged by F1.

    Outputs are a pair: logits `[batch, classes + 1, anchors]`, of which class 0 is the background, and offsets
    `[batch, 4, anchors]` of the boxes from their anchors. Targets are `[batch, objects, 5]`: class (from 1), left, top,
    right, bottom; rows of class 0 fill up. The score of a picture is its F1: 2 right / (found + objects), where a box
    is right from an overlap (intersection over union) of `overlap` on.

    Settings:
        anchors: (left, top, right, bottom) of each.
        positive: overlap from which an anchor stands for an object; the best one of each object does anyway.
        negative: overlap below which it is background; between the two it counts as neither.
        weight: of the boxes' part in the loss.
        foreground: share of the anchors of objects in the classes' part; the others are far more.
        confidence: probability from which a box is found.
        overlap: from which a box is right, and a worse box of its class is struck off.

    Example:
        >>> task = Detection(anchors=grid_anchors((2, 2), 8, [(8, 8)]))
        >>> labels, _ = task.matched(torch.tensor([[[3.0, 0.0, 0.0, 8.0, 8.0]]]))
        >>> labels.tolist()
        [[3, 0, 0, 0]]
    """

    anchors: tuple[tuple[float, ...], ...]
    positive: float = 0.5
    negative: float = 0.4
    weight: float = 1.0
    foreground: float = 0.25
    confidence: float = 0.5
    overlap: float = 0.5
    metric: str = field(default="F1 of boxes", init=False)
    higher_is_better: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "anchors", tuple(tuple(map(float, anchor)) for anchor in self.anchors))
        flat = all(len(anchor) == 4 and anchor[0] < anchor[2] and anchor[1] < anchor[3] for anchor in self.anchors)
        require(len(self.anchors) > 0 and flat, "anchors are (left, top, right, bottom), each with some area")
        require(0 < self.negative <= self.positive <= 1, "give 0 < negative <= positive <= 1, for example 0.4 and 0.5")
        require(self.weight >= 0, f"weight is {self.weight}; give a number from 0, for example 1")
        require(0 < self.foreground < 1, f"foreground is {self.foreground}; give a share, for example 0.25")
        require(0 < self.overlap < 1, f"overlap is {self.overlap}; give a number between 0 and 1, for example 0.5")
        require(0 <= self.confidence < 1, f"confidence is {self.confidence}; give a probability, for example 0.5")

    @cached_property
    def _boxes(self) -> Float[Tensor, "anchors 4"]:
        return torch.tensor(self.anchors)

    def matched(
        self, targets: Float[Tensor, "batch objects 5"]
    ) -> tuple[Int[Tensor, "batch anchors"], Float[Tensor, "batch 4 anchors"]]:
        """The class of each anchor (0 is background, -1 counts as neither), and the offsets of the object on it.

        No anchor counts in a picture without label, whose target is minus infinity: nobody says that it is empty.
        """
        boxes, known = self._boxes.to(targets), labelled(targets).flatten(1).all(1)
        targets = targets.masked_fill(~known[:, None, None], 0)
        which = assigned(boxes, targets[..., 1:], targets[..., 0] > 0, self.positive, self.negative)
        row = torch.arange(len(targets), device=targets.device)[:, None]
        taken = targets[row, which.clamp(min=0)]
        labels = taken[..., 0].long().masked_fill(which == -1, 0)
        labels = labels.masked_fill((which < -1) | ~known[:, None], IGNORED)
        wanted = torch.where(which[..., None] >= 0, taken[..., 1:], boxes)
        return labels, offsets_from(boxes.expand_as(wanted), wanted).transpose(1, 2)

    def weights(self, labels: Int[Tensor, "batch anchors"]) -> Float[Tensor, "batch anchors"]:
        """What each anchor weighs in the classes' part: those of objects `foreground` together, the others the rest.

        This is what a sampling of one object's anchor to three of the background gives on average.
        """
        parts = ((labels > 0, self.foreground), (labels == 0, 1 - self.foreground))
        return sum(
            (mask * (share / mask.sum().clamp(min=1)) for mask, share in parts), torch.zeros_like(labels).float()
        )

    def class_loss(
        self, logits: Float[Tensor, "batch classes anchors"], labels: Int[Tensor, "batch anchors"]
    ) -> Tensor:
        """Cross-entropy, the weighted mean over the anchors that count."""
        terms = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
        return (terms * self.weights(labels)).sum()

    def box_loss(
        self,
        offsets: Float[Tensor, "batch 4 anchors"],
        wanted: Float[Tensor, "batch 4 anchors"],
        labels: Int[Tensor, "batch anchors"],
    ) -> Tensor:
        """Smooth L1 distance, summed over the four offsets and averaged over the anchors of objects."""
        terms = functional.smooth_l1_loss(offsets, wanted, reduction="none").sum(1)
        return mean_over(terms, labels > 0)

    def loss(self, outputs: tuple[Tensor, Tensor], targets: Float[Tensor, "batch objects 5"]) -> Tensor:
        """The classes' part and `weight` times the boxes' part."""
        labels, wanted = self.matched(targets)
        return self.class_loss(outputs[0], labels) + self.weight * self.box_loss(outputs[1], wanted, labels)

    def found(self, outputs: tuple[Tensor, Tensor], confidence: float | None = None) -> list[Found]:
        """The objects found in each picture, best first; overlapping boxes of a class are struck off.

        Args:
            outputs: of the network.
            confidence: probability from which a box counts, in place of the task's; small for a precision-recall curve.
        """
        limit = self.confidence if confidence is None else confidence
        return [
            self._found(logits, offsets, limit)
            for logits, offsets in zip(outputs[0].detach().cpu(), outputs[1].detach().cpu(), strict=True)
        ]

    def _found(self, logits: Tensor, offsets: Tensor, limit: float) -> Found:
        scores, classes = logits.softmax(0)[1:].max(0)
        kept = scores >= limit
        boxes = boxes_at(self._boxes[kept], offsets[:, kept].T)
        scores, classes = scores[kept], classes[kept] + 1
        # Boxes of different classes are moved far apart, so that none strikes off one of another class.
        reach = float(boxes.abs().max()) * 3 + 1 if len(boxes) else 0.0
        order = suppressed(boxes + reach * classes[:, None], scores, self.overlap)
        return Found(boxes[order], classes[order], scores[order])

    def truth(self, targets: Float[Tensor, "batch objects 5"]) -> list[Found]:
        """What is in each picture."""
        held = [rows[rows[:, 0] > 0].detach().cpu() for rows in targets]
        return [Found(rows[:, 1:], rows[:, 0].long(), torch.ones(len(rows))) for rows in held]

    def scores(
        self, outputs: tuple[Tensor, Tensor], targets: Float[Tensor, "batch objects 5"]
    ) -> Float[Tensor, "batch"]:
        """F1 of each picture; 1 where there is nothing and nothing was found."""
        values = []
        for found, truth in zip(self.found(outputs), self.truth(targets), strict=True):
            count = len(found.boxes) + len(truth.boxes)
            values.append(2 * int(hits(found, truth, self.overlap).sum()) / count if count else 1.0)
        return torch.tensor(values)


def mean_over(terms: Float[Tensor, "..."], counted: Tensor) -> Tensor:
    """The mean of the terms that count; 0, with a gradient of zero, where none does."""
    return (terms * counted).sum() / counted.sum().clamp(min=1)
