"""The cut: an edit that keeps some indices of some tensors, and tells the modules their new sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from karui.errors import CaptureError, SurgeryError, require
from karui.model.capturing import capture_programs
from karui.model.collecting import newest_alone
from karui.model.copying import copied, doubled
from karui.model.edits import edit
from karui.model.graphform import GraphForm, graph_form
from karui.model.groups import Analysis, coupled_groups
from karui.model.hollow import smaller
from karui.model.program import Program
from karui.model.proof import BlindError, Candidate, second_input
from karui.model.proof import prove as prove_cut
from karui.model.rewrite import apply_rewrites, rewrites
from karui.model.running import outputs
from karui.model.sizes import new_sizes
from karui.model.trace import brief, first, minds_training, trains_alike, widen
from karui.model.walking import layers

if TYPE_CHECKING:
    from jaxtyping import Int

    from karui.model.value import Model


@edit
@dataclass(frozen=True)
class Cut:
    """Keep only some indices of some dimensions.

    Settings:
        kept: (tensor name, dimension, indices that stay), one for each dimension that shrinks.
        sizes: (module path, attribute, new value), for attributes that repeat a size.
        removed: how many units of each group went, for people.
        programs: how the captured evaluation and training programs change, where the model takes its graph form
            because its own forward cannot run after the cut; None where it can.
        recorded: whether those programs were recorded, so that they are captured in the same way again.
    """

    kind: ClassVar[str] = "cut"
    kept: list[Any]
    sizes: list[Any] = field(default_factory=list)
    removed: dict[str, int] = field(default_factory=dict)
    programs: list[Any] | None = None
    recorded: bool = False

    def replay(self, module: nn.Module | None, example: tuple[Any, ...]) -> nn.Module:
        """The module with smaller tensors and new attributes, in its graph form where the cut needs that."""
        require(module is not None, "A cut needs a module to be replayed on.", "", SurgeryError)
        assert module is not None  # noqa: S101  (for the type checker)
        if self.programs is None:
            return self.shrunk(module)
        programs = capture_programs(module, example, recorded=self.recorded)  # first, as it copies the module
        return self.form(self.shrunk(module), programs)

    def shrunk(self, module: nn.Module, *, wide: bool = False) -> nn.Module:
        """A copy of `module` with smaller tensors, in double precision if `wide`, and the attributes that say so."""
        module = (doubled if wide else copied)(module, smaller(module, self.kept))
        owners = layers(module)
        for path, name, value in self.sizes:  # plain values: not what `nn.Module` looks for when it is assigned to
            object.__setattr__(owners[path], name, tuple(value) if isinstance(value, list) else value)
        return module

    def form(self, module: nn.Module, programs: tuple[Program, Program], dtype: torch.dtype | None = None) -> GraphForm:
        """The graph form over a module that has been shrunk, from the programs of the whole one."""
        assert self.programs is not None  # noqa: S101  (asked only where there are some)
        evaluation = apply_rewrites(programs[0], self.programs[0])
        training = evaluation if programs[1] is programs[0] else apply_rewrites(programs[1], self.programs[1])
        return graph_form(module, evaluation, training, dtype)

    def describe(self) -> str:
        """What was cut."""
        return f"cut {sum(self.removed.values())} units of {len(self.removed)} groups"


def make_cut(module: nn.Module, analysis: Analysis, removed: Mapping[str, Tensor]) -> Cut:
    """The edit that removes these units."""
    alive = analysis.left(removed)
    kept, touched = [], {}
    for name, dims in analysis.trace.slots.items():
        for dim, labels in enumerate(dims):
            stays = alive[labels]
            if not stays.all():
                stay = np.flatnonzero(stays)
                require(
                    len(stay) > 0,
                    f"Nothing would be left of '{name}'.",
                    "Leave more units of the groups that it belongs to.",
                    SurgeryError,
                )
                kept.append([name, dim, stay.tolist()])
                touched.setdefault(name, {})[dim] = len(stay)
    return Cut(kept, new_sizes(module, analysis, touched, alive), {n: len(u) for n, u in removed.items()})


@newest_alone()
def remove_units(
    model: Model,
    removed: Mapping[str, Int[Tensor, "units"]],
    *,
    prove: bool = True,
    allow_normalisation: bool = False,
    analysis: Analysis | None = None,
) -> Model:
    """The model without these units, proved to compute what it does with their outputs zeroed.

    Args:
        model: what to cut; left as it is.
        removed: for each group's name, the numbers of the units that go.
        prove: whether the cut is proved.
        allow_normalisation: whether units may be cut that a normalisation counts (exact up to normalisation).
        analysis: the model's coupled groups, where they are known already.

    Raises:
        SurgeryError: a group or unit does not exist, a whole group would go, or the proof fails.
        UsageError: a group's name is not known.

    Example:
        >>> from karui.model import Model
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> light = remove_units(Model(net, example=(torch.randn(1, 4),)), {"0": torch.tensor([1, 5])})
        >>> light.module[0].out_features, light.lineage[0].describe()
        (6, 'cut 2 units of 1 groups')
    """
    analysis = analysis or coupled_groups(model)
    chosen = {name: _checked(analysis, name, units, allow_normalisation) for name, units in removed.items()}
    chosen = {name: units for name, units in chosen.items() if len(units)}
    if not chosen:
        return model
    try:
        return cut_own(model, analysis, chosen, prove=prove)
    except BlindError:
        raise
    except SurgeryError as refused:
        own = refused
        for error in (refused, refused.__cause__):  # their frames would hold the cut model as long as the other is made
            clear_frames(None if error is None else error.__traceback__)
    try:
        programs = capture_programs(model.module, model.example, analysis.trace)
        return cut_graph(model, analysis, chosen, programs, prove=prove)
    except (SurgeryError, CaptureError) as refused:
        both = own.message if refused.message == own.message else f"{own.message} {refused.message}"
        raise type(refused)(both, refused.hint) from own


def cut_own(model: Model, analysis: Analysis, chosen: Mapping[str, Tensor], *, prove: bool = True) -> Model:
    """Cut these units, keeping the model's own forward.

    Raises:
        SurgeryError: the forward cannot run after the cut, or computes something else.
    """
    return _finished(model, Candidate(make_cut(model.module, analysis, chosen), analysis, chosen), prove)


def cut_graph(
    model: Model,
    analysis: Analysis,
    chosen: Mapping[str, Tensor],
    programs: tuple[Program, Program],
    *,
    prove: bool = True,
) -> Model:
    """Cut these units; the model takes its graph form, made of `programs` with their sizes rewritten.

    Raises:
        SurgeryError: the graph form does not run after the cut, or computes something else.
    """
    step = with_rewrites(make_cut(model.module, analysis, chosen), model, programs)
    return _finished(model, Candidate(step, analysis, chosen, programs), prove)


def _finished(model: Model, candidate: Candidate, prove: bool) -> Model:
    """The cut model, after it ran and was proved."""
    module = candidate.build(model.module)
    single = _runs(module, model, candidate, second_input(candidate) if prove else model.example)
    if prove:
        prove_cut(model, candidate, module, single)
    return model.evolve(module, candidate.step)


def _runs(module: nn.Module, model: Model, candidate: Candidate, given: tuple[Any, ...]) -> list[Tensor]:
    """What a cut model gives; refused where it fails. In training it runs, too, where that may take another path."""
    try:
        made = outputs(module, given, training=False)
        if minds_training(model.module) and not trains_alike(candidate.analysis.trace):
            outputs(module, widen(model.example), training=True)
    except Exception as error:
        form = "graph form" if isinstance(module, GraphForm) else "own forward"
        raise SurgeryError(f"The model's {form} does not run after the cut: {brief(error)}.") from error
    return made


def with_rewrites(step: Cut, model: Model, programs: tuple[Program, Program]) -> Cut:
    """The cut of the graph form: the same tensors, and the programs' arguments that must change."""
    changed = [rewrites(programs[0], model.module, first(model.example), step.kept, training=False)]
    if programs[1].twin is programs[0]:
        changed.append(changed[0])
    elif programs[1] is not programs[0]:
        changed.append(rewrites(programs[1], model.module, widen(model.example), step.kept, training=True))
    return replace(step, programs=changed, recorded=programs[0].recorded)


def _checked(analysis: Analysis, name: str, units: Tensor, allow_normalisation: bool) -> Tensor:
    """The unit numbers, sorted and once each."""
    group = analysis[name]
    units = torch.as_tensor(units, dtype=torch.int64).reshape(-1).unique()
    inside = len(units) == 0 or (int(units.min()) >= 0 and int(units.max()) < group.size)
    require(
        inside,
        f"Group '{name}' has {group.size} units; asked to remove {units.tolist()}.",
        "Count units from 0.",
        SurgeryError,
    )
    require(
        len(units) < group.size,
        f"Group '{name}': all {group.size} units would go.",
        "Leave at least one.",
        SurgeryError,
    )
    require(
        group.exact or allow_normalisation or not len(units),
        f"Group '{name}': {group.reason}, so a cut is exact only up to normalisation.",
        "Allow it with allow_normalisation=True, or leave the group whole.",
        SurgeryError,
    )
    return units
