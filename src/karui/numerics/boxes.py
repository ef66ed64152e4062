"""Boxes of objects: overlap, offsets from anchors, which anchor stands for which object, and average precision.

A box is (left, top, right, bottom), in any unit. Offsets are those of region-based detectors: the shift of the centre
as a share of the anchor's size, and the logarithm of the ratio of the sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def overlaps(a: Float[Tensor, "*batch boxes 4"], b: Float[Tensor, "*batch others 4"]) -> Float[Tensor, "..."]:
    """Intersection over union of every box with every other, `[*batch, boxes, others]`; 0 where both are empty.

    Example:
        >>> overlaps(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 0.0, 3.0, 2.0]]))
        tensor([[0.3333]])
    """
    low = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    high = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    one, other = ((boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1) for boxes in (a, b))
    return shared / (one[..., :, None] + other[..., None, :] - shared).clamp(min=1e-9)


def offsets_from(anchors: Float[Tensor, "*boxes 4"], boxes: Float[Tensor, "*boxes 4"]) -> Float[Tensor, "*boxes 4"]:
    """Where a box lies as seen from its anchor; `boxes_at` is the inverse."""
    size, wanted = (part[..., 2:] - part[..., :2] for part in (anchors, boxes))
    shift = ((boxes[..., :2] + boxes[..., 2:]) - (anchors[..., :2] + anchors[..., 2:])) / 2 / size
    return torch.cat([shift, (wanted.clamp(min=1e-6) / size).log()], -1)


def boxes_at(anchors: Float[Tensor, "*boxes 4"], offsets: Float[Tensor, "*boxes 4"]) -> Float[Tensor, "*boxes 4"]:
    """The boxes that offsets stand for.

    Example:
        >>> anchors, boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([[1.0, 1.0, 3.0, 5.0]])
        >>> boxes_at(anchors, offsets_from(anchors, boxes)).tolist()
        [[1.0, 1.0, 3.0, 5.0]]
    """
    size = anchors[..., 2:] - anchors[..., :2]
    centre = (anchors[..., :2] + anchors[..., 2:]) / 2 + offsets[..., :2] * size
    half = offsets[..., 2:].clamp(max=4.0).exp() * size / 2  # no more than 55 times the anchor: no infinite box
    return torch.cat([centre - half, centre + half], -1)


def assigned(
    anchors: Float[Tensor, "boxes 4"],
    objects: Float[Tensor, "batch objects 4"],
    there: Bool[Tensor, "batch objects"],
    positive: float,
    negative: float,
) -> Int[Tensor, "batch boxes"]:
    """The object that each anchor stands for: its number; -1 for the background, -2 for what counts as neither.

    An anchor takes the object that it overlaps most, from `positive` on; below `negative` it is background. Every
    object has at least the anchor that overlaps it most.

    Args:
        anchors: the boxes that are judged.
        objects: of each picture, filled up to one number.
        there: which of them are no filling.
        positive: overlap from which an anchor stands for an object.
        negative: overlap below which it is background.
    """
    shared = overlaps(anchors.expand(len(objects), -1, -1), objects).masked_fill(~there[:, None], 0.0)
    best, which = shared.max(2)
    which = which.masked_fill(best < positive, -2).masked_fill(best < negative, -1)
    nearest = shared.argmax(1)
    picture, number = there.nonzero(as_tuple=True)
    which[picture, nearest[picture, number]] = number
    return which


def suppressed(boxes: Float[Tensor, "boxes 4"], scores: Float[Tensor, "boxes"], overlap: float) -> list[int]:
    """Numbers of the boxes that stay, best first, where each strikes off all worse ones that it overlaps by more."""
    left, kept = scores.argsort(descending=True).tolist(), []
    shared = overlaps(boxes, boxes) > overlap
    while left:
        kept.append(left[0])
        row: Bool[Tensor, "boxes"] = shared[left[0]]
        left = [number for number in left[1:] if not row[number]]
    return kept


@dataclass(frozen=True)
class Found:
    """What was found in a picture, or is in it.

    Settings:
        boxes: `[objects, 4]`.
        classes: `[objects]`.
        scores: `[objects]`; of no meaning for what is in it.
    """

    boxes: Float[Tensor, "objects 4"]
    classes: Int[Tensor, "objects"]
    scores: Float[Tensor, "objects"]


def hits(found: Found, truth: Found, overlap: float = 0.5) -> Bool[Tensor, "objects"]:
    """Which of the found objects are right: each takes the object of its class that it overlaps most, best score first.

    An object is found once; a second box on it is wrong, as is one whose best object is overlapped by less.
    """
    right = torch.zeros(len(found.boxes), dtype=torch.bool)
    taken: set[int] = set()
    shared = overlaps(found.boxes, truth.boxes)
    shared = shared.masked_fill(found.classes[:, None] != truth.classes[None], 0.0)
    for number in found.scores.argsort(descending=True).tolist():
        if not len(truth.boxes):
            break
        best = int(shared[number].argmax())
        if float(shared[number, best]) >= overlap and best not in taken:
            taken.add(best)
            right[number] = True
    return right


def average_precision(right: Bool[Tensor, "found"], scores: Float[Tensor, "found"], objects: int) -> float:
    """Area under the curve of precision over recall, each precision being the best at that recall or above.

    Args:
        right: whether each found box is right.
        scores: what they are ranked by.
        objects: how many there were to find.

    Example:
        >>> average_precision(torch.tensor([True, False, True]), torch.tensor([0.9, 0.8, 0.7]), 2)
        0.8333333333333333
    """
    if objects == 0 or not len(right):
        return 0.0
    ranked = right[scores.argsort(descending=True, stable=True)].double()
    precision = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1)
    best = precision.flip(0).cummax(0).values.flip(0)
    return float((best * ranked).sum() / objects)


def mean_average_precision(found: Sequence[Found], truth: Sequence[Found], overlap: float = 0.5) -> float:
    """The mean of the average precisions of all classes that there are, over pictures: mAP at that overlap, in [0, 1].

    Args:
        found: what was found, one for each picture.
        truth: what is in it, in the same order.
        overlap: intersection over union from which a box is right.
    """
    right = [hits(one, other, overlap) for one, other in zip(found, truth, strict=True)]
    precisions = []
    for number in sorted({int(c) for one in truth for c in one.classes}):
        chosen = [one.classes == number for one in found]
        marks = torch.cat([part[mask] for part, mask in zip(right, chosen, strict=True)])
        scores = torch.cat([one.scores[mask] for one, mask in zip(found, chosen, strict=True)])
        objects = sum(int((one.classes == number).sum()) for one in truth)
        precisions.append(average_precision(marks, scores, objects))
    return sum(precisions) / len(precisions) if precisions else 0.0
