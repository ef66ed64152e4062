"""Gradients of squared distances that are summed over units: steep at first, at a rate that fits cross-entropy."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from karui.train import Training

CLIP = 1.0
"""Largest norm of the gradients, where the training gives none."""


def clipped(training: Training) -> Training:
    """The training, with gradients clipped to `CLIP` where it does not say another norm.

    Example:
        >>> from karui.train import Training
        >>> clipped(Training()).clip_norm, clipped(Training(clip_norm=5.0)).clip_norm
        (1.0, 5.0)
    """
    return training if training.clip_norm is not None else replace(training, clip_norm=CLIP)
