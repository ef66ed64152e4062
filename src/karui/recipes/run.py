"""Run a recipe: step by step, each kept so that a killed run goes on; then measure, verify, save and tell.

The folder of a run holds the artifact (`model.safetensors`, `model.json`, `model.onnx`) and `run.json`, and until it is
done the finished steps (`steps/`) and the trainings' checkpoints (`checkpoints/`).
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from karui.artifact import load, save, stored_bytes
from karui.errors import KaruiError, UsageError, require
from karui.measuring import Comparison, compare, count, ratios_between, this_machine
from karui.measuring.values import to_json
from karui.model import Note
from karui.recipes.keeping import (
    CHECKPOINTS,
    DENSE,
    FORMAT,
    RECORD,
    STEPS,
    Tell,
    claim,
    contents_of,
    digest_of,
    finished,
    left_of_another,
    mark_of,
    quiet,
    read_record,
    refuse_foreign,
    replayable,
    version,
    write_record,
)
from karui.recipes.layers import layer_rows
from karui.recipes.planned import plan_recipe
from karui.recipes.recipe import Recipe
from karui.recipes.values import settings
from karui.recipes.verdict import odd_widths, untaught, verdict
from karui.technique import card_of
from karui.train.loop import REMARK

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique import Bench, Technique


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was asked for, in the words of who asked; told in the report."""

    model: str = ""
    data: str = ""
    command: str = ""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run: its record as in `run.json`, and the folder that it lies in."""

    record: dict[str, Any]
    folder: Path

    def to_json(self) -> dict[str, Any]:
        """The record."""
        return self.record


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """One piece of work whose result is kept: the dense training, or a step."""

    number: int
    technique: str
    settings: dict[str, Any]
    work: Callable[[Model], Model]

    @property
    def folder(self) -> str:
        return f"{self.number:02d}-{self.technique}"


@dataclass(kw_only=True)
class _Keeper:
    """Keeps the stages of a run on disk, and knows which of them a resumed run need not repeat."""

    out: Path
    mark: str
    tell: Tell
    told: list[dict[str, Any]] = field(default_factory=list)
    fitting: list[str] = field(default_factory=list)
    strayed: bool = False

    def run(self, stage: _Stage, model: Model, bench: Bench) -> Model:
        """The stage's result: read where it is finished, worked out and kept where it is not."""
        self.mark = digest_of(self.mark, stage.technique, stage.settings, contents_of(stage.settings))
        folder = self.out / STEPS / stage.folder
        kept = read_record(folder / RECORD)
        if kept is not None and kept.get("mark") == self.mark:
            self.tell(f"{stage.technique}: finished before, not repeated")
            self.told.append(kept["told"])
            self.fitting.append(stage.folder)
            return load(folder, base=model.module if not replayable(model) else None)
        if not self.strayed and (others := left_of_another(self.out, self.fitting)):
            self.tell(others)
        self.strayed = True
        self.tell(f"{stage.technique}: started")
        started = time.perf_counter()
        result = stage.work(model)
        for line in _remarked(model, result):
            self.tell(f"{stage.technique}: {line}")
        told = self._told(stage, result, bench, time.perf_counter() - started)
        shutil.rmtree(folder, ignore_errors=True)
        save(result, folder, onnx=False)
        write_record(folder / RECORD, {"mark": self.mark, "told": told})
        self.told.append(told)
        return result

    def _told(self, stage: _Stage, model: Model, bench: Bench, seconds: float) -> dict[str, Any]:
        counts = count(model)
        judged = bench.validation is not None and model.task is not None
        score = bench.evaluate(model).to_json() if judged else None
        self.tell(f"{stage.technique}: done in {seconds:.1f} s; {counts.parameters:,} parameters, {counts.macs:,} MACs")
        return {
            "technique": stage.technique,
            "settings": stage.settings,
            "seconds": seconds,
            "parameters": counts.parameters,
            "macs": counts.macs,
            "validation": score,
        }


def run_recipe(
    model: Model,
    recipe: Recipe,
    bench: Bench,
    out: str | Path,
    *,
    asked: Asked | None = None,
    resume: bool = False,
    train_first: bool = False,
    tell: Tell = quiet,
) -> Run:
    """Apply the recipe to the model; the light one, its measurement beside the dense one and the record go to `out`.

    Args:
        model: the dense model.
        recipe: the steps.
        bench: data, training, clock and seed; see `Recipe.bench` for one with what the recipe itself says of them.
        out: folder of the run; made if it is not there.
        asked: what to say in the record about where all this came from.
        resume: go on with a run of the same recipe, model and data in `out`; finished steps are not repeated, and the
            result is the same. Without it, an earlier run in `out` is replaced.
        train_first: train the model before anything else; it then is the dense model.
        tell: is given a line at each stage.

    Raises:
        UsageError: `out` holds something else than a run, or, to be resumed, a finished run of something else.
        NeedError: a step cannot run; nothing has been done then.
    """
    out = Path(out)
    bench = dataclasses.replace(bench, checkpoints=out / CHECKPOINTS)
    refuse_foreign(out)
    plan = plan_recipe(model, recipe, bench)
    plan.check()
    claim(out, resume)
    mark = mark_of(model, bench, recipe.told())
    whole = digest_of(mark, contents_of(recipe.told()))
    done = finished(out, whole, tell) if resume else None
    if done is not None:
        return Run(record=done, folder=out)
    keeper = _Keeper(out=out, mark=digest_of(mark), tell=tell)
    dense, light = _stages(model, recipe, bench, keeper, train_first)
    tell("measuring dense against light, in turns")
    record = {
        "format": FORMAT,
        "karui": version(),
        "mark": whole,
        "asked": _told_asked(asked or Asked(), recipe, bench),
        "steps": keeper.told,
        "plan": plan.to_json(),
        **_finish(dense, light, recipe, bench, out),
    }
    if train_first:
        save(dense, out / DENSE, onnx=False)
    write_record(out / RECORD, record)
    for name in (STEPS, CHECKPOINTS):
        shutil.rmtree(out / name, ignore_errors=True)
    return read_run(out)


def _stages(model: Model, recipe: Recipe, bench: Bench, keeper: _Keeper, train_first: bool) -> tuple[Model, Model]:
    """The dense and the light model."""
    dense = model
    if train_first:
        dense = _dense(model, bench, keeper)
    light, bench = dense, dataclasses.replace(bench, dense=dense)
    for number, (step, told) in enumerate(zip(recipe.steps, recipe.told(), strict=True), 1):
        work = _applied(step, bench)
        light = keeper.run(_Stage(number=number, work=work, **told), light, bench)
    return dense, light


def _dense(model: Model, bench: Bench, keeper: _Keeper) -> Model:
    training = settings(bench.training)
    stage = _Stage(number=0, technique=DENSE, settings=training, work=lambda m: bench.fit(m, label=DENSE))
    return keeper.run(stage, model, bench)


def trained_first(model: Model, bench: Bench, out: Path, mark: str, tell: Tell) -> Model:
    """The model, trained as the bench says; kept in the run's folder, so that a resumed run need not do it again."""
    return _dense(model, bench, _Keeper(out=out, mark=digest_of(mark), tell=tell))


def _remarked(before: Model, after: Model) -> list[str]:
    """What acted on the trainings of a stage had to say, once each."""
    known = {id(edit) for edit in before.lineage}
    notes = [edit for edit in after.lineage if isinstance(edit, Note) and id(edit) not in known]
    return list(dict.fromkeys(note.text for note in notes if REMARK in note.settings))


def _applied(step: Technique, bench: Bench) -> Callable[[Model], Model]:
    return lambda model: step.apply(model, bench)


def _finish(dense: Model, light: Model, recipe: Recipe, bench: Bench, out: Path) -> dict[str, Any]:
    """Measure both, save the light one, and say what came out."""
    both = compare(dense, light, test=bench.test, clock=bench.clock, progress=bench.progress)
    cards = [to_json(card) for card in map(card_of, recipe.steps) if card is not None]
    told = {"recipe": recipe.told(), "cards": cards, "seed": bench.seed, "training": settings(bench.training)}
    saved = save(light, out, measurements=both.to_json(), settings=told)
    both = with_bytes(both, stored_bytes(dense), saved.weights_bytes)
    verification = None if saved.verification is None else saved.verification.to_json()
    return {
        "machine": to_json(this_machine()),
        "dense": both.dense.to_json(),
        "light": both.light.to_json(),
        "ratios": to_json(both.ratios),
        "change": to_json(both.change),
        "layers": {"dense": layer_rows(dense), "light": layer_rows(light)},
        "example": example_rows(light),
        "lineage": [{"kind": edit.kind, "text": edit.describe()} for edit in light.lineage],
        "verification": verification,
        "warnings": [*untaught(dense, both.dense.score), *saved.warnings],
        "files": {path.name: path.stat().st_size for path in sorted(out.glob("model.*"))},
        "verdict": [*verdict(both), *(odd_widths(dense, light, both) if _aligns(recipe) else ())],
    }


def _aligns(recipe: Recipe) -> bool:
    """Whether a step could keep to multiples of a width."""
    return any("multiple" in settings(step) for step in recipe.steps)


def example_rows(model: Model) -> list[dict[str, Any]]:
    """Shape and type of each input, for one sample."""
    tensors = [x for x in model.example if isinstance(x, torch.Tensor)]
    return [{"shape": [1, *x.shape[1:]], "dtype": str(x.dtype).removeprefix("torch.")} for x in tensors]


def with_bytes(both: Comparison, dense: int, light: int) -> Comparison:
    """The comparison, with the bytes of each model's weights as saved in the same way."""
    heavy = dataclasses.replace(both.dense, stored_bytes=dense)
    lean = dataclasses.replace(both.light, stored_bytes=light)
    ratios = ratios_between(heavy, lean)
    return dataclasses.replace(both, dense=heavy, light=dataclasses.replace(lean, ratios=ratios), ratios=ratios)


def _told_asked(asked: Asked, recipe: Recipe, bench: Bench) -> dict[str, Any]:
    return {
        **dataclasses.asdict(asked),
        "name": recipe.name,
        "recipe": recipe.told(),
        "seed": bench.seed,
        "epochs": bench.training.epochs,
        "training": settings(bench.training),
    }


def read_run(folder: str | Path) -> Run:
    """The run that lies in a folder.

    Raises:
        UsageError: there is none, or it is of another version.
    """
    folder = Path(folder)
    record = read_record(folder / RECORD)
    require(
        record is not None, f"{folder} holds no finished run.", "Make one: karui compress ... --out DIR", UsageError
    )
    assert record is not None  # noqa: S101  (refused above)
    known = record.get("format") == FORMAT
    require(
        known, f"The run in {folder} has format {record.get('format')}.", "Update karui, or run it again.", KaruiError
    )
    return Run(record=record, folder=folder)
