"""Augmentation of whole batches of pictures: vectorised, and seeded by the generator that is handed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.nn import functional

from karui.errors import require

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class RandomCrop:
    """Each picture moved by up to `padding` pixels in both directions; what comes into view is zero.

    Settings:
        padding: the largest shift, in pixels.

    Example:
        >>> batch = torch.ones(2, 1, 4, 4)
        >>> RandomCrop(1)(batch, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 4, 4])
    """

    padding: int = 4

    def __post_init__(self) -> None:
        require(self.padding >= 0, f"padding is {self.padding}; give a number of pixels, for example 4")

    def __call__(
        self, batch: Shaped[Tensor, "batch channels height width"], generator: torch.Generator
    ) -> Shaped[Tensor, "batch channels height width"]:
        """A window of the padded picture, of the picture's size, for each picture of its own."""
        pictures, _, height, width = batch.shape
        padded = functional.pad(batch, [self.padding] * 4)
        shifts = torch.randint(2 * self.padding + 1, (2, pictures, 1), generator=generator).to(batch.device)
        rows = shifts[0] + torch.arange(height, device=batch.device)
        columns = shifts[1] + torch.arange(width, device=batch.device)
        which = torch.arange(pictures, device=batch.device)
        return padded[which[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class HorizontalFlip:
    """Some pictures mirrored left to right. Not for digits and letters.

    Settings:
        share: how likely a picture is mirrored, in [0, 1].

    Example:
        >>> HorizontalFlip(share=1.0)(torch.arange(3.0).reshape(1, 1, 1, 3), torch.Generator()).flatten().tolist()
        [2.0, 1.0, 0.0]
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        require(0 <= self.share <= 1, f"share is {self.share}; give a share in [0, 1], for example 0.5")

    def __call__(
        self, batch: Shaped[Tensor, "batch channels height width"], generator: torch.Generator
    ) -> Shaped[Tensor, "batch channels height width"]:
        """The batch with its drawn pictures mirrored."""
        drawn = torch.rand(len(batch), 1, 1, 1, generator=generator).to(batch.device) < self.share
        return torch.where(drawn, batch.flip(-1), batch)


@dataclass(frozen=True)
class Compose:
    """Several augmentations, one after the other.

    Settings:
        steps: the augmentations, in order.

    Example:
        >>> both = Compose((RandomCrop(2), HorizontalFlip()))
        >>> both(torch.zeros(3, 1, 8, 8), torch.Generator()).shape
        torch.Size([3, 1, 8, 8])
    """

    steps: tuple[Augmentation, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))

    def __call__(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """The batch after every step."""
        for step in self.steps:
            batch = step(batch, generator)
        return batch
