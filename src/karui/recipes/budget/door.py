"""`karui.compress`: the main job in one call."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from karui.artifact import load
from karui.recipes.budget.limits import read_budget
from karui.recipes.budget.run import Settings, run_budget
from karui.recipes.keeping import Tell, quiet, replayable
from karui.recipes.replacing import refuse_finished

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique import Bench


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What `compress` found.

    Settings:
        model: the light model; its file for deployment lies in `folder`.
        met: whether the floor and every limit that was stated hold, as measured.
        explanation: a paragraph on that.
        record: all that was measured; `record["budget"]["points"]` are the points visited.
        folder: where everything lies; None where no folder was asked for.
    """

    model: Model
    met: bool
    explanation: str
    record: dict[str, Any]
    folder: Path | None = None


def compress(
    model: Model,
    bench: Bench,
    *,
    budget: str | Mapping[str, float | str] | None = None,
    max_drop: float | None = None,
    batch: int = 1,
    threads: int = 1,
    epochs: int | None = None,
    minutes: float | None = None,
    int8: bool = True,
    find_rate: bool = True,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    tell: Tell = quiet,
) -> Compressed:
    """Make a model as light as a budget says, across all techniques, by measurement.

    Args:
        model: the dense model, trained.
        bench: data (training, validation, test), training and seed.
        budget: limits, as shares of the dense model or absolute: "time=0.5,bytes=200KB" or {"time": "2.5ms"}. None goes
            as far as `max_drop` allows; without either, the best compromise (the knee of the front) is taken.
        max_drop: how many points of accuracy (per cent of another metric) may be lost.
        batch: batch size that time is measured for.
        threads: threads that it is measured with.
        epochs: passes of recovery, all stages together; None takes those of the bench's training.
        minutes: the time that recovery may take, instead of `epochs`.
        int8: whether 8-bit arithmetic is tried.
        find_rate: whether recovery's learning rate is found by a short test on training data; else it is that of the
            bench's training.
        out: folder of the result and of every point visited; None keeps the model in memory only.
        resume: go on with a run in `out` that was stopped; one that is finished is not repeated.
        overwrite: replace a finished run in `out`, which is refused otherwise.
        tell: is given a line at each stage.

    Raises:
        UsageError: the budget is impossible, `out` holds a finished run or something else, or the model's weights are
            not float32.
        NeedError: there is no data; or no task or no validation data, and a floor, or no budget either.
        CaptureError: the model cannot be exported to ONNX.

    Example:
        `karui.compress(model, karui.Bench(train=train, test=test), budget="time=0.5", max_drop=1.0, out="light/")`
    """
    asked = Settings(
        budget=read_budget(budget, max_drop=max_drop),
        batch=batch,
        threads=threads,
        epochs=epochs,
        minutes=minutes,
        int8=int8,
        find_rate=find_rate,
    )
    if out is not None:
        refuse_finished(Path(out), resume=resume, overwrite=overwrite)
        return _done(model, asked, bench, Path(out), kept=True, resume=resume, tell=tell)
    with tempfile.TemporaryDirectory(prefix="karui-") as folder:
        return _done(model, asked, bench, Path(folder) / "run", kept=False, resume=False, tell=tell)


def _done(
    model: Model, asked: Settings, bench: Bench, out: Path, *, kept: bool, resume: bool, tell: Tell
) -> Compressed:
    record = run_budget(model, asked, bench, out, resume=resume, tell=tell).record
    light = load(out, base=None if replayable(model) else model)
    told = record["budget"]
    return Compressed(
        model=light,
        met=told["met"],
        explanation=told["explanation"],
        record=record,
        folder=out if kept else None,
    )
