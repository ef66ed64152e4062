"""What a recognition should not depend on: pictures changed one way or the other, and which way to be told (survey 32).

Where no attributes are labelled, a neuron's response to these stands for pose, light and quality of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

Change = Callable[
    [Float[Tensor, "batch channels height width"], Float[Tensor, "batch"], torch.Generator],
    Float[Tensor, "batch channels height width"],
]
"""Pictures, each changed one way (side 1) or the other (side -1)."""


def brightness(x: Tensor, side: Tensor, generator: torch.Generator) -> Tensor:
    """A quarter of light more or less."""
    del generator
    return x * (1 + 0.25 * side)[:, None, None, None]


def noise(x: Tensor, side: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of a third of the pictures' deviation, or none."""
    drawn = torch.randn(x.shape, generator=generator).to(x) * x.std() / 3
    return x + drawn * (side > 0).to(x)[:, None, None, None]


def shift(x: Tensor, side: Tensor, generator: torch.Generator) -> Tensor:
    """An eighth of the width to the right or to the left."""
    del generator
    return _moved(x, torch.zeros_like(side), side * 0.25)


def rotation(x: Tensor, side: Tensor, generator: torch.Generator) -> Tensor:
    """15 degrees one way or the other."""
    del generator
    return _moved(x, side * math.radians(15), torch.zeros_like(side))


NUISANCES: Mapping[str, Change] = {"brightness": brightness, "noise": noise, "shift": shift, "rotation": rotation}


def _moved(x: Tensor, angle: Tensor, right: Tensor) -> Tensor:
    cos, sin, none = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turn = torch.stack([torch.stack([cos, -sin, -right], 1), torch.stack([sin, cos, none], 1)], 1).to(x)
    grid = functional.affine_grid(turn, list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, padding_mode="border", align_corners=False)


def changed(
    x: Float[Tensor, "batch channels height width"], change: Change, seed: int
) -> tuple[Float[Tensor, "batch channels height width"], Bool[Tensor, "batch"]]:
    """Pictures each changed one way or the other at random, and which way.

    Example:
        >>> light, more = changed(torch.ones(4, 1, 2, 2), brightness, seed=0)
        >>> bool(((light[:, 0, 0, 0] > 1) == more).all())
        True
    """
    generator = torch.Generator().manual_seed(seed)
    more = torch.rand(len(x), generator=generator) < 0.5
    return change(x, more.to(x) * 2 - 1, generator), more
