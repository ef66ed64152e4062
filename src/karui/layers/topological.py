"""Topological subdivisioning: a pointwise layer in which each output sees a box of inputs on a torus of channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from karui.errors import SettingError, require
from karui.layers.factored import CONVOLUTIONS


def box_on_torus(lattice: Sequence[int], window: Sequence[int]) -> Int[Tensor, "channels neighbours"]:
    """For each channel p of the torus, the numbers of the channels in the box p + [0, c_1) x ... x [0, c_s).

    Channels are numbered row by row. All boxes list their offsets in the same order.

    Example:
        >>> box_on_torus((2, 3), (1, 2)).tolist()
        [[0, 1], [1, 2], [2, 0], [3, 4], [4, 5], [5, 3]]
    """
    numbers, axes = torch.arange(math.prod(lattice)).reshape(*lattice), tuple(range(len(lattice)))
    offsets = product(*(range(side) for side in window))
    return torch.stack([numbers.roll([-step for step in offset], axes).flatten() for offset in offsets], dim=1)


def square_lattice(channels: int, sides: int = 2) -> tuple[int, ...]:
    """The most even way to arrange channels on a torus of so many sides; the last is the longest.

    Example:
        >>> square_lattice(48), square_lattice(64, 3), square_lattice(7)
        ((6, 8), (4, 4, 4), (1, 7))
    """
    if sides == 1:
        return (channels,)
    goal = channels ** (1 / sides)
    divisors = [side for side in range(1, channels + 1) if channels % side == 0]
    first = max(side for side in divisors if side <= goal + 1e-9)
    return (first, *square_lattice(channels // first, sides - 1))


def layers_to_reach_all(lattice: Sequence[int], window: Sequence[int]) -> int | None:
    """How many layers it takes until every output depends on every input; None where it never does.

    Along a side of d channels, m layers of windows of c reach m (c - 1) + 1 of them.

    Example:
        >>> layers_to_reach_all((8, 8), (3, 4)), layers_to_reach_all((8, 8), (1, 8))
        (4, None)
    """
    if any(c == 1 < d for d, c in zip(lattice, window, strict=True)):
        return None
    return max((math.ceil((d - 1) / (c - 1)) for d, c in zip(lattice, window, strict=True) if d > 1), default=1)


class TopologicalPointwise(nn.Module):
    """A pointwise convolution of n channels to n, each output of which sees prod(c_i) inputs near it on a torus.

    A grouped convolution with as many weights cuts the channels into parts that never meet; here the boxes overlap, so
    that after a few layers everything has met (`layers_to_reach_all`). The inputs of each output are gathered side by
    side and multiplied by a grouped convolution: n prod(c_i) multiply-adds at each position, and no zeros among them.

    Args:
        lattice: sides d_1 ... d_s of the torus; their product is the number of channels.
        window: sides c_1 ... c_s of the box, each from 1 to that of the lattice.
        dimensions: of space.
        bias: whether there is one.

    Raises:
        SettingError: the window does not fit the lattice.

    Example:
        >>> layer = TopologicalPointwise((4, 4), (2, 2))
        >>> layer(torch.zeros(1, 16, 5, 5)).shape, layer.mix.weight.numel()
        (torch.Size([1, 16, 5, 5]), 64)
    """

    index: Tensor

    def __init__(
        self, lattice: Sequence[int], window: Sequence[int], *, dimensions: int = 2, bias: bool = True
    ) -> None:
        super().__init__()
        self.lattice, self.window, self.dimensions = tuple(lattice), tuple(window), dimensions
        sides = list(zip(self.lattice, self.window, strict=False))
        fits = len(self.window) == len(self.lattice) and all(1 <= c <= d for d, c in sides)
        told = f"window is {self.window} on the lattice {self.lattice}; give one side from 1 for each of the lattice's"
        require(fits, told, error=SettingError)
        self.channels = math.prod(self.lattice)
        neighbours = box_on_torus(self.lattice, self.window)
        self.register_buffer("index", neighbours.flatten(), persistent=False)
        each = neighbours.shape[1]
        self.mix = CONVOLUTIONS[dimensions](self.channels * each, self.channels, 1, groups=self.channels, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights at the variance of their fan-in, prod(c_i)."""
        nn.init.normal_(self.mix.weight, std=math.prod(self.window) ** -0.5)
        if self.mix.bias is not None:
            nn.init.zeros_(self.mix.bias)

    def settings(self) -> dict[str, Any]:
        """What `TopologicalPointwise(**settings)` rebuilds it from."""
        return {
            "lattice": list(self.lattice),
            "window": list(self.window),
            "dimensions": self.dimensions,
            "bias": self.mix.bias is not None,
        }

    def forward(self, x: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels *space"]:
        """Gather the box of each output, and weigh it."""
        return self.mix(x.index_select(1, self.index))

    def matrix(self) -> Float[Tensor, "channels channels"]:
        """The dense matrix of the same map, in float64."""
        dense = torch.zeros(self.channels, self.channels, dtype=torch.float64, device=self.mix.weight.device)
        return dense.scatter_(1, self.index.reshape(self.channels, -1), self.mix.weight.detach().double().flatten(1))

    def pattern(self) -> Bool[Tensor, "channels channels"]:
        """Which output sees which input."""
        seen = torch.zeros(self.channels, self.channels, dtype=torch.bool, device=self.index.device)
        return seen.scatter_(1, self.index.reshape(self.channels, -1), True)
