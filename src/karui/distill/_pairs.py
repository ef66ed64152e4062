"""What detectors say, logits and offsets of boxes, as one tensor: kept, and averaged over teachers, like any answer."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from karui.errors import NeedError, require, told
from karui.model import Model

OFFSETS = 4
"""Numbers of a box."""


def packed(slug: str, detector: Model) -> Model:
    """A detector whose logits and offsets are one tensor, `[batch, classes + 4, boxes]`.

    Args:
        slug: of the technique, for errors.
        detector: left as it is.
    """
    return Model(_Packed(slug, detector.module), example=detector.example, task=detector.task)


def unpacked(
    said: Float[Tensor, "batch both *boxes"],
) -> tuple[Float[Tensor, "batch classes *boxes"], Float[Tensor, "batch 4 *boxes"]]:
    """Logits and offsets again.

    Example:
        >>> [tuple(part.shape) for part in unpacked(torch.zeros(2, 10, 7))]
        [(2, 6, 7), (2, 4, 7)]
    """
    return said[:, :-OFFSETS], said[:, -OFFSETS:]


class _Packed(nn.Module):
    """Asks a detector."""

    def __init__(self, slug: str, detector: nn.Module) -> None:
        super().__init__()
        self.slug, self.detector = slug, detector

    def forward(self, *inputs: Any) -> Tensor:
        said = self.detector(*inputs)
        parts = list(said) if isinstance(said, tuple | list) else [said]
        pair = len(parts) == 2 and all(isinstance(part, Tensor) and part.ndim >= 3 for part in parts)
        fits = pair and parts[1].shape == (len(parts[0]), OFFSETS, *parts[0].shape[2:])
        gives = " and ".join(map(told, parts))
        require(
            fits,
            f"'{self.slug}': the teacher gives {gives}; a detector gives logits [batch, classes, boxes] and offsets "
            "[batch, 4, boxes].",
            "Give a teacher that judges the student's boxes.",
            NeedError,
        )
        return torch.cat(parts, 1)
