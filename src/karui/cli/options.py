"""Options that several commands have, described once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from karui.cli import completing, screen
from karui.errors import UsageError, require

if TYPE_CHECKING:
    from karui.cli.models import Opened
    from karui.data import Splits
    from karui.recipes import Recipe
    from karui.technique import Bench

MODEL = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        autocompletion=completing.models,
        help="package.module:factory, file.py:factory, timm:NAME, torchvision:NAME, a karui directory, or the name of "
        "an architecture (resnet20, mobilenet ...).",
    ),
]
DATA_OPTION = typer.Option(
    "--data",
    "-d",
    autocompletion=completing.data,
    help="digits, folder:PATH (one folder a class), npz:PATH, or package.module:function giving (train, test).",
)
DATA = Annotated[str | None, DATA_OPTION]
RECIPE_OPTION = typer.Option(
    "--recipe",
    "-r",
    autocompletion=completing.recipes,
    help="A TOML file, or slug:name=value; several steps are joined with +, or given one after the other.",
)
RECIPE = Annotated[list[str] | None, RECIPE_OPTION]
WEIGHTS = Annotated[
    Path | None, typer.Option("--weights", "-w", help="Trained weights: safetensors, npz, or a plain state dict.")
]
INPUT = Annotated[
    str | None, typer.Option("--input", help="Shape of one sample where no data tells it: 3x224x224, or 128:int.")
]
TASK = Annotated[
    str | None,
    typer.Option(
        "--task",
        autocompletion=completing.tasks,
        help="classification (where the model tells no other), regression, or module:object.",
    ),
]
SEED = Annotated[int | None, typer.Option("--seed", help="Fixes every random choice; 0 where the recipe tells none.")]
EPOCHS = Annotated[
    int | None, typer.Option("--epochs", help="Passes over the data of a training whose step does not say it.")
]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]


def data_of(spec: str | None, seed: int) -> Splits | None:
    """The data that `--data` names, every sample of it checked."""
    from karui.data import check, load_data

    screen.progress_to_stderr()
    if spec is None:
        return None
    splits = load_data(spec, seed=seed)
    check(splits, progress=screen.watched())
    return splits


def bench_of(data: Splits | None, recipe: Recipe | None, *, seed: int, epochs: int | None, progress: bool) -> Bench:
    """The bench of a run: the data, the recipe's settings, and what the command line says on top of them."""
    from karui.technique import Bench

    splits = {} if data is None else {"train": data.train, "validation": data.validation, "test": data.test}
    bench = Bench(**splits, progress=progress and screen.watched())
    bench = dataclasses.replace(bench if recipe is None else recipe.bench(bench), seed=seed)
    training = bench.training
    if epochs is not None:
        training = dataclasses.replace(training, epochs=epochs)
    if training.augment is None and data is not None:
        training = dataclasses.replace(training, augment=data.augment)
    return dataclasses.replace(bench, training=training)


def recipe_of(given: list[str] | None) -> Recipe | None:
    """The recipe that all `--recipe` together say; None where there is none.

    Raises:
        UsageError: one of several is a file.
    """
    from karui.recipes import recipe_from

    files = [text for text in given or () if text.endswith(".toml")]
    told = f"{files[0] if files else ''} is a whole recipe, and --recipe is given {len(given or ())} times."
    require(not files or len(given or ()) == 1, told, "Give it alone, or write the other steps into it.", UsageError)
    return recipe_from("+".join(given)) if given else None


def seed_of(asked: int | None, recipe: Recipe | None) -> int:
    """The command line's seed, else the recipe's, else 0.

    Raises:
        SettingError: it is out of range.
    """
    from karui.technique.bench import require_seed

    told = asked if asked is not None else recipe.seed if recipe is not None else None
    seed = 0 if told is None else told
    require_seed(seed)
    return seed


def model_of(
    spec: str, *, weights: Path | None, shape: str | None, task: str | None, data: Splits | None, seed: int
) -> Opened:
    """The model that the command line names, checked against the data."""
    from karui.cli.models import open_model
    from karui.data import check_fit

    opened = open_model(spec, weights=weights, shape=shape, task=task, data=data, seed=seed)
    if data is not None:
        check_fit(data, opened.model)
    return opened
