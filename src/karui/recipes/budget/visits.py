"""Visiting points: from a point to a lighter one, recovered, measured in all its forms, and kept on disk."""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from karui.artifact import load, save
from karui.errors import DivergedError, KaruiError, NeedError, SurgeryError, require
from karui.measuring import onnx_form
from karui.measuring.values import from_json, to_json
from karui.model import Model
from karui.recipes.budget.aims import Aims, Chosen, Reach, Scale
from karui.recipes.budget.choice import Problem, choose, farthest, frugal
from karui.recipes.budget.deployments import NARROW, Forms, lost
from karui.recipes.budget.front import Point
from karui.recipes.budget.menu import Menu, menu
from karui.recipes.budget.recover import rate_for, recover, settled
from karui.recipes.budget.tables import EXPECTED
from karui.recipes.budget.together import best_power, harm_together
from karui.recipes.keeping import POINTS, Tell, digest_of, read_record, replayable, write_record
from karui.train import with_rate

if TYPE_CHECKING:
    from karui.recipes.budget.timing import Stopwatch
    from karui.technique import Bench

POINT = "point.json"
TRIES = 4
"""Choices that are made for one target: where the measured model misses it, another with the correction."""
REFUSED = 8
"""Choices for one target that may be refused besides, each without the places that were at fault before."""


@dataclass(kw_only=True)
class Visitor:
    """Makes points, and knows those that were made before.

    Settings:
        dense: the model as it was given.
        bench: data, training, seed.
        out: folder of the run.
        watch: times layers and models.
        mark: digest of all that decides the run's result.
        int8: whether forms of lower precision are tried.
        max_drop: the floor, and
        wanted: the quantities that were asked for, which decide among a point's forms.
        find_rate: whether the learning rate is found by a test; else it is that of the bench's training.
        tell: is given a line at each stage.
        points: all points so far.
        notes: what could not be done, and why.
        reach: how far menus went that could not reach a target.
        count: visits so far; the number of the next point.
        rate: the learning rate that was found; None before the first recovery.
        failed: places of which something was refused when it was carried out, by the point whose menu offered it.
    """

    dense: Model
    bench: Bench
    out: Path
    watch: Stopwatch
    mark: str
    int8: bool
    max_drop: float | None
    wanted: tuple[str, ...]
    find_rate: bool
    tell: Tell
    points: list[Point] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reach: list[Reach] = field(default_factory=list)
    count: int = 0
    rate: float | None = None
    failed: dict[int, set[str]] = field(default_factory=dict)
    _held: tuple[int, Model] | None = None
    _menu: tuple[int, Menu] | None = None
    _harms: tuple[int, dict[str, float]] = field(default_factory=lambda: (-1, {}))

    def start(self) -> Point:
        """The dense model as point 0."""
        form = onnx_form(self.dense)
        self.bytes, self.seconds = form.bytes, self.watch.whole(self.dense, form).value
        self.forms = Forms(
            dense=self.dense,
            bench=self.bench,
            watch=self.watch,
            int8=self.int8,
            max_drop=self.max_drop,
            wanted=self.wanted,
            notes=self.notes,
        )
        point = self._visited("dense", lambda: self._finished(self.dense, Point(number=0)))
        score = point.fp32.score
        require(
            score is None or score["value"] is not None,
            "The dense model's metric on validation data is not finite, so that no loss can be told from it.",
            "Look for overflows in its outputs, or give a task with a metric that bears them.",
            NeedError,
        )
        return point

    def heed(self, goal: Mapping[str, float]) -> Point:
        """From now on a form within these limits goes before others; the dense model in the form that then counts."""
        self.forms.goal = goal
        was = self.points[0]
        best = self.forms.best(was.forms)
        if best != was.best:
            self.points[0] = replace(was, best=best)
            self._save(self.dense, self.points[0])
            # Only now: a process that is killed in between finds the old form in the record, and comes here again.
            file = self.out / was.folder / POINT
            write_record(file, {**(read_record(file) or {}), "point": to_json(self.points[0])})
        return self.points[0]

    def model_of(self, point: Point) -> Model:
        """The model of a point, read from its folder where it is neither the dense one nor the last one made."""
        if not point.number:
            return self.dense
        if self._held is None or self._held[0] != point.number:
            self._held = None  # reading one takes the room of another
            base = None if replayable(self.dense) else self.dense.module
            self._held = (point.number, load(self.out / point.folder, base=base))
        return replace(self._held[1], task=self.dense.task)

    def _let_go(self, point: Point) -> Model:
        """The model of a point, which is not held here from then on: dense, before and after training are three."""
        model, self._held = self.model_of(point), None
        return model

    def lighten(self, parent: Point, target: Mapping[str, float], epochs: int) -> Point | None:
        """A point at the target (shares of the dense model, of its best form); None where the menu has no way on."""
        what = digest_of("lighten", parent.number, dict(target), epochs)
        return self._visited(what, lambda: self._lightened(parent, dict(target), epochs))

    def polish(self, parent: Point, epochs: int) -> Point:
        """The same network, trained on."""
        found = self._visited(digest_of("polish", parent.number, epochs), lambda: self._polished(parent, epochs))
        assert found is not None  # noqa: S101  (a training always leaves a point)
        return found

    def _polished(self, parent: Point, epochs: int) -> Point:
        self.tell(f"point {self.count - 1}: training point {parent.number} for {epochs} more epochs")
        model, taken = self._recovered(self._let_go(parent), epochs, before=parent.epochs)
        made = replace(parent, number=self.count - 1, parent=parent.number, epochs=parent.epochs + taken)
        return self._finished(model, replace(made, chosen={}))

    def _twin(self, parent: Point, choice: Mapping[str, str]) -> Point | None:
        """The point that the same choice for a parent has led to, as it was last trained; None where there is none."""
        found = next((p for p in self.points if p.parent == parent.number and p.chosen == choice), None)
        for point in self.points:
            if found is not None and point.parent == found.number and not point.chosen:
                found = point
        return found

    def _visited(self, what: str, work: Any) -> Any:
        """The point that work leaves, or that it left in an earlier run; None is kept too."""
        number, self.count = self.count, self.count + 1
        self.mark = digest_of(self.mark, what)
        folder = self.out / POINTS / f"{number:02d}"
        kept = read_record(folder / POINT) or read_record(folder.with_suffix(".json"))
        if kept is not None and kept.get("mark") == self.mark:
            self.notes += [note for note in kept["notes"] if note not in self.notes]
            self.reach = [from_json(Reach, each) for each in kept.get("reaches", [])]  # earlier versions kept no such
            self.rate = kept["rate"]
            self.failed = {int(parent): set(places) for parent, places in kept.get("failed", {}).items()}
            if kept["point"] is None:
                return None
            point = from_json(Point, kept["point"])
            self.tell(f"point {number}: finished before, not repeated")
        else:
            shutil.rmtree(folder, ignore_errors=True)
            point = work()
            told = {
                "mark": self.mark,
                "point": to_json(point),
                "notes": self.notes,
                "reaches": to_json(self.reach),
                "rate": self.rate,
                "failed": {parent: sorted(places) for parent, places in self.failed.items()},
            }
            if point is None:
                write_record(folder.with_suffix(".json"), told)
                return None
            write_record(folder / POINT, told)
        self.points.append(point)
        return point

    def _finished(self, model: Model, point: Point) -> Point:
        """Measure a model in all its forms, and keep it."""
        gc.collect()
        forms, best = self.forms.of(model, self.points[0].fp32.score if self.points else None)
        point = replace(point, forms=forms, best=best, folder=str(Path(POINTS) / f"{point.number:02d}"))
        self._save(model, point)
        if point.number:
            self._held = (point.number, model)
        form = point.form
        score = "" if form.score is None else f", {_scored(form.score)} on validation data"
        self.tell(f"point {point.number}: {form.told}, time {form.time:.2f} and bytes {form.bytes:.2f} of dense{score}")
        return point

    def _save(self, model: Model, point: Point) -> None:
        """Keep the model, with the file of its best form: whoever takes another point than ours can deploy it. So the
        dense one is kept, too, whose best form may be in 8 bits.
        """
        chosen = self.forms.made(model, point.forms)[point.best]
        try:
            save(model, self.out / point.folder, deployment=chosen)
        except KaruiError as error:
            self.notes.append(f"point {point.number} has no ONNX file: {error.message}")
            save(model, self.out / point.folder, onnx=False)

    def _recovered(self, model: Model, epochs: int, before: int = 0) -> tuple[Model, int]:
        """The model trained, and the passes that are in it; not trained where that is better on validation data, as
        few samples are soon overfitted. What is held against it is what would be returned: settled.
        """
        gc.collect()
        try:
            if not epochs or self.bench.validation is None or model.task is None:
                return self._trained(model, epochs, before), epochs
            untrained = self.bench.evaluate(self._untrained(model, before))  # not held: dense and trained make three
            trained = self._trained(model, epochs, before)
        except DivergedError as error:
            found = f"its training diverged, and it was left as it was. {error}"
            self.tell(f"  {found}")
            self.notes.append(f"point {self.count - 1}: {found}")
            return self._untrained(model, before), 0
        scores = [untrained, self.bench.evaluate(trained)]
        if lost(*scores) <= 0:
            return trained, epochs
        after, was = (f"{score.value:.4g}" for score in reversed(scores))
        found = f"training made it worse on validation data ({scores[0].metric} {after}, was {was}): left as it was"
        self.tell(f"  {found}")
        self.notes.append(f"point {self.count - 1}: {found}")
        del trained  # what follows makes a copy
        return self._untrained(model, before), 0

    def _untrained(self, model: Model, before: int) -> Model:
        """The model as it is without further training; one that has had some needs no settling."""
        return model if before else settled(model, self.dense, self.bench)

    def _trained(self, model: Model, epochs: int, before: int) -> Model:
        """The model trained; with smaller steps where it has been trained before, as large ones would undo that."""
        if not epochs:
            return settled(model, self.dense, self.bench)
        if self.find_rate and self.rate is None:
            self.rate = rate_for(model, self.dense, self.bench)
            if self.rate is not None:
                self.tell(f"  learning rate {self.rate:.2g}, by a range test")
        bench, rate = self.bench, self.rate
        if rate is not None or before:
            rate = bench.training.optimizer.lr if rate is None else rate
            smaller = rate * math.sqrt(epochs / (epochs + before))
            bench = replace(bench, training=with_rate(bench.training, smaller))
        return recover(model, self.dense, bench, epochs, f"recover {self.count - 1}")

    def _lightened(self, parent: Point, target: dict[str, float], epochs: int) -> Point | None:
        self.tell(f"point {self.count - 1}: aiming at {_told(target)} from point {parent.number}")
        if self._held is not None and self._held[0] != parent.number:
            self._held = None  # the last point's network makes room for that of the new one
        found = self._chosen(parent, target)
        if parent.number:
            # The parent's own network goes before the new one is trained: dense, new and trained are three already.
            self._menu = self._held = None
        if found is None:
            return None
        if (twin := self._twin(parent, found.told)) is not None and not epochs:
            self.tell(f"  that is point {twin.number} once more, and there are no epochs to train it on")
            return None
        if twin is not None:
            # The clock has misled the search: one of the two times was wrong. To begin anew would waste its training.
            self.tell(f"  that is point {twin.number} once more")
            del found
            return self._polished(twin, epochs)
        model, taken = self._recovered(found.taken(), epochs)
        made = Point(
            number=self.count - 1,
            parent=parent.number,
            target=target,
            predicted=found.predicted,
            foreseen=parent.form.name if parent.form.told == NARROW else parent.fp32.name,
            epochs=parent.epochs + taken,
            chosen=found.told,
        )
        return self._finished(model, made)

    def _menu_of(self, parent: Point) -> Menu:
        if self._menu is None or self._menu[0] != parent.number:
            self._menu = None
            if self._harms[0] != parent.number:
                self._harms = (parent.number, {})
            watch = replace(self.watch, narrow=parent.form.told == NARROW)
            scale, model = Scale.of(parent, self.seconds, self.bytes), self.model_of(parent)
            file = self.forms.file(model, scale.timed)
            made = menu(model, self.bench, watch, self._harms[1], file=file, seconds=scale.now["time"])
            made = replace(made, failed=self.failed.setdefault(parent.number, set()))
            self._menu = (parent.number, made)
            for note in (note for note in made.notes if note not in self.notes):
                self.tell(f"note: {note}")
                self.notes.append(note)
            count = sum(map(len, made.offers.values()))
            self.tell(f"  {count} candidates at {len(made.offers)} places; {made.slower} more measured slower")
        return self._menu[1]

    def _chosen(self, parent: Point, target: Mapping[str, float]) -> Chosen | None:
        """Choose, carry out and measure, until the measured model is at the target or as light as the menu can."""
        offers = self._menu_of(parent)
        scale = Scale.of(parent, self.seconds, self.bytes)
        wanted = {q: share / scale.factors[q] for q, share in target.items()}
        aims = Aims(wanted)
        best: Chosen | None = None
        made: list[dict[str, int]] = []
        tried: list[dict[str, str]] = []
        refused = 0
        power: float | None = None
        while len(tried) < TRIES and refused < REFUSED:
            limits = {q: share * scale.whole[q] - scale.now[q] for q, share in aims.next.items()}
            if power is None:
                power = best_power(
                    lambda limits=limits: offers.problem(limits),
                    self._choice,
                    lambda some: self._together(offers, some),
                )
            chosen = self._choice(offers.problem(limits).raised(power))
            exhausted = chosen is None
            if chosen is None:
                chosen, ends = farthest(offers.problem(limits))
                least = {q: (scale.now[q] + end) / scale.whole[q] * aims.off[q] for q, end in ends.items()}
                self._note_reach(parent, target, {q: share * scale.factors[q] for q, share in least.items()})
            problem = offers.problem(limits)
            counted = {q: (scale.now[q] + problem.total(chosen, q)) / scale.whole[q] for q in scale.whole}
            seconds = scale.now["time"] + problem.total(chosen, EXPECTED)
            if not any(chosen.values()):
                break
            told = {place: offer.candidate.text for place, offer in offers.taken(chosen).items()}
            if told in tried:
                break
            best = None if best is None else replace(best, light=[])  # one model at a time: they may be large
            light = self._carried_out(offers, chosen)
            if light is None:
                refused += 1
                continue
            time = self.watch.ratio(self.dense, self.forms.file(light, scale.timed), onnx_form(self.dense)).value
            tried.append(told)
            made.append(chosen)
            aims.see(counted, {"time": time, "bytes": onnx_form(light).bytes / self.bytes})
            if aims.nearest == len(tried) - 1:
                best = Chosen(told, {**counted, "time": seconds / scale.whole["time"]}, [light])
            del light
            if exhausted or aims.met:
                break
        if best is not None and not best.light:
            best = replace(best, light=[offers.carry_out(made[aims.nearest], again=True)])
        return best

    def _carried_out(self, offers: Menu, chosen: Mapping[str, int], *, again: bool = False) -> Model | None:
        """A choice carried out; a note where that is refused."""
        gc.collect()  # captured programs are cycles, and keep the weights of the networks that were made before
        before = set(offers.failed)
        try:
            return offers.carry_out(chosen, again=again)
        except SurgeryError as error:
            note = f"left out, as it was refused: {', '.join(sorted(offers.failed - before))}. {error}"
            self.notes += [note] if note not in self.notes else []
            return None

    def _together(self, offers: Menu, chosen: Mapping[str, int]) -> float | None:
        """The harm that a choice does as a whole."""
        light = self._carried_out(offers, chosen, again=True)
        return None if light is None else harm_together(light, self.dense, self.bench)

    @staticmethod
    def _choice(problem: Problem) -> dict[str, int] | None:
        """The choice within the limits; time or bytes without one are spared where that costs hardly any harm."""
        spared = [quantity for quantity in ("bytes", "time") if quantity not in problem.limits]
        return frugal(problem, spared[0]) if spared else choose(problem)

    def _note_reach(self, parent: Point, target: Mapping[str, float], shares: Mapping[str, float]) -> None:
        """Note how far a menu goes; what was noted of the same aim before, by an earlier choice, was less sure."""
        found = Reach(parent=parent.number, target=dict(target), shares=dict(shares))
        others = [r for r in self.reach if (r.parent, r.target) != (found.parent, found.target)]
        self.reach = [*others, found]


def _scored(score: Mapping[str, Any]) -> str:
    value = score["value"]
    return f"{score['metric']} {'not finite' if value is None else f'{value:.4g}'}"


def _told(target: Mapping[str, float]) -> str:
    return " and ".join(f"{quantity} {share:.2f}" for quantity, share in target.items())
