"""Sight: which units of a cut show in a model's output at all. A proof of units that do not would be blind."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from karui.model.copying import copied
from karui.model.running import Steady, difference, outputs, tensors
from karui.model.trace import mode_of, plain_attention

if TYPE_CHECKING:
    from karui.model.groups import Analysis
    from karui.model.proof import Candidate


def mask(module: nn.Module, analysis: Analysis, removed: Mapping[str, Tensor]) -> None:
    """Zero every slice of a parameter that the removed units own, in place."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, units in removed.items():
            for member in analysis[name].members:
                if member.tensor in parameters:
                    parameters[member.tensor].index_fill_(member.dim, member.indices[units].reshape(-1), 0)


@dataclass(frozen=True)
class Sight:
    """What one run shows of the groups.

    Settings:
        unseen: groups of which no removed unit moves the output, to first order, by the slope of its scale.
        unused: those whose parameters have no part in the run at all.
        output: the output.
    """

    unseen: set[str]
    unused: set[str]
    output: list[Tensor]


def look(dense: nn.Module, candidate: Candidate, inputs: tuple[Any, ...], *, training: bool) -> Sight:
    """Which groups the output shows.

    The slopes of vectors (a bias, a normalisation's scale) cost the least and nearly always tell; only for groups that
    they do not show is the run repeated with the slopes of all parameters.
    """
    sight = _sight(dense, candidate, inputs, training=training, vectors=True)
    if sight.unseen:
        sight = _sight(dense, candidate, inputs, training=training, vectors=False)
    if not sight.unused:
        return sight
    seen = {name for name in sight.unused if _moves(dense, candidate, name, inputs, sight.output, training=training)}
    return Sight(sight.unseen - seen, sight.unused - seen, sight.output)


def _moves(
    dense: nn.Module,
    candidate: Candidate,
    name: str,
    inputs: tuple[Any, ...],
    output: list[Tensor],
    *,
    training: bool,
) -> bool:
    """Whether the output changes without a group's units: for those that slopes do not reach.

    A forward may run parts without gradients, and one that changes tensors in place or recomputes them has none here.
    """
    masked = copied(dense)
    mask(masked, candidate.analysis, {name: candidate.removed[name]})
    return difference(outputs(masked, inputs, training=training), output) > 0


def _sight(dense: nn.Module, candidate: Candidate, inputs: tuple[Any, ...], *, training: bool, vectors: bool) -> Sight:
    """What one run shows of the groups, by the slopes of vectors alone or of all parameters."""
    parameters = {
        name: p.detach().requires_grad_(p.is_floating_point() and (p.ndim == 1 or not vectors))
        for name, p in dense.named_parameters()
    }
    try:
        made, slope = _slopes(dense, parameters, inputs, training=training)
    except RuntimeError:  # it runs, but not with gradients
        made, slope = outputs(dense, inputs, training=training), {}

    def shows(name: str, units: Tensor) -> bool:
        for member in candidate.analysis[name].members:
            if member.tensor in slope:
                gone = member.indices[units].reshape(-1)
                moved = slope[member.tensor].index_select(member.dim, gone)
                weight = parameters[member.tensor].detach().index_select(member.dim, gone)
                if bool(((moved * weight).movedim(member.dim, 0).reshape(len(gone), -1).sum(1) != 0).any()):
                    return True
        return False

    unseen = {name for name, units in candidate.removed.items() if not shows(name, units)}
    unused = {name for name in unseen if not any(m.tensor in slope for m in candidate.analysis[name].members)}
    return Sight(unseen, unused, [t.detach() for t in made])


def _slopes(
    dense: nn.Module, parameters: dict[str, Tensor], inputs: tuple[Any, ...], *, training: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The output, and the slope of its sum with random weights by each parameter that has a part in it."""
    buffers = {name: b.clone() for name, b in dense.named_buffers()} if training else {}
    generator = torch.Generator().manual_seed(2)
    with torch.enable_grad(), mode_of(dense, training), plain_attention(), Steady() if training else nullcontext():
        made = tensors(functional_call(dense, {**parameters, **buffers}, inputs))
        loss = torch.zeros(())
        for t in made:
            if t.requires_grad:
                loss = loss + (t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum()
        names = [name for name, p in parameters.items() if p.requires_grad and loss.requires_grad]
        slopes = torch.autograd.grad(loss, [parameters[n] for n in names], allow_unused=True) if names else []
    return made, {n: g for n, g in zip(names, slopes, strict=True) if g is not None}
