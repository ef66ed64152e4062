"""Sight: which groups the output of a network shows, and weights that show those which its own weights hide.

A cut of units that the output does not show would prove nothing. Slopes tell which show. Units are hidden by scales
that start at zero, and by rectifiers that are off whatever the input. So tensors that are all zero are drawn anew, then
the slices of the groups that are still hidden, a few times; where that does not help, all weights are, and slices
again. A cut must be right for any weights, so a proof on others is as good.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from karui.model.copying import copied
from karui.model.path import Path
from karui.model.running import Steady, difference, outputs, tensors
from karui.model.trace import mode_of, plain_attention
from karui.model.walking import lent, named_buffers, named_parameters

if TYPE_CHECKING:
    from karui.model.groups import Analysis

Removed = Mapping[str, Tensor]
# How often the slices of hidden groups are drawn in a row without showing one more.
VAIN = 4


def owned_slices(analysis: Analysis, removed: Removed) -> list[tuple[str, int, Tensor]]:
    """(tensor, dimension, indices) of all that the removed units own."""
    return [
        (member.tensor, member.dim, member.indices[units].reshape(-1))
        for name, units in removed.items()
        for member in analysis[name].members
    ]


def mask(module: nn.Module, analysis: Analysis, removed: Removed) -> None:
    """Zero every slice of a parameter that the removed units own, in place."""
    parameters = named_parameters(module)
    with torch.no_grad():
        for name, dim, gone in owned_slices(analysis, removed):
            if name in parameters:
                parameters[name].index_fill_(dim, gone, 0)


def zeroed(
    module: nn.Module, analysis: Analysis, removed: Removed, dtype: torch.dtype | None = None
) -> dict[int, Tensor]:
    """The parameters that removed units own a part of, with it zeroed, by the `id` of the whole ones.

    As `dtype`, or as they are where there is none.
    """
    values: dict[str, Tensor] = {}
    parameters = named_parameters(module)
    for name, dim, gone in owned_slices(analysis, removed):
        if name in parameters:
            if name not in values:
                values[name] = parameters[name].detach().to(dtype or parameters[name].dtype, copy=True)
            values[name].index_fill_(dim, gone, 0)
    return {id(parameters[name]): value for name, value in values.items()}


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


def look(
    dense: nn.Module,
    analysis: Analysis,
    removed: Removed,
    inputs: tuple[Any, ...],
    *,
    training: bool,
    path: Path | None = None,
) -> Sight:
    """Which groups the output shows; the `path` of the first run is noted, if wanted.

    The slopes of vectors (a bias, a normalisation's scale) cost the least and nearly always tell; of groups without
    any, all that they own is looked at. Only for groups that these do not show is the run repeated, with the slopes of
    all that they own.
    """
    vectors = {name for name, p in named_parameters(dense).items() if p.ndim == 1}
    owned = [{member.tensor for member in analysis[name].members} for name in removed]
    bare = set().union(*(some for some in owned if not some & vectors))
    sight = _sight(dense, analysis, removed, inputs, training=training, by=vectors | bare, path=path)
    if sight.unseen:
        hidden = {name: units for name, units in removed.items() if name in sight.unseen}
        owned = {member.tensor for name in hidden for member in analysis[name].members}
        sight = _sight(dense, analysis, hidden, inputs, training=training, by=owned)
    if not sight.unused:
        return sight
    seen = {
        name
        for name in sight.unused
        if _moves(dense, analysis, {name: removed[name]}, inputs, sight.output, training=training)
    }
    return Sight(sight.unseen - seen, sight.unused - seen, sight.output)


def _moves(
    dense: nn.Module,
    analysis: Analysis,
    removed: Removed,
    inputs: tuple[Any, ...],
    output: list[Tensor],
    *,
    training: bool,
) -> bool:
    """Whether the output changes without a group's units: for those that slopes do not reach.

    A forward may run parts without gradients, and one that changes tensors in place or recomputes them has none here.
    """
    masked = copied(dense)
    mask(masked, analysis, removed)
    return difference(outputs(masked, inputs, training=training), output) > 0


def _sight(
    dense: nn.Module,
    analysis: Analysis,
    removed: Removed,
    inputs: tuple[Any, ...],
    *,
    training: bool,
    by: set[str],
    path: Path | None = None,
) -> Sight:
    """What one run shows of the groups, by the slopes of some parameters."""
    parameters = {
        name: p.detach().requires_grad_(p.is_floating_point() and name in by)
        for name, p in named_parameters(dense).items()
    }
    try:
        made, slope = _slopes(dense, parameters, inputs, training=training, path=path)
    except RuntimeError:  # it runs, but not with gradients
        made, slope = outputs(dense, inputs, training=training), {}

    def shows(name: str, units: Tensor) -> bool:
        for member in analysis[name].members:
            if member.tensor in slope:
                gone = member.indices[units].reshape(-1)
                moved = slope[member.tensor].index_select(member.dim, gone)
                weight = parameters[member.tensor].detach().index_select(member.dim, gone)
                if bool(((moved * weight).movedim(member.dim, 0).reshape(len(gone), -1).sum(1) != 0).any()):
                    return True
        return False

    unseen = {name for name, units in removed.items() if not shows(name, units)}
    unused = {name for name in unseen if not any(m.tensor in slope for m in analysis[name].members)}
    return Sight(unseen, unused, [t.detach() for t in made])


def _slopes(
    dense: nn.Module,
    parameters: dict[str, Tensor],
    inputs: tuple[Any, ...],
    *,
    training: bool,
    path: Path | None = None,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The output, and the slope of its sum with random weights by each parameter that has a part in it."""
    theirs = named_buffers(dense)
    buffers = {name: b.clone() if training else b for name, b in theirs.items()}
    own = {**named_parameters(dense), **theirs}
    given = {id(own[name]): value for name, value in (parameters | buffers).items()}
    if path is not None:
        path.name(parameters | buffers)
    generator = torch.Generator().manual_seed(2)
    steady = Steady() if training else nullcontext()
    with torch.enable_grad(), mode_of(dense, training), plain_attention(), lent(dense, given), steady:
        with path or nullcontext():
            made = tensors(dense(*inputs))
        loss = torch.zeros(())
        for t in made:
            if t.requires_grad:
                loss = loss + (t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum()
        names = [name for name, p in parameters.items() if p.requires_grad and loss.requires_grad]
        slopes = torch.autograd.grad(loss, [parameters[n] for n in names], allow_unused=True) if names else []
    return made, {n: g for n, g in zip(names, slopes, strict=True) if g is not None}


def drawings(module: nn.Module, analysis: Analysis, removed: Removed) -> Generator[nn.Module | None, set[str], None]:
    """Networks to look at, one after the other: the given one, then copies with weights drawn anew; None at the end.

    Each is sent the names of the groups that it hides. Those of a copy are drawn in place.
    """
    generator = torch.Generator().manual_seed(1)
    hidden = yield module
    drawn = copied(module)
    for redraw in (redraw_zeros, redraw_all):
        redraw(drawn, generator)
        hidden = yield drawn
        fewest, vain = len(hidden), 0
        while hidden and vain < VAIN:
            redraw_units(drawn, analysis, {n: units for n, units in removed.items() if n in hidden}, generator)
            hidden = yield drawn
            vain = 0 if len(hidden) < fewest else vain + 1
            fewest = min(fewest, len(hidden))
    yield None


def redraw_zeros(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every tensor anew that is all zero, in place."""
    with torch.no_grad():
        for p in module.parameters():
            if p.is_floating_point() and not p.any():
                p.copy_(_drawn(p, generator))


def redraw_all(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight anew, at a scale that keeps activations alive; in place.

    Statistics of the weights that were would blow the new activations up, and with them the rounding floor.
    """
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._NormBase):  # noqa: SLF001  (it has no public name)
                layer.reset_running_stats()
        for p in module.parameters():
            if p.is_floating_point():
                p.copy_(_drawn(p, generator))


def redraw_units(module: nn.Module, analysis: Analysis, removed: Removed, generator: torch.Generator) -> None:
    """Draw anew what these units own, in place; half of the rectifiers that were off are on then."""
    parameters = named_parameters(module)
    with torch.no_grad():
        for name, units in removed.items():
            for member in analysis[name].members:
                p = parameters.get(member.tensor)
                if p is not None and p.is_floating_point():
                    gone = member.indices[units].reshape(-1)
                    p.index_copy_(member.dim, gone, _drawn(p, generator).index_select(member.dim, gone))


def _drawn(p: Tensor, generator: torch.Generator) -> Tensor:
    """Values for a parameter: of a matrix those that keep the variance under a rectifier, of a vector about one."""
    noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return noise * (2 / max(p[0].numel(), 1)) ** 0.5 if p.ndim > 1 else 1 + 0.3 * noise
