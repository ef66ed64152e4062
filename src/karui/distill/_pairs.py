"""What detectors say, logits and offsets of boxes, as one tensor: kept, and averaged over teachers, like any answer."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from karui.model import Model

OFFSETS = 4
"""Numbers of a box."""


def packed(detector: Model) -> Model:
    """A detector whose logits and offsets are one tensor, `[batch, classes + 4, boxes]`."""
    return Model(_Packed(detector.module), example=detector.example, task=detector.task)


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

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, *inputs: Any) -> Tensor:
        return torch.cat(list(self.detector(*inputs)), 1)
