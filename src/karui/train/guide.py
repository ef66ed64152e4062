"""Guides: a frozen teacher that shows the outputs of its inner layers, too; and forward passes that leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from karui.model import Model, taps
from karui.train.frozen import Frozen


def asked_anew(wanted: str) -> str:
    """The line of a teacher that more is wanted of than answers.

    Example:
        >>> asked_anew("its gradient")
        'teacher: asked anew in each pass, as its gradient is wanted, and only answers are kept'
    """
    return f"teacher: asked anew in each pass, as {wanted} is wanted, and only answers are kept"


class Guide:
    """A frozen copy of a network, in evaluation mode, on whatever device it is asked on.

    It is no part of any module that trains: no optimiser, checkpoint or saved model sees it.

    Args:
        model: the network; left as it is.
        layers: paths of the layers whose outputs are shown.

    Raises:
        UsageError: there is no layer at a path.

    Example:
        >>> guide = Guide(Model(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), example=(torch.zeros(1, 4),)), ("0",))
        >>> outputs, seen = guide((torch.zeros(2, 4),))
        >>> outputs.shape, seen["0"].shape
        (torch.Size([2, 3]), torch.Size([2, 3]))
    """

    def __init__(self, model: Model, layers: tuple[str, ...] = ()) -> None:
        self._network = Frozen(model.module)
        self.layers = layers
        with taps(self.module, layers):
            pass  # a path that is not there is told now, not in the middle of a training

    def __call__(self, inputs: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
        """The outputs of the network, and by path those of its layers.

        Gradients flow to inputs that want them, and are not kept where none does.
        """
        with self.on(inputs) as module, taps(module, self.layers) as seen:
            outputs = module(*inputs)
        return outputs, dict(seen)

    @property
    def remarks(self) -> tuple[str, ...]:
        """One line: that nothing of it is kept, and why."""
        return (asked_anew(f"what its inner layers give ({', '.join(self.layers) or 'none'})"),)

    @torch.no_grad()
    def told(self, inputs: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
        """As when called, and no gradient flows: what an influence asks `ahead` of a step."""
        return self(inputs)

    @property
    def module(self) -> nn.Module:
        """The frozen copy."""
        return self._network.module

    def on(self, inputs: tuple[Any, ...]) -> AbstractContextManager[nn.Module]:
        """The network, on the device that the inputs are on, for the time of the block."""
        return self._network.on(inputs)


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Within the block, forward passes change copies of the buffers: running statistics are not updated twice a step.

    The buffers themselves are not written to, so that a forward pass from before the block can still be differentiated.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with statistics_kept(norm):
        ...     _ = norm(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> norm.running_mean.tolist(), int(norm.num_batches_tracked)
        ([0.0, 0.0], 0)
    """
    held = [(layer, name, value) for layer in module.modules() for name, value in layer.named_buffers(recurse=False)]
    for layer, name, value in held:
        setattr(layer, name, value.clone())
    try:
        yield
    finally:
        for layer, name, value in held:
            setattr(layer, name, value)
