"""Run a budget: baseline, stages, verdict; every finished point is kept, so that a killed run goes on where it was.

The folder of a run holds the artifact, `run.json` and, under `points/`, every model that was visited, each loadable by
itself.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from karui.artifact import save, stored_bytes
from karui.errors import NeedError, UsageError, require
from karui.measuring import Clock, OnnxRuntime, Torch, compare, this_machine
from karui.measuring.inference import tensors_of
from karui.measuring.machine import threads_here
from karui.measuring.precision import other_than_float32
from karui.measuring.values import to_json
from karui.recipes.budget.cache import TimingCache
from karui.recipes.budget.explain import deployed, shares, told
from karui.recipes.budget.front import Point, front
from karui.recipes.budget.lesson import Untaught, lesson
from karui.recipes.budget.limits import Budget
from karui.recipes.budget.race import confirmed, forms_of
from karui.recipes.budget.recover import epochs_within
from karui.recipes.budget.stages import FAR, Plan, travel
from karui.recipes.budget.timing import Stopwatch
from karui.recipes.budget.visits import Visitor
from karui.recipes.keeping import (
    CHECKPOINTS,
    DENSE,
    FORMAT,
    POINTS,
    RECORD,
    Tell,
    claim,
    finished,
    mark_of,
    quiet,
    read_record,
    refuse_foreign,
    version,
    write_record,
)
from karui.recipes.layers import engine_rows
from karui.recipes.run import Asked, Run, example_rows, read_run, trained_first, with_bytes
from karui.recipes.values import settings
from karui.recipes.verdict import untaught, verdict

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique import Bench

PLAN = "plan.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a budget is worked on.

    Settings:
        budget: the limits and the floor.
        batch, threads: what time is measured for.
        epochs: passes of recovery, all stages together; None takes those of the bench's training.
        minutes: the time that recovery may take instead; told in epochs before the first stage.
        int8: whether lower precision is tried.
        find_rate: whether recovery's learning rate is found by a short test; else it is that of the bench's training.
        cache: folder of the timing cache; None takes the user's.

    Raises:
        UsageError: a number is out of range.
    """

    budget: Budget = field(default_factory=Budget)
    batch: int = 1
    threads: int = 1
    epochs: int | None = None
    minutes: float | None = None
    int8: bool = True
    find_rate: bool = True
    cache: Path | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "threads"):
            value = getattr(self, name)
            fits = isinstance(value, Integral) and int(value) >= 1
            require(fits, f"--{name} is {value!r}.", "Give a whole number from 1.", UsageError)
        here = threads_here()
        told = f"--threads is {self.threads}, and this machine has {here} for the process."
        require(self.threads <= here, told, f"Give at most {here}: a time with more says nothing.", UsageError)
        fits = self.epochs is None or (isinstance(self.epochs, Integral) and self.epochs >= 0)
        require(fits, f"--epochs is {self.epochs!r}.", "Give 0 or more, a whole number.", UsageError)
        fits = self.minutes is None or (isinstance(self.minutes, Real) and 0 < self.minutes < math.inf)
        require(fits, f"--minutes is {self.minutes!r}.", "Give a time above 0, as 2.5.", UsageError)
        both = self.epochs is not None and self.minutes is not None
        require(not both, "--epochs and --minutes are both given.", "Give one of them.", UsageError)


def run_budget(
    model: Model,
    asked: Settings,
    bench: Bench,
    out: str | Path,
    *,
    words: Asked | None = None,
    resume: bool = False,
    train_first: bool = False,
    tell: Tell = quiet,
) -> Run:
    """Make the model as light as the budget says; the best that was found goes to `out`.

    Args:
        model: the dense model.
        asked: the budget and how to work on it.
        bench: data, training and seed.
        out: folder of the run; made if it is not there.
        words: what to say in the record about where all this came from.
        resume: go on with a run of the same in `out`: finished points are not repeated, and the result is the same.
        train_first: train the model before anything else; it then is the dense model.
        tell: is given a line at each stage.

    Returns:
        The run; `record["budget"]["met"]` says whether the floor and every limit that was stated are kept.

    Raises:
        UsageError: `out` holds something else than a run, or the model's weights are in another precision than float32.
        NeedError: there is no calibration data, or nothing to judge by and a floor, or no budget either.
        CaptureError: the model has no ONNX form, so that no time can be measured.
    """
    out = Path(out)
    _check(model, asked, bench)
    refuse_foreign(out)
    claim(out, resume)
    bench = dataclasses.replace(bench, checkpoints=out / CHECKPOINTS, clock=_clock(asked))
    kept = {name: value for name, value in dataclasses.asdict(asked).items() if name != "cache"}
    mark = mark_of(model, bench, kept)
    done = finished(out, mark, tell) if resume else None
    if done is not None:
        return Run(record=done, folder=out)
    dense = trained_first(model, bench, out, mark, tell) if train_first else model
    watch = Stopwatch(
        batch=asked.batch,
        threads=asked.threads,
        cache=TimingCache.of_this_machine(asked.cache),
        progress=bench.progress,
    )
    bench = dataclasses.replace(bench, dense=dense)
    visitor = Visitor(
        dense=dense,
        bench=bench,
        out=out,
        watch=watch,
        mark=mark,
        int8=asked.int8,
        max_drop=asked.budget.max_drop,
        find_rate=asked.find_rate,
        wanted=tuple(limit.quantity for limit in asked.budget.limits) or ("time",),
        tell=tell,
    )
    start = visitor.start()
    if warning := _seen(start, dense, bench):
        tell(f"note: {warning}")
        visitor.notes.append(warning)
    plan = _plan(asked, visitor, mark)
    if untold := _teacher(dense, bench, plan.epochs)[1]:
        tell(f"note: {untold}")
        visitor.notes.append(untold)
    start = visitor.heed(plan.goal) if plan.stated else start
    point = travel(visitor, start, plan)
    if smaller := visitor.forms.passed_over(point):
        tell(f"note: {smaller}")
        visitor.notes.append(smaller)
    tell(f"point {point.number} is the result; measuring dense against light, in turns")
    record = {
        "format": FORMAT,
        "karui": version(),
        "mark": mark,
        "asked": {
            **dataclasses.asdict(words or Asked()),
            "name": "",
            "budget": str(asked.budget),
            "batch": asked.batch,
            "threads": asked.threads,
            "seed": bench.seed,
            "epochs": plan.epochs,
            "training": settings(bench.training),
        },
        **_finish(visitor, point, plan, asked),
        "steps": [_step(p) for p in visitor.points if p.number],
    }
    if train_first:
        save(dense, out / DENSE, onnx=False)
    write_record(out / RECORD, record)
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    return read_run(out)


def _check(model: Model, asked: Settings, bench: Bench) -> None:
    precision = other_than_float32(model)
    message = f"The model's weights are {precision}, and a budget is measured in ONNX Runtime in 32 bits."
    require(not precision, message, "Give model.float(), and data as float32.", UsageError)
    hint = "Give --data, or Bench(train=..., test=...)."
    require(bench.train is not None, "A budget needs data to calibrate on.", hint, NeedError)
    _check_example(model, bench)
    judged = bench.validation is not None and model.task is not None
    message = f"--max-drop is {asked.budget.max_drop}, and there is nothing to judge the model by."
    require(asked.budget.max_drop is None or judged, message, "Give data with targets, and a task.", NeedError)
    message = "There is neither a budget nor a floor, and nothing to judge by which compromise is the best."
    hint = "State a budget, such as time=0.5; or give data with targets, and a task."
    require(judged or bool(asked.budget.limits), message, hint, NeedError)


def _check_example(model: Model, bench: Bench) -> None:
    """The example's shape becomes that of the ONNX form, which takes data of no other rank."""
    given, seen = tensors_of(model.example), tensors_of(next(iter(bench.calibration(1, 1)), ()))
    for one, other in zip(given, seen, strict=False):
        require(
            one.ndim in (0, other.ndim),
            f"The model's example has shape {list(one.shape)}, and one sample of the data {list(other.shape)}.",
            "Give Model(example=...) as one batch of the data, or data of the example's shape.",
            UsageError,
        )


def _seen(start: Point, dense: Model, bench: Bench) -> str:
    """A word of warning where the dense model is far better on validation data than on test data."""
    held = start.fp32.score
    if held is None or bench.test is None or None in {held["low"], held["high"]}:  # one sample has no interval
        return ""
    test = bench.evaluate(dense, "test")
    apart = held["low"] > test.high if test.higher_is_better else held["high"] < test.low
    if not apart:
        return ""
    return (
        f"the dense model gets {held['metric']} {held['value']:.4g} on validation data and {test.value:.4g} on test "
        "data: it has probably been trained on the former, and a floor held on them asks for too much. "
        "Give Bench(validation=...) data that it has not seen."
    )


def _teacher(dense: Model, bench: Bench, epochs: int) -> tuple[str | None, str]:
    """What the dense model teaches those that recover, and a note where that is nothing; neither without recovery."""
    if not epochs or dense.task is None:
        return None, ""
    taught = lesson(dense, bench)
    return (None, f"recovery has no teacher, as {taught.why}") if isinstance(taught, Untaught) else (taught, "")


def _clock(asked: Settings) -> Clock:
    return Clock(batches=(asked.batch,), threads=(asked.threads,), engines=(OnnxRuntime(), Torch()), rounds=25)


def _plan(asked: Settings, visitor: Visitor, mark: str) -> Plan:
    """The goal in shares of the dense model, and the epochs; kept, so that a resumed run has the same."""
    file = visitor.out / POINTS / PLAN
    kept = read_record(file)
    if kept is None or kept.get("mark") != mark:
        goal = asked.budget.against({"time": visitor.seconds, "bytes": float(visitor.bytes)})
        epochs = asked.epochs if asked.epochs is not None else visitor.bench.training.epochs
        if asked.minutes is not None:
            epochs = epochs_within(asked.minutes, visitor.dense, visitor.bench)
            visitor.tell(f"{asked.minutes:g} minutes of recovery are about {epochs} epochs")
        kept = {"mark": mark, "goal": goal or {"time": FAR}, "stated": bool(goal), "epochs": epochs}
        write_record(file, kept)
    return Plan(goal=kept["goal"], stated=kept["stated"], max_drop=asked.budget.max_drop, epochs=kept["epochs"])


def _step(point: Point) -> dict[str, Any]:
    return {
        "technique": f"point {point.number}, from point {point.parent}: {shares(point)}",
        "settings": point.chosen or {"training": "more epochs"},
        "seconds": None,
        "parameters": None,
        "validation": point.form.score,
    }


def _finish(visitor: Visitor, point: Point, plan: Plan, asked: Settings) -> dict[str, Any]:
    """Measure the result beside the dense model, save it, and say what came out."""
    raced = confirmed(visitor, point, plan)
    point, dense, bench = raced.point, visitor.dense, visitor.bench
    light = visitor.model_of(point)
    known = raced.times[point.fp32.name]
    both = compare(dense, light, test=bench.test, clock=bench.clock, progress=bench.progress, raced=known)
    told_settings = {"budget": str(asked.budget)}
    chosen = raced.made[point.best]
    saved = save(light, visitor.out, measurements=both.to_json(), settings=told_settings, deployment=chosen)
    both = with_bytes(both, stored_bytes(dense), saved.weights_bytes)
    forms = forms_of(visitor, raced, light)
    words = told(point, plan, visitor, light)
    return {
        "machine": to_json(this_machine()),
        "dense": both.dense.to_json(),
        "light": both.light.to_json(),
        "ratios": to_json(both.ratios),
        "change": to_json(both.change),
        "layers": _layers(dense, light, asked),
        "example": example_rows(light),
        "lineage": [{"kind": edit.kind, "text": edit.describe()} for edit in light.lineage],
        "verification": None if saved.verification is None else saved.verification.to_json(),
        "warnings": [*untaught(dense, both.dense.score), *saved.warnings],
        "files": {path.name: path.stat().st_size for path in sorted(visitor.out.glob("model.*"))},
        "verdict": list(filter(None, [words, deployed(forms, visitor.bytes), *verdict(both)])),
        "budget": {
            "asked": asked.budget.to_json(),
            "goal": dict(plan.goal) if plan.stated else {},
            "stated": plan.stated,
            "met": plan.met(point) if plan.stated else plan.holds(point),
            "explanation": words,
            "point": point.number,
            "forms": forms,
            "points": [to_json(p) for p in visitor.points],
            "learning_rate": visitor.rate,
            "teacher": _teacher(dense, bench, plan.epochs)[0],
            "front": [p.number for p in front(visitor.points)],
            "dense_seconds": visitor.seconds,
            "dense_bytes": visitor.bytes,
            "notes": visitor.notes,
        },
    }


def _layers(dense: Model, light: Model, asked: Settings) -> dict[str, Any]:
    """Where the time goes that a budget is about: as the engine tells it, at the batch size and threads asked for."""
    where = {"batch": asked.batch, "threads": asked.threads}
    return {
        "engine": OnnxRuntime().name,
        **where,
        "dense": engine_rows(dense, **where),
        "light": engine_rows(light, **where),
    }
