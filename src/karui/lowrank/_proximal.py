"""Proximal steps while a network trains: singular values and units of its layers shrink, some of them to zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from karui.errors import require
from karui.model.taps import layer_at
from karui.numerics.proximal import shrink, shrink_rows, shrink_singular_values
from karui.numerics.unfold import split_groups
from karui.train import Influence, Moment

_BUFFER = "ranks_and_units"
ZERO = 1e-5
"""Singular values below this share of the largest are what rounding leaves of zeros."""


@dataclass(frozen=True, eq=False, kw_only=True)
class CompressionAware(Influence):
    """After ordinary steps on the loss alone, applies the proximal operators of low rank and of few units.

    The weight of a layer is a matrix of filters by all else, group by group. Low rank comes first, units second.

    Settings:
        layers: paths of linear layers and convolutions, each with whether its units may fall to zero.
        tau: what every singular value loses in one epoch, 0 or more.
        lam: what every unit's norm loses in one epoch, times the root of the number of its weights.
        l1_share: share of `lam` that goes to single weights instead, in [0, 1] (the sparse group form).
        every: steps from one proximal step to the next, which then takes its part of an epoch's loss; None is once an
            epoch.
        warmup: epochs without proximal steps.
        ramp: epochs in which the thresholds rise to the full ones after that, from 1.
        history: filled when the training ends: epoch by epoch, the rank and the living units of each layer, in the
            order of `layers`.

    Raises:
        SettingError: a setting is out of range.
    """

    layers: Mapping[str, bool]
    tau: float = 0.1
    lam: float = 0.0
    l1_share: float = 0.0
    every: int | None = None
    warmup: int = 2
    ramp: int = 1
    history: list[list[tuple[int, int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        require_thresholds(self)

    def attach(self, module: nn.Module) -> None:
        """A buffer for ranks and units, which a checkpoint holds."""
        module.register_buffer(_BUFFER, torch.zeros(0, len(self.layers), 2, dtype=torch.long))

    def constraints(self, module: nn.Module, moment: Moment) -> None:
        """The proximal step, when it is due; always after the last step, so that the network ends with exact zeros."""
        epoch = max(1, moment.steps // max(1, moment.epochs))
        every, done = self.every or epoch, moment.step + 1
        since = done % every or every
        if moment.epoch >= self.warmup and (since == every or done == moment.steps):
            strength = since / epoch * min(1.0, (moment.epoch - self.warmup + 1) / self.ramp)
            for path, units in self.layers.items():
                weight: Any = layer_at(module, path).weight
                weight.copy_(self.shrunk(weight, groups_in(layer_at(module, path)), strength, units=units))
        if done % epoch == 0:
            now = [state_of(layer_at(module, path)) for path in self.layers]
            history = module.get_buffer(_BUFFER)
            setattr(module, _BUFFER, torch.cat((history, torch.tensor([now]).to(history))))

    def shrunk(self, weight: Tensor, groups: int, strength: float, *, units: bool) -> Tensor:
        """A weight after one proximal step of a share of an epoch's thresholds."""
        matrices = split_groups(weight.detach().double(), groups).flatten(2)
        if self.tau:
            matrices = shrink_singular_values(matrices, strength * self.tau)
        if self.lam and units:
            lam = strength * self.lam
            matrices = shrink(matrices, lam * self.l1_share) if self.l1_share else matrices
            matrices = shrink_rows(matrices, lam * (1 - self.l1_share) * matrices.shape[-1] ** 0.5)
        return matrices.reshape(weight.shape).to(weight)

    def finish(self, module: nn.Module) -> nn.Module:
        """Take the buffer off, and tell what it held."""
        self.history[:] = [[(int(rank), int(units)) for rank, units in row] for row in module.get_buffer(_BUFFER)]
        delattr(module, _BUFFER)
        return module


def require_thresholds(settings: Any) -> None:
    """Refuse impossible settings of proximal steps."""
    for name in ("tau", "lam"):
        value = getattr(settings, name)
        require(0 <= value < float("inf"), f"{name} is {value}; give 0 or more, for example 0.1")
    share = settings.l1_share
    require(0 <= share <= 1, f"l1_share is {share}; give a share in [0, 1], for example 0.2")
    every = settings.every
    require(every is None or every >= 1, f"every is {every}; give a number of steps from 1, or None for once an epoch")
    require(settings.warmup >= 0, f"warmup is {settings.warmup}; give 0 or more epochs, for example 2")
    require(settings.ramp >= 1, f"ramp is {settings.ramp}; give 1 or more epochs")


def groups_in(layer: Any) -> int:
    """How many blocks a layer's weight has."""
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def rank_of(values: Tensor) -> int:
    """Number of singular values that are not zero but for rounding."""
    return int((values > ZERO * values.max()).sum()) if values.numel() and values.max() > 0 else 0


def state_of(layer: Any) -> tuple[int, int]:
    """Rank (the largest of its groups') and living units of a layer."""
    matrices = split_groups(layer.weight.detach().double(), groups_in(layer)).flatten(2)
    ranks = [rank_of(values) for values in torch.linalg.svdvals(matrices)]
    return max(ranks), int((matrices != 0).any(2).sum())
