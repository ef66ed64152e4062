"""The menu: what every technique of the catalogue offers for a model, with the measured time and harm of each offer.

A technique joins by offering candidates (see `karui.technique.Candidate`); nothing here names one. What is measured
slower than what it replaces, beyond the clock's noise, is struck off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from karui.errors import CaptureError, KaruiError, SurgeryError, require, told
from karui.index import Entry, techniques
from karui.measuring import onnx_form
from karui.model import Analysis, Model, Note, coupled_groups, remove_units, replace_layers
from karui.recipes.budget.cells import Cells
from karui.recipes.budget.choice import Problem, Table
from karui.recipes.budget.harm import harms
from karui.recipes.budget.refusals import Refusals, reason, slug_of
from karui.recipes.budget.skips import skips
from karui.recipes.budget.tables import Coster
from karui.technique import Candidate, Offers

if TYPE_CHECKING:
    from torch import nn

    from karui.measuring import OnnxForm
    from karui.recipes.budget.timing import Stopwatch
    from karui.technique import Bench

T = TypeVar("T")
KINDS = ("cut", "replace", "forward", "influence")
"""Kinds of technique that can change a trained network at once, without a training of their own."""
CAP = 1e6
"""Harm of a candidate whose output is not finite: never worth it, and still a number."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Offer:
    """A candidate, measured alone.

    Settings:
        candidate: what would be done.
        harm: how far it moves the output; see `karui.recipes.budget.harm`.
        seconds, bytes: how the whole model's time and ONNX file change.
    """

    candidate: Candidate
    harm: float
    seconds: float
    bytes: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Menu:
    """All offers for a model, by place.

    Settings:
        model: what they are for.
        offers: for each place what can be done there; a place is a coupled group ("units of X") or a layer.
        tables: how time and bytes depend on the settings of neighbours.
        analysis: the coupled groups; None where the model cannot be captured.
        notes: what could not be offered, and why.
        slower: how many offers were struck off because they are slower.
    """

    model: Model
    offers: Mapping[str, tuple[Offer, ...]]
    tables: tuple[Table, ...]
    analysis: Analysis | None
    notes: tuple[str, ...] = ()
    slower: int = 0
    failed: set[str] = field(default_factory=set)

    def problem(self, limits: Mapping[str, float]) -> Problem:
        """What is to be chosen, within limits on the changes of "time" and "bytes"."""
        harm = {place: [0.0, *(min(offer.harm, CAP) for offer in offers)] for place, offers in self.offers.items()}
        out = [Table((place,), {"time": _only_first(len(harm[place]))}) for place in sorted(self.failed)]
        return Problem(harms=harm, tables=(*self.tables, *out), limits=limits)

    def taken(self, chosen: Mapping[str, int]) -> dict[str, Offer]:
        """The offers that a choice takes, by place."""
        return {place: self.offers[place][setting - 1] for place, setting in chosen.items() if setting}

    def carry_out(self, chosen: Mapping[str, int], *, again: bool = False) -> Model:
        """The model with all chosen candidates: every cut in one proved surgery, then every replacement.

        What works alone may fail together with others, and by any error: a technique is somebody's code.

        Args:
            chosen: the setting of each place.
            again: whether it was carried out before, so that it is known to have an ONNX form.

        Raises:
            SurgeryError: a cut is refused; or a replacement after the cuts, which leave a graph without some layers
                where sizes were frozen in Python; or the whole has no ONNX form. The places at fault are remembered,
                and not offered again.
        """
        model = self._made(chosen)
        if again:
            return model
        each = {place: {place: setting} for place, setting in chosen.items() if setting}
        with self._blaming(each, lambda some: onnx_form(self._made(_merged(some))), alone=False):
            onnx_form(model)
        return model

    def _made(self, chosen: Mapping[str, int]) -> Model:
        taken = self.taken(chosen)
        model = self.model
        cuts = {place: offer.candidate.cut for place, offer in taken.items() if offer.candidate.cut}
        if cuts:
            with self._blaming(cuts, lambda some: remove_units(self.model, _merged(some), analysis=self.analysis)):
                model = remove_units(model, _merged(cuts.values()), analysis=self.analysis)
        own = [] if model is self.model else [model.module]  # the cut network is only on the way
        makers = {place: made for place, offer in taken.items() if (made := offer.candidate.layers) is not None}
        if makers:
            light = model
            with self._blaming(makers, lambda some: replace_layers(light, _merged(made() for made in some))):
                layers = _merged(made() for made in makers.values())
                model = replace_layers(light, layers, spent=[*own, *_apart(layers.values(), self.model.module)])
        return model.evolve(model.module, *_notes(taken))

    @contextmanager
    def _blaming(
        self, doings: Mapping[str, T], do: Callable[[Sequence[T]], object], *, alone: bool = True
    ) -> Iterator[None]:
        """Where what is done meanwhile fails, find the places at fault."""
        try:
            yield
        except Exception as error:
            self.failed.update(_at_fault(doings, do, alone=alone))
            if isinstance(error, SurgeryError):
                raise
            raise SurgeryError(reason(error)) from error


def _at_fault(doings: Mapping[str, T], do: Callable[[Sequence[T]], object], *, alone: bool) -> set[str]:
    """The places whose doings fail alone, if they are tried alone; where none does, the first that fails together with
    those before it.
    """
    places = list(doings)
    found = {place for place in places if alone and not _works(do, [doings[place]])}
    if found:
        return found
    low, high = int(alone), len(places)  # so many work together, so many do not
    while high - low > 1:
        middle = (low + high) // 2
        if _works(do, [doings[place] for place in places[:middle]]):
            low = middle
        else:
            high = middle
    return {places[high - 1]}


def _works(do: Callable[[Sequence[T]], object], some: Sequence[T]) -> bool:
    try:
        do(some)
    except Exception:  # noqa: BLE001  (what fails is told by who asks)
        return False
    return True


def _merged(some: Iterable[Mapping[str, T]]) -> dict[str, T]:
    return {key: value for each in some for key, value in each.items()}


def _apart(layers: Iterable[nn.Module], module: nn.Module) -> list[nn.Module]:
    """The layers that have none of their numbers in a network's memory."""

    def places(each: nn.Module) -> set[int]:
        return {t.untyped_storage().data_ptr() for t in (*each.parameters(), *each.buffers()) if t.numel()}

    taken = places(module)
    return [layer for layer in layers if not places(layer) & taken]


def _only_first(count: int):
    import numpy as np

    return np.array([0.0, *[np.inf] * (count - 1)])


def _notes(taken: Mapping[str, Offer]) -> list[Note]:
    """What each technique did, for the lineage."""
    by: dict[str, dict[str, str]] = {}
    for offer in taken.values():
        by.setdefault(slug_of(offer.candidate.technique), {})[offer.candidate.place] = offer.candidate.text
    return [
        Note(f"{slug}: {len(places)} places chosen under a budget", {"places": places}) for slug, places in by.items()
    ]


def place_of(candidate: Candidate) -> str:
    """The name of a place in the menu: units and layers of one name are two places."""
    return f"units of {candidate.place}" if candidate.cut else f"layer {candidate.place}"


def collect(model: Model, bench: Bench, multiple: int) -> tuple[list[Candidate], tuple[str, ...]]:
    """Parts to leave out, what every technique of the catalogue offers, and why some offer nothing, or no more."""
    found = list(skips(model))
    notes = []
    for entry in techniques():
        if entry.card["kind"] not in KINDS:
            continue
        before = len(found)
        try:
            found.extend(map(_sound, _offered(entry, model, bench, multiple)))
        except Exception as error:  # noqa: BLE001  (somebody's code: a mistake in it is no reason to end a run)
            why = error.message if isinstance(error, KaruiError) else reason(error)
            notes.append(f"{entry.slug} offers {'no more' if len(found) > before else 'nothing'}: {why}")
    return found, tuple(notes)


def _offered(entry: Entry, model: Model, bench: Bench, multiple: int) -> Iterable[Candidate]:
    kind = entry.load()
    return kind().candidates(model, bench, multiple=multiple) if issubclass(kind, Offers) else ()


def _sound(candidate: Candidate) -> Candidate:
    require(isinstance(candidate, Candidate), f"it gave {told(candidate)} where a Candidate is due")
    return candidate


def menu(
    model: Model,
    bench: Bench,
    watch: Stopwatch,
    known: dict[str, float] | None = None,
    *,
    file: OnnxForm | None = None,
    seconds: float | None = None,
) -> Menu:
    """Everything that can be done to the model, measured.

    Args:
        model: what it is for.
        bench: calibration data, seed.
        watch: times layers.
        known: harms that were measured before, of the same model; those that are measured now are added.
        file: the model in the form that `watch` times layers in; None for the one in 32 bits.
        seconds: what that takes; None where it is not known.

    Raises:
        NeedError: there is no calibration data.
        CaptureError: the model has no ONNX form, so that no time can be measured.
    """
    try:
        analysis = coupled_groups(model)
    except CaptureError:
        analysis = None
    candidates, notes = collect(model, bench, watch.multiple())
    if not any(candidate.cut for candidate in candidates):
        notes = (_nothing_to_cut(analysis), *notes)
    refusals = Refusals()
    coster = Coster(Cells(model, analysis, watch, file, seconds), refusals)
    costs = coster.alone(candidates)
    measured = refusals.left(candidates)
    kept = {id(c): cost for c, cost in zip(measured, costs, strict=True) if not cost.slower}
    quick = [candidate for candidate in measured if id(candidate) in kept]
    harm = _harms(model, quick, analysis, bench, {} if known is None else known, refusals)
    offers: dict[str, list[Offer]] = {}
    for candidate in refusals.left(quick):
        cost = kept[id(candidate)]
        offer = Offer(candidate=candidate, harm=harm[id(candidate)], seconds=cost.seconds.settled, bytes=cost.bytes)
        offers.setdefault(place_of(candidate), []).append(offer)
    fixed = {place: tuple(found) for place, found in offers.items()}
    tables = coster.tables({place: _candidates(found) for place, found in fixed.items()})
    return Menu(
        model=model,
        offers=fixed,
        tables=tables,
        analysis=analysis,
        notes=(*notes, *refusals.notes),
        slower=len(measured) - len(quick),
    )


def _harms(  # noqa: PLR0917  (what is tried, on what, and who remembers)
    model: Model,
    candidates: Sequence[Candidate],
    analysis: Analysis | None,
    bench: Bench,
    known: dict[str, float],
    refusals: Refusals,
) -> dict[int, float]:
    """By the `id` of each that does not fail. Measured where it is not known yet: by place, technique and words, and by
    number where those are equal.
    """
    names: list[str] = []
    for candidate in candidates:
        name = f"{place_of(candidate)}, {type(candidate.technique).__name__}: {candidate.text}"
        names.append(f"{name} {sum(other.startswith(name) for other in names)}")
    fresh = {name: candidate for name, candidate in zip(names, candidates, strict=True) if name not in known}
    if fresh:
        found = dict(zip(fresh, harms(model, list(fresh.values()), analysis, bench, refusals), strict=True))
        known.update({name: found[name] for name, candidate in fresh.items() if refusals.left([candidate])})
    return {id(c): known[name] for name, c in zip(names, candidates, strict=True) if name in known}


def _nothing_to_cut(analysis: Analysis | None) -> str:
    """Why no units can go; layers can still be replaced, and run in lower precision."""
    if analysis is None:
        return "no units can be cut, as the network cannot be captured as a graph (karui plan tells where)"
    reasons = dict.fromkeys(lock.reason for lock in analysis.locked)
    return f"no units can be cut: {'; '.join(list(reasons)[:3]) or 'every group is left whole'}"


def _candidates(offers: Sequence[Offer]) -> list[Candidate]:
    return [offer.candidate for offer in offers]
