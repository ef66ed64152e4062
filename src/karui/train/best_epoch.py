"""The best epoch: what a training ends with is where it was best on data held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from karui.measuring.inference import inference
from karui.train.influence import Influence, Moment

STORE, LOSS = "_best_epoch_", "_best_epoch_loss"
BATCH = 512


@dataclass(frozen=True, eq=False, kw_only=True)
class BestEpoch(Influence):
    """After each epoch the network is tried on data held out; in the end it gets the weights that did best.

    The outcome is that of early stopping; the training goes on to its end. The weights so far are buffers of the
    module, so that a checkpoint holds them. In a `Together` it goes last, to see what the others have put in.

    Settings:
        inputs: held out, `[samples, ...]`.
        targets: `[samples, ...]`.
        loss: `(outputs, targets) -> scalar`, the mean over samples; less is better.

    Example:
        >>> part = BestEpoch(inputs=torch.ones(4, 1), targets=torch.zeros(4, 1), loss=nn.functional.mse_loss)
        >>> net = nn.Linear(1, 1)
        >>> part.attach(net)
        >>> moment = Moment(net, (), None, None)
        >>> for value in (1.0, 0.1, 2.0):
        ...     for parameter in net.parameters():
        ...         _ = parameter.data.fill_(value)
        ...     part.constraints(net, moment)
        >>> round(part.finish(net).weight.item(), 2), list(net.state_dict())
        (0.1, ['weight', 'bias'])
    """

    inputs: Tensor
    targets: Tensor
    loss: Callable[[Any, Tensor], Tensor]

    def attach(self, module: nn.Module) -> None:
        """Make room for the weights so far: buffers of the module itself, since a `Sequential` calls every child."""
        held = [tensor.detach().clone() for tensor in _state(module)]
        device = held[0].device if held else torch.device("cpu")
        for number, tensor in enumerate(held):
            module.register_buffer(f"{STORE}{number}", tensor)
        module.register_buffer(LOSS, torch.full((), torch.inf, device=device))

    @torch.no_grad()
    def constraints(self, module: nn.Module, moment: Moment) -> None:
        """At the end of an epoch: keep the weights if none were better."""
        if (moment.step + 1) % max(1, moment.steps // moment.epochs):
            return
        loss, best = self._tried(module), module.get_buffer(LOSS)
        if loss < float(best):
            best.fill_(loss)
            for number, tensor in enumerate(_state(module)):
                module.get_buffer(f"{STORE}{number}").copy_(tensor)

    @torch.no_grad()
    def finish(self, module: nn.Module) -> nn.Module:
        """Put the best weights in place."""
        tried = float(module.get_buffer(LOSS)) < torch.inf
        for number, tensor in enumerate(list(_state(module))):
            if tried:
                tensor.copy_(module.get_buffer(f"{STORE}{number}"))
            delattr(module, f"{STORE}{number}")
        delattr(module, LOSS)
        return module

    def _tried(self, module: nn.Module) -> float:
        device = module.get_buffer(LOSS).device
        total = 0.0
        with inference(module):
            for x, y in zip(self.inputs.split(BATCH), self.targets.split(BATCH), strict=True):
                total += float(self.loss(module(x.to(device)), y.to(device))) * len(x)
        return total / len(self.inputs)


def _state(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, without the store's own."""
    named = (*module.named_parameters(), *module.named_buffers())
    return (tensor for name, tensor in named if not name.startswith(STORE))
