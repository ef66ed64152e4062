"""The pre-flight: what each step can act on, what it lacks and what it would gain, before anything is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from karui.errors import CaptureError, KaruiError, NeedError
from karui.measuring import count
from karui.measuring.precision import other_than_float32
from karui.model import Analysis, Note, coupled_groups, plan_surgery
from karui.recipes.recipe import Recipe, slug_of
from karui.technique import card_of, lacking
from karui.technique.protocol import needs_of, require_fit
from karui.technique.pruning.schedule import WHOLE

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique import Bench, Technique

PREDICTABLE = ("cut", "replace", "forward")
"""Kinds whose change of structure does not wait for a training: it can be tried at once."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What is known of one step before it runs.

    Settings:
        technique: its slug.
        refusals: why it cannot run, each with its remedy; empty where it can.
        remarks: what else a person should know.
        parameters, macs: of the model after it, counted in a trial without training; None where only the run can tell.
    """

    technique: str
    refusals: tuple[tuple[str, str], ...] = ()
    remarks: tuple[str, ...] = ()
    parameters: int | None = None
    macs: int | None = None


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """The plan of a recipe on a model.

    Settings:
        parameters, macs: of the model as it is.
        steps: one plan for each step.
        surgery: what can be cut, and what cannot and why; None where the model cannot be captured.
        uncaptured: why it cannot; empty where it can.
        formed: the groups whose cut makes the model take its graph form.
        unmeasured: why it cannot be worked on under a budget; empty where it can.
    """

    parameters: int
    macs: int
    steps: tuple[StepPlan, ...] = ()
    surgery: Analysis | None = None
    uncaptured: str = ""
    formed: tuple[str, ...] = ()
    unmeasured: str = ""

    @property
    def refusals(self) -> tuple[tuple[str, str], ...]:
        """Why the recipe cannot run, each with its remedy, naming the step."""
        return tuple(
            (f"Step {number}: {message}", hint)
            for number, step in enumerate(self.steps, 1)
            for message, hint in step.refusals
        )

    def check(self) -> None:
        """Refuse what cannot run.

        Raises:
            NeedError: a step cannot run; the message names the first, and how many there are.
        """
        if self.refusals:
            message, hint = self.refusals[0]
            more = len(self.refusals) - 1
            raise NeedError(message + (f" ({more} more: karui plan tells them)" if more else ""), hint)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        remarks = [f"{step.technique}: {remark}" for step in self.steps for remark in step.remarks]
        return {
            **_surgery_json(self.surgery, self.formed),
            "parameters": self.parameters,
            "macs": self.macs,
            "steps": [dataclasses.asdict(step) for step in self.steps],
            "remarks": [*filter(None, (self.uncaptured, self.unmeasured)), *remarks],
        }


def _surgery_json(analysis: Analysis | None, formed: tuple[str, ...]) -> dict[str, Any]:
    if analysis is None:
        return {"groups": [], "locked": []}
    return {
        "groups": [
            {
                "name": group.name,
                "size": group.size,
                "exact": group.exact,
                "reason": group.reason,
                "graph_form": group.name in formed,
                "members": [{"tensor": m.tensor, "dim": m.dim, "role": m.role} for m in group.members],
            }
            for group in analysis.groups
        ],
        "locked": [dataclasses.asdict(locked) for locked in analysis.locked],
    }


def plan_recipe(model: Model, recipe: Recipe | None, bench: Bench) -> Preflight:
    """Look at the model and at each step; nothing is trained, and the model stays as it is.

    Args:
        model: the dense model.
        recipe: its steps are looked at in order; None looks at the model only.
        bench: what the recipe would run with.
    """
    surgery, uncaptured, formed = None, "", ()
    try:
        plan = plan_surgery(model, analysis=coupled_groups(model))
        surgery, formed = plan.confirmed, tuple(group.name for group in plan.groups if group.graph_form)
    except CaptureError as error:
        uncaptured = error.message
    counts = count(model)
    plans, current, known = [], model, True
    for step in recipe.steps if recipe else ():
        told, current = _look(step, current, bench, uncaptured, known=known)
        plans.append(told)
        card = card_of(step)
        known = known and card is not None and card.same_signature
        bench = dataclasses.replace(bench, dense=model)
    return Preflight(
        parameters=counts.parameters,
        macs=counts.macs,
        steps=tuple(plans),
        surgery=surgery,
        uncaptured=uncaptured,
        formed=formed,
        unmeasured=_unmeasured(model),
    )


def _unmeasured(model: Model) -> str:
    precision = other_than_float32(model)
    return precision and f"its weights are {precision}: a budget, measured in ONNX Runtime, takes float32 only"


def _look(step: Technique, model: Model, bench: Bench, uncaptured: str, *, known: bool) -> tuple[StepPlan, Model]:
    """The plan of one step, and the model that the next one would be given; `known`: no step changed its outputs."""
    slug, card = slug_of(step), card_of(step)
    assert card is not None  # noqa: S101  (what has a slug has a card)
    missing = tuple(lacking(step, model, bench))
    if missing:
        return StepPlan(technique=slug, refusals=missing), model
    if card.kind == "cut" and uncaptured:
        hint = "Techniques that replace layers one by one still work; karui list tells them."
        return StepPlan(technique=slug, refusals=((f"'{slug}' cuts the graph: {uncaptured}", hint),)), model
    try:
        if known:
            require_fit((step,), model, bench)
        remarks = _remarks(step, model)
        trial = _without_training(step)
        if card.kind not in PREDICTABLE or "training" in needs_of(trial):
            return StepPlan(technique=slug, remarks=(*remarks, "what it gains is known after the training")), model
        tried = trial.apply(model, dataclasses.replace(bench, progress=False, checkpoints=None))
    except KaruiError as error:
        named = error.message.startswith(f"'{slug}'")
        return StepPlan(
            technique=slug, refusals=((error.message if named else f"'{slug}': {error.message}", error.hint),)
        ), model
    remarks = _with_what_stays(remarks, _left_whole(model, tried))
    counts, before = count(tried), count(model)
    if (counts.parameters, counts.macs) == (before.parameters, before.macs) and {"parameters", "macs"} & set(
        card.reduces
    ):
        remarks = (*remarks, "it finds nothing to act on with these settings")
    return StepPlan(technique=slug, remarks=remarks, parameters=counts.parameters, macs=counts.macs), tried


def _remarks(step: Technique, model: Model) -> tuple[str, ...]:
    """What the technique itself has to say of this model; one need not have anything to say."""
    own = getattr(step, "remarks", None)
    return () if own is None else tuple(own(model))


def _left_whole(model: Model, tried: Model) -> dict[str, str]:
    """What a trial could not cut, and why."""
    notes = [edit for edit in tried.lineage[len(model.lineage) :] if isinstance(edit, Note)]
    return {name: reason for note in notes for name, reason in note.settings.get(WHOLE, {}).items()}


def _with_what_stays(remarks: tuple[str, ...], whole: Mapping[str, str]) -> tuple[str, ...]:
    """A technique tells what it would cut from the graph alone; where the trial could not, the line says so instead."""
    told = {name: f"left whole, as its cut cannot be proved: {reason}" for name, reason in whole.items()}
    lines = []
    for remark in remarks:
        name, _, rest = remark.partition(": ")
        reason = told.pop(name, None)
        lines.append(remark if reason is None else f"{name}: {rest.partition(',')[0]}, {reason}")
    return (*lines, *(f"{name}: {reason}" for name, reason in told.items()))


def _without_training(step: Technique) -> Technique:
    """The same settings, with no training after the surgery where the technique leaves that open."""
    names = {field.name for field in dataclasses.fields(step)}  # pyright: ignore[reportArgumentType]
    try:
        return dataclasses.replace(step, epochs=0) if "epochs" in names else step  # pyright: ignore[reportArgumentType, reportCallIssue]
    except KaruiError:
        return step
