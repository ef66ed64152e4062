"""`karui compress` and `karui report`: the main job, and the page that tells of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from karui.cli import budgeting, comparing, options, screen
from karui.errors import UsageError, require
from karui.recipes.replacing import refuse_finished

if TYPE_CHECKING:
    from karui.cli.models import Opened
    from karui.recipes import Recipe
    from karui.recipes.budget.run import Settings
    from karui.recipes.run import Asked, Run
    from karui.technique import Bench

OUT = Annotated[Path, typer.Option("--out", "-o", help="Folder for the result.")]


def compress(
    model: options.MODEL,
    *,
    out: OUT,
    recipe: options.RECIPE = None,
    budget: budgeting.BUDGET = None,
    max_drop: budgeting.MAX_DROP = None,
    data: options.DATA = None,
    weights: options.WEIGHTS = None,
    shape: options.INPUT = None,
    task: options.TASK = None,
    seed: options.SEED = None,
    epochs: options.EPOCHS = None,
    minutes: budgeting.MINUTES = None,
    batch: budgeting.BATCH = 1,
    threads: budgeting.THREADS = 1,
    int8: budgeting.INT8 = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the same run where it was stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished run in the folder.")] = False,
    json: options.JSON = False,
) -> None:
    """Make a trained network lighter, by a recipe or to a budget; measure, verify and save it.

    Without --recipe, --budget and --max-drop, the best compromise that is found is taken.
    """
    words = budgeting.Words(budget=budget, max_drop=max_drop, batch=batch, threads=threads, minutes=minutes, int8=int8)
    budgeting.refuse_both(words, given=bool(recipe))
    limits = None if recipe else budgeting.checked(words, epochs)
    steps = options.recipe_of(recipe)
    require(
        not (out / "model.json").is_file() or Path(model).resolve() != out.resolve(),
        f"--out is the folder of the model itself, {model}, which would be lost.",
        "Give a folder of its own.",
        UsageError,
    )
    refuse_finished(out, resume=resume, overwrite=overwrite)
    number = options.seed_of(seed, steps)
    splits = options.data_of(data, number)
    opened = options.model_of(model, weights=weights, shape=shape, task=task, data=splits, seed=number)
    bench = options.bench_of(splits, steps, seed=number, epochs=epochs, progress=True)
    if splits is None and limits is not None:
        raise UsageError("A budget needs data to calibrate and to judge on.", "Give --data.")
    if splits is None:
        hint = "Give --data, or --weights."
        require(not opened.untrained, f"{model} has no weights, and there is no data to train it on.", hint, UsageError)
        screen.say("note: without --data nothing is trained, and accuracy is not measured.")
    if opened.untrained:
        epochs_told = f"{bench.training.epochs} epoch{'' if bench.training.epochs == 1 else 's'}"
        screen.say(f"{model} comes without weights, so it is trained first, for {epochs_told}.")
    from karui.recipes.run import Asked

    asked = Asked(model=model, data=data or "", command=f"karui {' '.join(sys.argv[1:])}")
    done = _run(opened, steps, limits, bench, out, asked=asked, resume=resume)
    page = _page(out)
    if limits is not None:
        budgeting.finished(done.record, out, page, json=json)
        return
    if json:
        screen.out_json(done.to_json())
        return
    comparing.show_run(done.record)
    onnx = out / "model.onnx"
    deploy = f"for deployment: {onnx}" if onnx.is_file() else "no ONNX file (see the note)"
    screen.out(f"\nThe model: {out}\n{deploy}\nthe whole story: {page}")


def _run(
    opened: Opened,
    steps: Recipe | None,
    limits: Settings | None,
    bench: Bench,
    out: Path,
    *,
    asked: Asked,
    resume: bool,
) -> Run:
    """The run of a recipe, or under a budget."""
    common: dict[str, Any] = {"resume": resume, "train_first": opened.untrained, "tell": screen.say}
    if steps is not None:
        from karui.recipes.run import run_recipe

        return run_recipe(opened.model, steps, bench, out, asked=asked, **common)
    from karui.recipes.budget import run_budget

    assert limits is not None  # noqa: S101  (without a recipe there are some)
    return run_budget(opened.model, limits, bench, out, words=asked, **common)


def _page(out: Path) -> Path:
    from karui.report import write_report

    return write_report(out)


def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run.")]) -> None:
    """Write the HTML page of a run, and say where it is."""
    screen.out(str(_page(folder)))
