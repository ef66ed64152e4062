"""Conditions under which a network trains: penalties on weights, layers that rest, other dropout rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from karui.errors import require
from karui.train.influence import Influence, Moment


@dataclass(frozen=True, kw_only=True)
class Penalty(Influence):
    """Adds l1 times the sum of absolute weights and l2 times half the sum of squares to the loss.

    Settings:
        names: the parameters that are penalised.
        l1, l2: strengths, 0 or more.

    Example:
        >>> import torch
        >>> net = nn.Linear(2, 1)
        >>> _ = net.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> moment = Moment(net, (), None, None)
        >>> loss = Penalty(names=("weight",), l1=0.1, l2=0.01).objective(torch.tensor(0.0), moment)
        >>> round(loss.item(), 4)
        0.825
    """

    names: tuple[str, ...]
    l1: float = 0.0
    l2: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("l1", self.l1), ("l2", self.l2)):
            require(value >= 0, f"{name} is {value}; give 0 or more, for example 1e-4")

    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        """The loss with the penalties."""
        for name in self.names:
            weight = moment.module.get_parameter(name)
            if self.l1:
                loss = loss + self.l1 * weight.abs().sum()
            if self.l2:
                loss = loss + 0.5 * self.l2 * weight.square().sum()
        return loss


@dataclass(frozen=True)
class Resting(Influence):
    """Parameters that do not train this time; those that did not train before are not woken by it.

    Settings:
        names: parameters that are trainable and shall rest.
    """

    names: tuple[str, ...]

    def attach(self, module: nn.Module) -> None:
        """Let them rest."""
        for name in self.names:
            module.get_parameter(name).requires_grad_(False)

    def finish(self, module: nn.Module) -> nn.Module:
        """Wake them."""
        for name in self.names:
            module.get_parameter(name).requires_grad_(True)
        return module


@dataclass(frozen=True)
class DropoutRates(Influence):
    """Other dropout rates for one training; afterwards the layers have their own again.

    Settings:
        own: what the dropout layers have, by path.
        rates: what they shall have.
    """

    own: Mapping[str, float]
    rates: Mapping[str, float]

    def attach(self, module: nn.Module) -> None:
        """Set the rates."""
        _set(module, self.rates)

    def finish(self, module: nn.Module) -> nn.Module:
        """Set the layers' own again."""
        _set(module, self.own)
        return module


def _set(module: nn.Module, rates: Mapping[str, float]) -> None:
    for path, rate in rates.items():
        layer = module.get_submodule(path)
        if isinstance(layer, _DropoutNd):
            layer.p = rate


def dropout_rates(module: nn.Module) -> dict[str, float]:
    """The rate of each dropout layer, by path.

    Example:
        >>> dropout_rates(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3)))
        {'1': 0.3}
    """
    return {path: layer.p for path, layer in module.named_modules() if isinstance(layer, _DropoutNd)}
