"""A teacher's network: a frozen copy, in evaluation mode, on whatever device it is asked on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from karui.measuring.inference import evaluated, tensors_of
from karui.model import frozen
from karui.model.reach import networks


class Frozen:
    """A frozen copy of a network and of the networks that lie in its lists and attributes.

    It says what the network said when the copy was made, whatever trains the network meanwhile. What a function of it
    encloses cannot be copied: that is in evaluation mode while it is asked, and given back; trained meanwhile, it
    answers as it then is.

    Args:
        module: left as it is.
        shared: whether parameters are not copied, for who knows that nothing changes them in place meanwhile.

    Example:
        >>> asked = Frozen(nn.Dropout())
        >>> with asked.on((torch.ones(2),)) as module:
        ...     module(torch.ones(2)).tolist()
        [1.0, 1.0]
    """

    def __init__(self, module: nn.Module, *, shared: bool = False) -> None:
        self.module = frozen(module, shared=shared)
        given, hidden = set(map(id, networks(module))), networks(self.module)[1:]
        self._own = tuple(one for one in hidden if id(one) not in given)
        self._lent = tuple(one for one in hidden if id(one) in given)

    @contextmanager
    def on(self, inputs: tuple[Any, ...]) -> Iterator[nn.Module]:
        """The copy, on the device that the inputs are on."""
        device = next((value.device for value in tensors_of(inputs)), torch.device("cpu"))
        for network in (self.module, *self._own):
            network.to(device)
        with evaluated(*self._lent):
            yield self.module
