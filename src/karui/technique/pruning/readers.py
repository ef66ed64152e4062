"""Who reads the units of a group: found on weights that hide nothing, before any unit is called unread.

A weight whose columns are a unit's inputs reads it, and says so. So does a layer that is applied again to what it gave
(recurrent weights, a tied layer), which makes the units as well; and a sum over the features or a product of two
activations reads units through no weight at all. So it is tried: where the readers that are known see zeros, the
output may not change when the units go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from karui.errors import CaptureError, SurgeryError
from karui.model import Analysis, Group, Member, Model, copied
from karui.model.groups import tensor_of
from karui.model.running import difference, outputs, random_like
from karui.model.sight import VAIN, look, mask, redraw_all, redraw_units
from karui.model.trace import brief

HIDDEN = "something besides its weights reads its units (a sum, a product, a layer applied again)"
BLIND = "the output does not show its units"

Members = tuple[Member, ...]


@dataclass(frozen=True, eq=False)
class Readers:
    """Who makes and who reads the units of each group.

    Settings:
        makers, readers: by group; a unit whose readers are zero is read by nobody.
        again: groups whose units are read by a weight that makes them, too: what one emits is no constant.
        whole: the groups where readers may be hidden, which stay as they are, and why.
    """

    makers: Mapping[str, Members]
    readers: Mapping[str, Members]
    again: frozenset[str]
    whole: Mapping[str, str]


def _read(group: Group) -> Members:
    return tuple(member for member in group.members if member.role == "in")


def _read_again(group: Group) -> Members:
    """With the columns of weights that read units and make them."""
    return tuple(m for m in group.members if m.role == "in" or (m.role == "both" and m.dim > 0))


def _read_anyhow(group: Group) -> Members:
    """With rows, too, where a weight is used either way round."""
    return tuple(m for m in group.members if m.role == "in" or m in _read_again(group) or _twin(group, m))


def _twin(group: Group, member: Member) -> bool:
    return member.role == "both" and any(m.tensor == member.tensor and m.dim > 0 for m in group.members)


def find_readers(model: Model, analysis: Analysis) -> Readers:
    """The readers of every group whose units are made and read by weights, and counted by no normalisation.

    Args:
        model: left as it is; so only which of its weights meet matters, not what they are.
        analysis: its coupled groups.
    """
    left = {group.name: group for group in analysis.groups if group.exact and _read(group) and group.sources}
    known: dict[str, Members] = {}
    again: set[str] = set()
    try:
        trial = _Trial.of(model, analysis, left)
        for read in (_read, _read_again, _read_anyhow):
            asked = {name: read(group) for name, group in left.items() if name not in trial.unseen}
            found = trial.passing(asked)
            known |= {name: asked[name] for name in found}
            again |= set(found) if read is not _read else set()
            left = {name: group for name, group in left.items() if name not in found}
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError, CaptureError, SurgeryError) as error:
        names = [*known, *left]
        return Readers({}, {}, frozenset(), dict.fromkeys(names, f"its readers cannot be looked for: {brief(error)}"))
    makers = {name: _makers(analysis[name], members, name in again) for name, members in known.items()}
    whole = {name: BLIND if name in trial.unseen else HIDDEN for name in left}
    return Readers(makers, known, frozenset(again), whole)


def _makers(group: Group, readers: Members, again: bool) -> Members:
    made = [m for m in group.members if m.tensor in group.sources and m.role == "out"]
    if again:
        made += [m for m in group.members if m.role == "both" and _twin(group, m) and m not in readers]
    return tuple(made)


@dataclass(frozen=True, eq=False)
class _Trial:
    """Half of each group's units, and two networks to try them on: the given one, and one drawn anew.

    Weights hide readers: a rectifier that is off, a factor that is zero. Those of the second network do not.
    """

    nets: tuple[nn.Module, ...]
    analysis: Analysis
    half: Mapping[str, Tensor]
    given: tuple[object, ...]
    unseen: frozenset[str]

    @staticmethod
    def of(model: Model, analysis: Analysis, groups: Mapping[str, Group]) -> _Trial:
        """The trial of these groups."""
        generator = torch.Generator().manual_seed(1)
        half = {name: torch.arange(group.size // 2) for name, group in groups.items()}
        given = tuple(random_like(value, generator) for value in analysis.trace.example)
        drawn = copied(model.module)
        redraw_all(drawn, generator)
        unseen = set(half)
        for _ in range(VAIN if half else 0):
            unseen = look(drawn, analysis, half, given, training=False).unseen
            if not unseen:
                break
            redraw_units(drawn, analysis, {name: half[name] for name in unseen}, generator)
        if unseen:
            unseen &= look(copied(model.module), analysis, half, given, training=False).unseen
        return _Trial((model.module, drawn), analysis, half, given, frozenset(unseen))

    def passing(self, readers: Mapping[str, Members]) -> list[str]:
        """The groups whose units nobody else reads."""
        return _all_or_each(list(readers), lambda some: all(self._same(net, readers, some) for net in self.nets))

    def _same(self, net: nn.Module, readers: Mapping[str, Members], names: Sequence[str]) -> bool:
        """Whether the output stays, to the last bit, when units go whose readers are zero."""
        blank = copied(net)
        for name in names:
            for member in readers[name]:
                zero(blank, member, self.half[name])
        before = outputs(blank, self.given)
        mask(blank, self.analysis, {name: self.half[name] for name in names})
        return difference(outputs(blank, self.given), before) == 0


def _all_or_each(names: list[str], holds: Callable[[list[str]], bool]) -> list[str]:
    """The names for which it holds, tried together, then in halves."""
    if not names or holds(names):
        return names
    middle = len(names) // 2
    return _all_or_each(names[:middle], holds) + _all_or_each(names[middle:], holds) if middle else []


@torch.no_grad()
def zero(module: nn.Module, member: Member, units: Tensor) -> None:
    """Set what some units own of a tensor to zero, in place; `units` are numbers, or a truth value for each."""
    tensor_of(module, member.tensor).index_fill_(member.dim, member.indices[units].flatten(), 0.0)
