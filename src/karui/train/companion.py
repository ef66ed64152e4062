"""Companions: layers that a network has only while it trains, such as the regressor of a hint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from karui.errors import require
from karui.train.influence import Influence


@dataclass(frozen=True, eq=False)
class Companion(Influence):
    """Puts a layer into the network for the time of a training, and takes it off at the end.

    It trains with the network and checkpoints hold it; no saved model does. What it is for is another influence's.

    Settings:
        name: where it is put; a name that the network does not have.
        make: makes the layer, given the network as it is when its training begins.

    Example:
        >>> import torch
        >>> net, part = nn.Sequential(nn.Linear(2, 2)), Companion("_hint", lambda _: nn.Linear(2, 5))
        >>> part.attach(net)
        >>> companion_of(net, "_hint")(torch.zeros(1, 2)).shape, net(torch.zeros(1, 2)).shape
        (torch.Size([1, 5]), torch.Size([1, 2]))
        >>> len(part.finish(net))
        1
    """

    name: str
    make: Callable[[nn.Module], nn.Module]

    def attach(self, module: nn.Module) -> None:
        """Put it into the module, on its device."""
        require(
            not hasattr(module, self.name),
            f"The network has a '{self.name}' already.",
            "Two influences of one training that are the same count as one: leave one out.",
        )
        made = self.make(module)
        like = next(module.parameters(), None)
        module.add_module(self.name, _Passed(made if like is None else made.to(like.device, like.dtype)))

    def finish(self, module: nn.Module) -> nn.Module:
        """Throw it away."""
        delattr(module, self.name)
        return module


class _Passed(nn.Module):
    """Holds a companion, and gives what it is given: a network that calls its children in turn runs as without it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        return x


def companion_of(module: nn.Module, name: str) -> nn.Module:
    """The layer that a `Companion` of this name has put into a network."""
    return module.get_submodule(f"{name}.layer")
