"""Training: how a model is trained, as a value of settings."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from karui.errors import SettingError, did_you_mean, require

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
STRATEGIES = ("auto", "ddp")


class Optimizer(Protocol):
    """A value that makes a torch optimizer."""

    @property
    def lr(self) -> float:
        """The learning rate before the schedule."""
        ...

    def make(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of these parameter groups."""
        ...


class Schedule(Protocol):
    """A value that says which share of the learning rate a step takes."""

    def factor(self, step: int, steps: int) -> float:
        """The factor of step `step` (from 0) of `steps`."""
        ...


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum.

    Settings:
        lr: the learning rate before the schedule.
        momentum: in [0, 1).
        nesterov: whether the momentum looks ahead.
        weight_decay: L2 penalty, added to the gradient.
    """

    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        _check_optimizer(self.lr, self.weight_decay)
        require(0 <= self.momentum < 1, f"momentum is {self.momentum}; give a number in [0, 1), for example 0.9")

    def make(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """The torch optimizer of these parameter groups."""
        nesterov = self.nesterov and self.momentum > 0  # torch refuses to look ahead without momentum
        return torch.optim.SGD(
            groups, lr=self.lr, momentum=self.momentum, nesterov=nesterov, weight_decay=self.weight_decay
        )


@dataclass(frozen=True)
class Adam:
    """Adam: steps scaled by running moments of the gradient; its weight decay is added to the gradient.

    Settings:
        lr: the learning rate before the schedule.
        betas: decay of the running first and second moment, each in [0, 1).
        weight_decay: L2 penalty, added to the gradient.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_optimizer(self.lr, self.weight_decay)
        object.__setattr__(self, "betas", _check_betas(self.betas))

    def make(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """The torch optimizer of these parameter groups."""
        return torch.optim.Adam(groups, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class AdamW:
    """Adam with weight decay that acts on the weights themselves, apart from the gradient.

    Settings:
        lr: the learning rate before the schedule.
        betas: decay of the running first and second moment, each in [0, 1).
        weight_decay: share of each weight taken off at each step, times the learning rate.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        _check_optimizer(self.lr, self.weight_decay)
        object.__setattr__(self, "betas", _check_betas(self.betas))

    def make(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """The torch optimizer of these parameter groups."""
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Constant:
    """The same learning rate from beginning to end."""

    def factor(self, step: int, steps: int) -> float:
        """1 at each step."""
        del step, steps
        return 1.0


@dataclass(frozen=True)
class Cosine:
    """A linear rise, then half a cosine down to nothing.

    Settings:
        warmup: share of the steps that rise, in [0, 1).

    Example:
        >>> [round(Cosine(warmup=0.5).factor(step, 4), 2) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
    """

    warmup: float = 0.05

    def __post_init__(self) -> None:
        require(0 <= self.warmup < 1, f"warmup is {self.warmup}; give a share of the steps in [0, 1), for example 0.05")

    def factor(self, step: int, steps: int) -> float:
        """The height of the curve at this step."""
        rise = round(self.warmup * steps)
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


@dataclass(frozen=True)
class Steps:
    """The learning rate is multiplied by `gamma` at each milestone.

    Settings:
        milestones: shares of the training, rising, each in (0, 1).
        gamma: the factor at each of them, positive.

    Example:
        >>> [Steps(milestones=(0.5,), gamma=0.5).factor(step, 4) for step in range(4)]
        [1.0, 1.0, 0.5, 0.5]
    """

    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        rising = all(a < b for a, b in zip((0.0, *self.milestones), (*self.milestones, 1.0), strict=True))
        require(
            rising,
            f"milestones is {self.milestones}; give rising shares of the training in (0, 1), for example (0.5, 0.75)",
        )
        require(self.gamma > 0, f"gamma is {self.gamma}; give a positive factor, for example 0.1")

    def factor(self, step: int, steps: int) -> float:
        """`gamma` to the power of the milestones passed."""
        return self.gamma ** sum(step >= milestone * steps for milestone in self.milestones)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained. The defaults fine-tune, and train small networks from nothing.

    Settings:
        epochs: passes over the data; 0 trains nothing.
        batch_size: samples of a step, on each device.
        optimizer: `SGD`, `Adam` or `AdamW`.
        schedule: `Constant`, `Cosine` or `Steps`.
        augment: changes each batch of inputs before it is used, `(batch, generator) -> batch`; None leaves them.
        clip_norm: largest norm of all gradients together; None does not clip.
        decay_all: whether weight decay also acts on biases, normalisation and depthwise filters.
        channels_last: whether two-dimensional convolutions compute with the channels of a pixel side by side; the same
            function up to rounding, a step of CIFAR's ResNet-20 took 0.7 of the time on one CPU core.
        precision: "32-true", "bf16-mixed", or "16-mixed" (needs an accelerator).
        accelerator: "auto", "cpu", "cuda", "mps", as Lightning Fabric names them.
        devices: number of devices; several train in step, each on its part of the batch.
        strategy: "auto", or "ddp" for several devices (on the CPU: several processes).
        checkpoint_seconds: time between checkpoints, where a folder for them is given.

    Raises:
        SettingError: a setting is out of range.

    Example:
        >>> Training(epochs=2, optimizer=AdamW(lr=3e-4)).to_json()["optimizer"]
        {'kind': 'AdamW', 'lr': 0.0003, 'betas': [0.9, 0.999], 'weight_decay': 0.01}
    """

    epochs: int = 10
    batch_size: int = 64
    optimizer: Optimizer = field(default_factory=SGD)
    schedule: Schedule = field(default_factory=Cosine)
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    clip_norm: float | None = None
    decay_all: bool = False
    channels_last: bool = False
    precision: str = "32-true"
    accelerator: str = "auto"
    devices: int = 1
    strategy: str = "auto"
    checkpoint_seconds: float = 30.0

    def __post_init__(self) -> None:
        require(self.epochs >= 0, f"epochs is {self.epochs}; give a number of passes, 0 or more")
        require(self.batch_size > 0, f"batch_size is {self.batch_size}; give a positive number, for example 64")
        require(self.devices > 0, f"devices is {self.devices}; give a positive number")
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"clip_norm is {self.clip_norm}; give a positive norm, for example 1.0, or None",
        )
        require(self.checkpoint_seconds >= 0, f"checkpoint_seconds is {self.checkpoint_seconds}; give 0 or more")
        if self.precision not in PRECISIONS:
            did_you_mean(self.precision, list(PRECISIONS), "precision", SettingError)
        if self.strategy not in STRATEGIES:
            did_you_mean(self.strategy, list(STRATEGIES), "strategy", SettingError)

    def to_json(self) -> dict[str, Any]:
        """The settings as plain values, as a recipe writes them: an optimizer or a schedule carries its `kind`."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def parameter_groups(
    module: nn.Module, parameters: Sequence[nn.Parameter], weight_decay: float, decay_all: bool
) -> list[dict[str, Any]]:
    """The parameters in a group that decays and one that does not.

    Biases, normalisation (anything of one dimension) and the filters of depthwise convolutions do not decay: they are
    few, and pulling them to zero costs accuracy without shrinking the function (MobileNet, section 3.2, for depthwise).
    """
    plain = {id(p) for layer in module.modules() if _is_depthwise(layer) for p in layer.parameters()}
    spared = [p for p in parameters if not decay_all and (p.ndim <= 1 or id(p) in plain)]
    known = {id(p) for p in spared}
    groups = [
        {"params": [p for p in parameters if id(p) not in known], "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _is_depthwise(layer: nn.Module) -> bool:
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(layer, convolutions) and layer.groups == layer.in_channels and layer.groups > 1


def _check_optimizer(lr: float, weight_decay: float) -> None:
    require(lr > 0, f"lr is {lr}; give a positive learning rate, for example 0.01")
    require(weight_decay >= 0, f"weight_decay is {weight_decay}; give 0 or more, for example 5e-4")


def _check_betas(betas: Sequence[float]) -> tuple[float, ...]:
    fits = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
    require(fits, f"betas is {betas}; give two numbers in [0, 1), for example (0.9, 0.999)")
    return tuple(betas)


def _plain(value: Any) -> Any:
    """A value of settings as JSON: a value object by its kind and fields, a function by its import path."""
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    kind = type(value)
    if dataclasses.is_dataclass(value):
        name = kind.__name__ if kind.__module__ == __name__ else f"{kind.__module__}:{kind.__qualname__}"
        return {"kind": name, **{f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}}
    named = value if isinstance(value, types.FunctionType) else kind
    return f"{named.__module__}:{named.__qualname__}"
