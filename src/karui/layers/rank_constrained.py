"""Rank-constrained units: each unit's filter over a patch of frames by features is a sum of few outer products."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from karui.errors import require


class RankConstrained(nn.Module):
    """A linear layer on a flattened patch, whose weight is of bounded rank unit by unit.

    With the patch as a matrix X of frames by features, unit m gives `sum_r beta[m, r]^T X alpha[m, r] + bias[m]`: every
    frame is projected on the unit's feature filters, each projection is filtered over time, and both are summed inside
    the unit, before any non-linearity: `units rank (frames + features)` weights, not `units frames features`. The
    whole layer's matrix is not of low rank.

    Takes `[batch, channels * frames * features]` as the linear layer did, and gives `[batch, units]`. Channels of one
    frame count as features of it.

    Args:
        frames: steps of time (or rows) of the patch, the oldest first.
        features: numbers in each frame and channel.
        units: outputs.
        rank: outer products in each unit's filter.
        bias: whether there is one.
        channels: of the map that was flattened.

    Raises:
        SettingError: a size is not positive.

    Example:
        >>> layer = RankConstrained(98, 40, units=16, rank=2)
        >>> layer(torch.zeros(3, 98 * 40)).shape, layer.project.weight.numel() + layer.over_time.weight.numel()
        (torch.Size([3, 16]), 4416)
    """

    def __init__(
        self, frames: int, features: int, units: int, rank: int, *, bias: bool = True, channels: int = 1
    ) -> None:
        super().__init__()
        sizes = {"frames": frames, "features": features, "units": units, "rank": rank, "channels": channels}
        for name, size in sizes.items():
            require(size >= 1, f"{name} is {size}; give a number from 1")
        self.frames, self.features, self.units, self.rank, self.channels = frames, features, units, rank, channels
        self.project = nn.Linear(channels * features, units * rank, bias=False)
        self.over_time = nn.Conv1d(units * rank, units, frames, groups=units, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw filters whose product spreads the outputs as one linear layer of torch does at its start.

        The feature filters keep the variance, the time filters take it to where torch's own rule would.
        """
        nn.init.normal_(self.project.weight, std=self.project.in_features**-0.5)
        bound = (self.rank * self.frames) ** -0.5
        nn.init.uniform_(self.over_time.weight, -bound, bound)
        if self.over_time.bias is not None:
            bound = (self.frames * self.project.in_features) ** -0.5
            nn.init.uniform_(self.over_time.bias, -bound, bound)

    def settings(self) -> dict[str, Any]:
        """What `RankConstrained(**settings)` rebuilds it from."""
        names = ("frames", "features", "units", "rank", "channels")
        return {**{name: getattr(self, name) for name in names}, "bias": self.over_time.bias is not None}

    def forward(self, flat: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch units"]:
        """Project every frame, filter over time, sum within the unit."""
        patch = flat.reshape(-1, self.channels, self.frames, self.features).transpose(1, 2).flatten(2)
        made = self.over_time(self.project(patch).transpose(1, 2)).squeeze(2)
        return made if flat.ndim == 2 else made.reshape(*flat.shape[:-1], self.units)

    def filters(self) -> Float[Tensor, "units frames inputs_of_a_frame"]:
        """Each unit's filter over the patch, channels beside features, in float64."""
        alpha = self.project.weight.detach().double().unflatten(0, (self.units, self.rank))
        return torch.einsum("mrt,mrf->mtf", self.over_time.weight.detach().double(), alpha)

    def dense(self) -> nn.Linear:
        """The one linear layer that computes the same."""
        bias = self.over_time.bias
        layer = nn.Linear(self.channels * self.frames * self.features, self.units, bias=bias is not None)
        weight = self.filters().unflatten(2, (self.channels, self.features)).transpose(1, 2).flatten(1)
        with torch.no_grad():
            layer.to(self.project.weight).weight.copy_(weight)
            if bias is not None:
                layer.bias.copy_(bias)
        return layer

    @torch.no_grad()
    def fit(self, weight: Float[Tensor, "units inputs"], bias: Float[Tensor, "units"] | None = None) -> float:
        """Take the best filters of this rank for a linear layer's weight, unit by unit, and its bias.

        Each singular value is shared by both filters alike. Returns the relative Frobenius error.
        """
        left, values, right = torch.linalg.svd(self._patches(weight), full_matrices=False)
        roots = values[:, : self.rank].sqrt()
        alpha = torch.zeros_like(self.project.weight).unflatten(0, (self.units, self.rank))
        beta = torch.zeros_like(self.over_time.weight)
        held = roots.shape[1]
        alpha[:, :held] = (roots.unsqueeze(2) * right[:, : self.rank]).to(alpha)
        beta[:, :held] = (roots.unsqueeze(2) * left[:, :, : self.rank].transpose(1, 2)).to(beta)
        self.project.weight.copy_(alpha.flatten(0, 1))
        self.over_time.weight.copy_(beta)
        if bias is not None and self.over_time.bias is not None:
            self.over_time.bias.copy_(bias)
        lost, whole = values[:, self.rank :].square().sum(), values.square().sum()
        return math.sqrt(float(lost) / max(float(whole), 1e-300))

    def _patches(self, weight: Tensor) -> Float[Tensor, "units frames inputs_of_a_frame"]:
        shape = (self.channels, self.frames, self.features)
        return weight.detach().double().unflatten(1, shape).transpose(1, 2).flatten(2)


class FrameStream:
    """A rank-constrained layer fed frame by frame: it keeps the projections of the last frames.

    A new frame costs `units rank (features + frames)` multiply-adds, where a patch costs its whole projection anew.
    Before it has seen `frames` of them, it answers as if zeros came first.

    Args:
        layer: the layer; it is used as it is, and not changed.
        batch: number of streams side by side.

    Example:
        >>> layer = RankConstrained(3, 4, units=2, rank=1)
        >>> stream, patch = FrameStream(layer), torch.randn(1, 3, 4)
        >>> for frame in patch.unbind(1):
        ...     told = stream.step(frame)
        >>> bool(torch.allclose(told, layer(patch.flatten(1)), atol=1e-6))
        True
    """

    def __init__(self, layer: RankConstrained, batch: int = 1) -> None:
        self.layer, self.batch = layer, batch
        self.reset()

    def reset(self) -> None:
        """Forget what was seen, as between two utterances."""
        weight = self.layer.project.weight
        self.memory = weight.new_zeros(self.batch, len(weight), self.layer.frames)

    @torch.no_grad()
    def step(self, frame: Float[Tensor, "batch inputs_of_a_frame"]) -> Float[Tensor, "batch units"]:
        """Take the next frame, and give the outputs for the last `frames` of them."""
        projected = self.layer.project(frame).unsqueeze(2)
        self.memory = torch.cat((self.memory[:, :, 1:], projected), 2)
        return self.layer.over_time(self.memory).squeeze(2)
