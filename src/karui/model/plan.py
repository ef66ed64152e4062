"""The surgery plan: what can be cut, what cannot and why, before anything is cut or trained.

Every group is tried: one unit of each goes, all together, and the cut is proved. Where that fails, the groups are
halved until those that fail stand alone; they are refused by name, and the others stay. A real cut does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from karui.errors import CaptureError, SurgeryError
from karui.model.capturing import capture_programs
from karui.model.collecting import newest_alone
from karui.model.cut import cut_graph, cut_own, remove_units
from karui.model.groups import Analysis, Group, Locked, coupled_groups, tensor_of

if TYPE_CHECKING:
    from jaxtyping import Int

    from karui.model.value import Model


@dataclass(frozen=True)
class Cuttable:
    """A group that can be cut.

    Settings:
        name: its first layer.
        units: how many it has.
        layers: the layers whose parameters shrink with it.
        parameters: how many parameters and buffers one unit owns.
        exact: False where the cut is exact up to normalisation.
        note: which normalisation that is.
        graph_form: whether the model must take its graph form for this cut, because its own forward cannot run.
    """

    name: str
    units: int
    layers: tuple[str, ...]
    parameters: int
    exact: bool
    note: str
    graph_form: bool


@dataclass(frozen=True)
class Refused:
    """Units that cannot be cut: their layer, how many there are, and why."""

    name: str
    units: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """What surgery can do to a model.

    Settings:
        groups: what can be cut.
        refused: what cannot.
        lost: why nothing can be cut at all, where the model's computation could not be captured; techniques that work
            layer by layer still can.
    """

    groups: tuple[Cuttable, ...] = ()
    refused: tuple[Refused, ...] = ()
    lost: str = ""
    analysis: Analysis | None = field(default=None, repr=False, compare=False)

    @property
    def confirmed(self) -> Analysis | None:
        """The analysis with the groups whose trial held; the others are among what stays, each with its reason."""
        if self.analysis is None:
            return None
        names = {group.name for group in self.groups}
        return replace(
            self.analysis,
            groups=tuple(group for group in self.analysis if group.name in names),
            locked=tuple(Locked(place.name, place.units, place.reason) for place in self.refused),
        )

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "groups": [asdict(g) | {"layers": list(g.layers)} for g in self.groups],
            "refused": [asdict(r) for r in self.refused],
            "lost": self.lost,
        }


@newest_alone()
def plan_surgery(model: Model, *, analysis: Analysis | None = None) -> Plan:
    """Try every cut, and say what holds.

    Args:
        model: what to look at; left as it is.
        analysis: its coupled groups, where they are known already.

    Example:
        >>> from karui.model import Model
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> plan = plan_surgery(Model(net, example=(torch.randn(1, 4),)))
        >>> [(g.name, g.units) for g in plan.groups], [(r.name, r.units, r.reason) for r in plan.refused]
        ([('0', 8)], [('2', 2, "the model's output keeps its size")])
    """
    try:
        analysis = analysis or coupled_groups(model)
    except CaptureError as error:
        return Plan(lost=str(error))
    refused = [Refused(place.name, place.size, place.reason) for place in analysis.locked]
    names = [g.name for g in analysis.groups]
    own, failed = _halved(names, lambda some: cut_own(model, analysis, _one_each(some)))
    formed: list[str] = []
    if failed:
        try:
            programs = capture_programs(model.module, model.example, analysis.trace)
        except SurgeryError as error:
            failed = {name: f"{reason} {error.message}" for name, reason in failed.items()}
        else:
            formed, failed = _halved(list(failed), lambda some: cut_graph(model, analysis, _one_each(some), programs))
    refused += [Refused(name, analysis[name].size, reason) for name, reason in failed.items()]
    groups = tuple(_cuttable(model, g, g.name in formed) for g in analysis if g.name in own or g.name in formed)
    return Plan(groups, tuple(refused), analysis=analysis)


def remove_provable(
    model: Model,
    removed: Mapping[str, Int[Tensor, "units"]],
    *,
    allow_normalisation: bool = False,
    analysis: Analysis | None = None,
) -> tuple[Model, dict[str, str]]:
    """The model without those of the units whose cut is proved; and the groups that stay whole, with the reason.

    Args:
        model: what to cut; left as it is.
        removed: for each group's name, the numbers of the units that go.
        allow_normalisation: whether units may be cut that a normalisation counts (exact up to normalisation).
        analysis: the model's coupled groups, where they are known already.

    Raises:
        SurgeryError: no group of these can be cut.

    Example:
        >>> from karui.model import Model
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b, self.unused = (torch.nn.Linear(n, m) for n, m in ((4, 8), (8, 2), (8, 3)))
        ...     def forward(self, x):
        ...         h = self.a(x).relu()
        ...         self.unused(h)
        ...         return self.b(h)
        >>> gone = {"a": torch.tensor([1]), "unused": torch.tensor([0])}
        >>> light, whole = remove_provable(Model(Net(), example=(torch.randn(1, 4),)), gone)
        >>> light.module.a.out_features, list(whole)
        (7, ['unused'])
    """
    found = analysis or coupled_groups(model)

    def cut(names: list[str]) -> Model:
        some = {name: removed[name] for name in names}
        return remove_units(model, some, allow_normalisation=allow_normalisation, analysis=found)

    try:
        return cut(list(removed)), {}
    except SurgeryError as refused:
        good, failed = _halved(list(removed), cut)
        if not good or not failed:
            raise
        try:
            return cut(good), failed
        except SurgeryError as again:
            raise again from refused


def _one_each(names: list[str]) -> dict[str, Tensor]:
    return {name: torch.tensor([0]) for name in names}


def _halved(names: list[str], attempt: Callable[[list[str]], Any]) -> tuple[list[str], dict[str, str]]:
    """The names with which `attempt` succeeds, and why it fails with the others, each alone."""
    if not names:
        return [], {}
    try:
        attempt(names)
    except (SurgeryError, CaptureError) as error:
        if len(names) == 1:
            return [], {names[0]: error.message.replace(f"Cut of '{names[0]}': ", "")}
        half = len(names) // 2
        one, other = _halved(names[:half], attempt), _halved(names[half:], attempt)
        return one[0] + other[0], one[1] | other[1]
    return names, {}


def _cuttable(model: Model, group: Group, graph_form: bool) -> Cuttable:
    """What is known of a group that can be cut."""
    owned: dict[tuple[str, int], int] = {}
    for member in group.members:
        tensor = tensor_of(model.module, member.tensor)
        owned[member.tensor, member.dim] = member.indices.shape[1] * tensor.numel() // tensor.shape[member.dim]
    layers = tuple(dict.fromkeys(m.tensor.rpartition(".")[0] or m.tensor for m in group.members))
    return Cuttable(group.name, group.size, layers, sum(owned.values()), group.exact, group.reason, graph_form)
