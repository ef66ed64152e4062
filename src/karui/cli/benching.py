"""`karui bench`: several recipes on one model and data, over several seeds, side by side."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from karui.cli import options, screen
from karui.errors import UsageError, require

if TYPE_CHECKING:
    from karui.recipes import Recipe


def bench(
    model: options.MODEL,
    *,
    data: Annotated[str, options.DATA_OPTION],
    recipes: Annotated[
        list[str], typer.Option("--recipe", "-r", help="A TOML file or steps; give it several times to compare.")
    ],
    seeds: Annotated[int, typer.Option("--seeds", help="How many seeds each recipe is run with.")] = 3,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for each run; a stopped benchmark goes on from there.")
    ] = None,
    weights: options.WEIGHTS = None,
    shape: options.INPUT = None,
    task: options.TASK = None,
    epochs: options.EPOCHS = None,
    json: options.JSON = False,
) -> None:
    """Compare recipes on one model and data, each over several seeds, against the dense model."""
    import tempfile

    from karui.recipes import recipe_from

    require(seeds >= 1, f"--seeds is {seeds}.", "Give at least 1.", UsageError)
    steps = [recipe_from(text) for text in recipes]
    with tempfile.TemporaryDirectory(prefix="karui-bench-") as scratch:
        folder = Path(scratch) if out is None else out
        rows = []
        for number, (text, recipe) in enumerate(zip(recipes, steps, strict=True), 1):
            runs = []
            for seed in range(seeds):
                screen.say(f"recipe {number} of {len(recipes)} ({text}), seed {seed + 1} of {seeds}")
                asked = {"model": model, "data": data, "weights": weights, "shape": shape, "task": task}
                runs.append(_run(recipe, folder / f"{number:02d}-seed{seed}", seed=seed, epochs=epochs, **asked))
            rows.append({"recipe": text, **summary(runs)})
    if json:
        screen.out_json({"model": model, "data": data, "seeds": seeds, "rows": rows})
        return
    _print(rows, seeds)


def _run(recipe: Recipe, folder: Path, *, data: str, seed: int, epochs: int | None, **asked: Any) -> dict[str, Any]:
    from karui.recipes.run import Asked, run_recipe

    splits = options.data_of(data, seed)
    opened = options.model_of(
        asked["model"], weights=asked["weights"], shape=asked["shape"], task=asked["task"], data=splits, seed=seed
    )
    bench_ = options.bench_of(splits, recipe, seed=seed, epochs=epochs, progress=True)
    bench_ = dataclasses.replace(bench_, clock=dataclasses.replace(bench_.clock, threads=(1,)))
    told = Asked(model=asked["model"], data=data)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return run_recipe(
        opened.model, recipe, bench_, folder, asked=told, resume=True, train_first=opened.untrained
    ).record


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over the seeds of what the runs' records tell; a ratio is dense over light."""
    from statistics import fmean

    found: dict[str, list[float]] = {}
    for record in records:
        for ratio in record["ratios"]:
            found.setdefault(_key(ratio), []).append(ratio["value"])
        for which in ("dense", "light"):
            score = record[which]["score"]
            if score is not None:
                found.setdefault(f"{which} {score['metric']}", []).append(score["value"])
    return {
        name: {
            "mean": fmean(values),
            "low": min(values),
            "high": max(values),
            "values": values,
        }
        for name, values in found.items()
    }


def _key(ratio: dict[str, Any]) -> str:
    if not ratio["engine"]:
        return ratio["quantity"]
    return f"{ratio['quantity']}, {ratio['engine']}, batch {ratio['batch']}, {ratio['threads']} threads"


def _print(rows: list[dict[str, Any]], seeds: int) -> None:
    title = f"Over {seeds} seed{'' if seeds == 1 else 's'}; gains are dense over light, so above 1 is better"
    made = screen.table("", "mean", "lowest", "highest", title=title, right=("mean", "lowest", "highest"))
    for number, row in enumerate(rows, 1):
        made.add_row(f"{number}. {row['recipe']}")
        for name, key in _lines(row):
            value = row[key]
            made.add_row(f"   {name}", *(f"{value[which]:.3f}" for which in ("mean", "low", "high")))
    screen.show(made)


def _lines(row: dict[str, Any]) -> list[tuple[str, str]]:
    """What is printed of a recipe, and its key in the summary."""
    wanted = [(f"{key} (test data)", key) for key in row if key.startswith(("dense ", "light "))]
    wanted += [("gain in saved bytes", "bytes as saved"), ("gain in multiply-adds", "macs")]
    wanted += [(f"gain in {key}", key) for key in row if key.startswith("time, ")]
    return [(name, key) for name, key in wanted if key in row]
