"""The proof: the model with the units' outputs zeroed computes what the cut model does.

Both run in float64, on the example and on random inputs, through the user's own forward. Zeroed are all slices that
the units own: what makes them, and what reads them. Equal means within a measured rounding floor: how far the output in
the network's own precision lies from that in double, scaled to the latter. A cut of units that the output does not
show would prove nothing, so the units must be visible; where the weights hide them, others are drawn for the proof,
see `karui.model.sight`. Images are proved on corners where those tell as much, see `karui.model.corners`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from karui.errors import CaptureError, SurgeryError, require
from karui.model.copying import copied, doubled
from karui.model.corners import prove_on_corners
from karui.model.graphform import graph_form
from karui.model.groups import analyse
from karui.model.hollow import Hollow
from karui.model.running import difference, double, double_precision, joined, outputs, random_like, run_double
from karui.model.sight import drawings, look, mask, zeroed
from karui.model.survivors import run_on_survivors
from karui.model.trace import Trace, brief, minds_training, traced, widen
from karui.model.verdict import FAINT, SLACK, Proof
from karui.model.walking import lent

if TYPE_CHECKING:
    from karui.model.cut import Cut
    from karui.model.groups import Analysis
    from karui.model.program import Program
    from karui.model.value import Model


Pair = tuple[tuple[Any, ...], tuple[Any, ...]]


# What both kinds of weight normalisation call the direction of a weight: of torch.nn.utils.parametrizations, and older.
WEIGHT_NORMED = re.compile(r"(?:(.*?)\.)?(?:parametrizations\.\w+\.original1|\w+_v)")


class BlindError(SurgeryError):
    """The units do not show in the output, so a proof would prove nothing."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A cut that is to be proved.

    Settings:
        step: the edit.
        analysis: the coupled groups that it was made from.
        removed: the units that go.
        programs: the captured programs of the whole model, where the cut model is to take its graph form.
    """

    step: Cut
    analysis: Analysis
    removed: Mapping[str, Tensor]
    programs: tuple[Program, Program] | None = None

    @property
    def exact(self) -> bool:
        """Whether no normalisation counts the units."""
        return all(self.analysis[name].exact for name in self.removed)

    def build(self, dense: nn.Module, dtype: torch.dtype | None = None, *, wide: bool = False) -> nn.Module:
        """The cut model of a whole one, which is left as it is; in double precision if `wide`.

        `dtype` is what a graph form is written for; None takes that of the network.
        """
        module = self.step.shrunk(dense, wide=wide)
        return module if self.programs is None else self.step.form(module, self.programs, dtype)

    @property
    def graph(self) -> bool:
        """Whether the cut model takes its graph form."""
        return self.programs is not None or self.step.programs is not None

    def masked(self, dense: nn.Module) -> nn.Module:
        """A copy of the whole model in double precision, with the units that go zeroed."""
        wide = doubled(dense)
        mask(wide, self.analysis, self.removed)
        return wide

    def hollow(self, light: nn.Module, dense: nn.Module) -> Hollow:
        """The cut model of a whole one, without its weights meanwhile."""
        return Hollow(light, dense, self.step.kept)

    def __str__(self) -> str:
        names = [f"'{name}'" for name in self.removed]
        return f"Cut of {', '.join(names[:4])}{' and others' if len(names) > 4 else ''}"


def measure(
    drawn: nn.Module,
    candidate: Candidate,
    pair: Pair,
    whole: list[Tensor],
    *,
    training: bool,
    light: Hollow | None = None,
    single: list[Tensor] | None = None,
) -> Proof:
    """Masked against cut, on both inputs, in double precision; `whole` is the output of `drawn` for the second one.

    `light` is the cut model of `drawn`, and `single` its output for the second input, where they are there already.
    The rounding floor is how far that output lies from the cut model's in double precision: the rounding of the whole
    computation, scaled to the precision of the proof. A network in double precision is moved by a unit in the last
    place of every weight instead.

    Large networks are few at a time: beside `drawn` and what it was drawn from there is one of the masked model, the
    cut one, and the cut one in double precision.
    """
    if light is None:
        with candidate.hollow(candidate.build(drawn, kind_of(drawn)), drawn) as made:
            return measure(drawn, candidate, pair, whole, training=training, light=made, single=single)
    if single is None:
        with light.filled() as module:
            single = outputs(module, pair[1], training=training)
    kind, eps = kind_of(drawn), torch.finfo(torch.float64).eps
    scale = max((float(t.abs().max()) for t in single if t.numel()), default=0.0)
    effect = difference(whole, single)
    faint = not effect > FAINT * scale
    if faint:
        whole = run_double(doubled(drawn), double(pair[1]), training=training)
    inputs, masked = _masked_outputs(drawn, candidate, pair, training=training)
    # A program keeps the path of the batch that it was captured with; so that batch is looked at, too.
    graph = candidate.graph and len(inputs) == 1
    alone = _alone(drawn, candidate, pair[1], training=training) if graph and candidate.exact else None

    cut = candidate.build(drawn, torch.float64, wide=True) if candidate.graph else light.doubled()
    exact: list[Tensor] | None = None
    if faint:
        exact = run_double(cut, double(pair[1]), training=training)
        effect = difference(whole, exact)
    shrunk = [run_double(cut, double(given), training=training) for given in inputs]
    apart = graph and not _alike(alone, single, shrunk[0], kind)
    if apart:
        shrunk.append(run_double(cut, double(pair[1]), training=training))
    floor: float | None = None
    if kind is not torch.float64:
        exact = shrunk[1] if len(shrunk) == 2 else exact or _second(shrunk[0], single)
        exact = exact or run_double(cut, double(pair[1]), training=training)
        floor = difference(exact, single) * eps / torch.finfo(kind).eps
    del cut
    if apart:
        masked += _masked(candidate.masked(drawn), candidate, [pair[1]], training=training)
    gap = max(difference(one, other) for one, other in zip(masked, shrunk, strict=True))
    if floor is None:
        with light.filled() as module, jittered(module):
            floor = difference(outputs(module, pair[1], training=training), single)
    return Proof(gap, max(floor, scale * eps / 2), effect)


def kind_of(module: nn.Module) -> torch.dtype:
    """The precision of a network: of its first parameter that has one."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _masked_outputs(
    drawn: nn.Module, candidate: Candidate, pair: Pair, *, training: bool
) -> tuple[list[tuple[Any, ...]], list[list[Tensor]]]:
    """What the masked model is run on, and what it gives: both inputs as one batch, or one by one."""
    dense = candidate.masked(drawn)
    inputs: list[tuple[Any, ...]] = [joined(*pair)]
    try:
        return inputs, _masked(dense, candidate, inputs, training=training)
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError, CaptureError):  # its batch is fixed
        inputs = list(pair)
        return inputs, _masked(dense, candidate, inputs, training=training)


def _alone(drawn: nn.Module, candidate: Candidate, inputs: tuple[Any, ...], *, training: bool) -> list[Tensor]:
    """What the masked model gives for one input in its own precision."""
    with lent(drawn, zeroed(drawn, candidate.analysis, candidate.removed)):
        return outputs(drawn, inputs, training=training)


def _alike(alone: list[Tensor] | None, single: list[Tensor], both: list[Tensor], kind: torch.dtype) -> bool:
    """Whether masked and cut model agree on one input to the last places of their own precision, and as in a batch.

    `alone` is what the masked model gives for the input, `single` what the cut one does, and `both`, in double
    precision, as the second half of a batch.
    """
    half = _second(both, single)
    if alone is None or half is None or kind is torch.float64:
        return False
    scale = max((float(t.abs().max()) for t in single if t.numel()), default=0.0)
    tolerance = SLACK * torch.finfo(kind).eps / 2 * scale
    return max(difference(half, single), difference(alone, single)) <= tolerance


def _second(both: list[Tensor], single: list[Tensor]) -> list[Tensor] | None:
    """The outputs for the second half of a batch, where they are of the shapes of `single`; else None."""
    if any(t.shape != (2 * len(s), *s.shape[1:]) if s.ndim else True for t, s in zip(both, single, strict=True)):
        return None
    return [t[len(s) :] for t, s in zip(both, single, strict=True)]


def _masked(dense: nn.Module, candidate: Candidate, inputs: list[Any], *, training: bool) -> list[list[Tensor]]:
    """What the masked model gives in double precision, with statistics over survivors only where the cut needs that."""
    if candidate.exact:
        return [run_double(dense, double(given), training=training) for given in inputs]
    return [_on_survivors(dense, candidate, double(given), training=training) for given in inputs]


def _on_survivors(dense: nn.Module, candidate: Candidate, given: tuple[Any, ...], *, training: bool) -> list[Tensor]:
    """One such output. The analysis has seen the operators; where others run for this input, it is looked at anew."""
    kept, seen = candidate.step.kept, candidate.analysis
    if not training:
        try:
            return run_on_survivors(dense, given, seen.trace, seen.alive(kept), training=training)
        except SurgeryError:  # a larger batch is copied where one sample is not, attention in double is not fused
            pass
    seen = analyse(_traced_double(dense, given, training=training), [])
    return run_on_survivors(dense, given, seen.trace, seen.alive(kept), training=training)


def _traced_double(module: nn.Module, inputs: tuple[Any, ...], *, training: bool) -> Trace:
    with double_precision():
        return traced(module, inputs, training=training)


@contextmanager
def jittered(module: nn.Module) -> Iterator[None]:
    """Every weight moved by one unit in its last place, up or down, for a while."""
    moved = [p for p in module.parameters() if p.is_floating_point()]
    before = [p.detach().clone() for p in moved]
    with torch.no_grad():
        for p in moved:
            step = torch.finfo(p.dtype).eps
            flat = p.view(-1) if p.is_contiguous() else p.reshape(-1)
            for start, way in ((0, 1 + step), (1, 1 - step), (2, 1 + step)):
                flat[start::3] *= way
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(moved, before, strict=True):
                p.copy_(value)


def second_input(candidate: Candidate) -> tuple[Any, ...]:
    """The random input of a proof. Two inputs of one shape differ: a network that compares them would show nothing."""
    generator = torch.Generator().manual_seed(0)
    return tree_map(lambda t: random_like(t, generator), candidate.analysis.trace.example)


def prove(
    model: Model, candidate: Candidate, light: nn.Module | None = None, single: list[Tensor] | None = None
) -> Proof:
    """Prove that a cut removes its units and changes nothing else.

    `light` is the cut model, and `single` its output for the random input, where they are there already. Groups that
    only training shows (an auxiliary head) are proved in training mode too, without dropout.

    Raises:
        BlindError: some group's units do not show in the output, whatever the weights.
        SurgeryError: the cut model computes something else, or cannot run.
    """
    if light is None:
        return _proved(model, candidate, None, single)
    with candidate.hollow(light, model.module) as hollow:
        return _proved(model, candidate, hollow, single)


def _proved(model: Model, candidate: Candidate, light: Hollow | None, single: list[Tensor] | None) -> Proof:
    """The proof, with the cut model's weights there only while they are needed."""
    example, removed = candidate.analysis.trace.example, candidate.removed
    other = second_input(candidate)
    if light is not None and single is not None and candidate.programs is None and candidate.exact:
        found = prove_on_corners(model.module, candidate, (example, other), light, single)
        if found is not None:
            return found
        light.empty()
    draws = drawings(model.module, candidate.analysis, removed)
    drawn, unseen = next(draws), set()
    while drawn is not None:
        sight = look(drawn, candidate.analysis, removed, other, training=False)
        unseen = sight.unseen
        modes = [(False, (example, other), sight.output)]
        if sight.unused and minds_training(model.module):
            sight = look(drawn, candidate.analysis, removed, widen(other), training=True)
            unseen = unseen & sight.unseen
            modes.append((True, (widen(example), widen(other)), sight.output))
        if not unseen:
            own = drawn is model.module
            found = [
                _compared(
                    drawn,
                    candidate,
                    pair,
                    whole,
                    training=mode,
                    light=light if own else None,
                    single=single if own and not mode else None,
                )
                for mode, pair, whole in modes
            ]
            if found[-1].visible:
                return replace(found[-1], redrawn=drawn is not model.module)
        drawn = draws.send(unseen)
    which = ", ".join(f"'{name}'" for name in sorted(unseen)[:4]) or "its groups"
    raise BlindError(
        f"{candidate}: units of {which} do not show in the output, so nothing can be proved.", "Leave the group whole."
    )


def _infinite(candidate: Candidate) -> str:
    """Why a masked model's output is not finite, where its cut one's is."""
    members = [member for name in candidate.removed for member in candidate.analysis[name].members]
    owners = (WEIGHT_NORMED.fullmatch(member.tensor) for member in members)
    normed = dict.fromkeys(owner[1] or "the model" for owner in owners if owner)
    if normed:
        return (
            f"weight normalisation divides the weight of {', '.join(normed)} by its norm, so its units cannot be "
            "switched off for the proof; fold it into the weight first, with "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'), or remove_weight_norm(layer) where "
            "the older weight_norm made it."
        )
    return (
        "the masked model's output is not finite, as where something is divided by the norm of the units, or is of "
        "another shape than the cut one's."
    )


def _compared(
    drawn: nn.Module,
    candidate: Candidate,
    pair: Pair,
    whole: list[Tensor],
    *,
    training: bool,
    light: Hollow | None = None,
    single: list[Tensor] | None = None,
) -> Proof:
    """The measurement, refused where the two models differ.

    A forward that computes some constants in single precision differs from its captured program in double by their
    rounding. So where a graph form does not match the own forward, it is proved in two steps: the program of the whole
    model equals the own forward in single precision, and the cut program equals the masked program.
    """
    try:
        found = measure(drawn, candidate, pair, whole, training=training, light=light, single=single)
        if not found.holds and candidate.programs is not None and found.difference < FAINT * found.effect:
            program = graph_form(copied(drawn), *candidate.programs)
            again = outputs(program, pair[1], training=training)
            with jittered(program):
                floor = difference(outputs(program, pair[1], training=training), again)
            if difference(again, whole) <= SLACK * floor:
                program = graph_form(doubled(drawn), *candidate.programs, torch.float64)
                found = measure(program, candidate, double(pair), whole, training=training)
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError, CaptureError) as error:
        raise SurgeryError(f"{candidate}: the model does not run afterwards: {brief(error)}.") from error
    require(
        math.isfinite(found.difference), f"{candidate}: {_infinite(candidate)}", "Leave the group whole.", SurgeryError
    )
    require(
        found.holds,
        f"{candidate}: the cut model differs from the masked one by {found.difference:.2g}, "
        f"where rounding explains {found.floor:.2g}.",
        "Leave the group whole.",
        SurgeryError,
    )
    return found
