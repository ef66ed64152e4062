"""Silencing units: the masked network, which computes what the cut one does, at the cost of a copy.

A cut needs a new graph; a scan of every layer at every ratio, or a score that ignores what earlier layers lost, does
not. Zero the slices by which others read a unit, and it is not heard; zero those that make it, and a contraction that
reads it without weights (attention) is fed zeros. Buffers stay: nothing listens to their channels any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from karui.model import Group


@torch.no_grad()
def silence(module: nn.Module, group: Group, units: Int[Tensor, "removed"]) -> None:
    """Zero, in place, every slice of a parameter that makes or reads `units` of `group`."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for member in group.members:
        if member.tensor in parameters:
            tensor = parameters[member.tensor]
            tensor.index_fill_(member.dim, member.indices[units].flatten().to(tensor.device), 0.0)


@contextmanager
def silenced(module: nn.Module, group: Group, units: Int[Tensor, "removed"]) -> Iterator[nn.Module]:
    """The module with those units silenced, and its own values back afterwards."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    names = {member.tensor for member in group.members} & parameters.keys()
    before = {name: parameters[name].detach().clone() for name in names}
    silence(module, group, units)
    try:
        yield module
    finally:
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(value)
