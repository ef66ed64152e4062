"""`karui compress --budget`: what a person sees of a run under a budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from karui.cli import comparing, screen
from karui.errors import UsageError, require

if TYPE_CHECKING:
    from karui.recipes.budget.run import Settings

BUDGET = Annotated[
    str | None,
    typer.Option("--budget", "-b", help="Limits: time=0.5 (of the dense model's), time=2.5ms, bytes=0.3, bytes=200KB."),
]
MAX_DROP = Annotated[
    float | None,
    typer.Option("--max-drop", help="Points of accuracy (per cent of another metric) that may be lost."),
]
BATCH = Annotated[int, typer.Option("--batch", help="Batch size that a budget's time is measured for.")]
THREADS = Annotated[int, typer.Option("--threads", help="Threads that it is measured with.")]
MINUTES = Annotated[float | None, typer.Option("--minutes", help="Time for recovery under a budget, not --epochs.")]
INT8 = Annotated[bool, typer.Option("--int8/--no-int8", help="Whether a budget may use 8-bit arithmetic.")]


@dataclass(frozen=True, kw_only=True)
class Words:
    """The options of a budget as they were typed."""

    budget: str | None
    max_drop: float | None
    batch: int
    threads: int
    minutes: float | None
    int8: bool

    @property
    def given(self) -> list[str]:
        """The options that only a budget has a use for, and that were given."""
        told = {
            "--budget": self.budget is not None,
            "--max-drop": self.max_drop is not None,
            "--minutes": self.minutes is not None,
            "--batch": self.batch != 1,
            "--threads": self.threads != 1,
            "--no-int8": not self.int8,
        }
        return [name for name, here in told.items() if here]


def refuse_both(words: Words, *, given: bool) -> None:
    """A recipe says what to do, a budget what to reach: not both.

    Args:
        words: what is said of a budget.
        given: whether there is a recipe.

    Raises:
        UsageError: both are there.
    """
    told = f"{words.given[0] if words.given else ''} goes with a budget, and --recipe is given."
    require(not given or not words.given, told, "Give a recipe or a budget.", UsageError)


def checked(words: Words, epochs: int | None) -> Settings:
    """What was asked for, refused at once where it is impossible."""
    from karui.recipes.budget.limits import read_budget

    budget = read_budget(
        words.budget, max_drop=words.max_drop
    )  # before torch is imported: a typing error costs nothing
    from karui.recipes.budget.run import Settings

    return Settings(
        budget=budget,
        batch=words.batch,
        threads=words.threads,
        epochs=epochs,
        minutes=words.minutes,
        int8=words.int8,
    )


def show_points(record: dict[str, Any]) -> None:
    """Print the front of the points that were visited, and the paragraph."""
    told = record["budget"]
    made = screen.table("point", "time", "bytes", "lost", "epochs", "form", "model", right=("time", "bytes", "lost"))
    on_front = set(told["front"])
    for point in told["points"]:
        if point["number"] not in on_front:
            continue
        form = point["forms"][point["best"]]
        mark = " *" if point["number"] == told["point"] else ""
        lost = "" if form["score"] is None else f"{form['lost']:.2f}"
        cells = (f"{form['time']:.2f}", f"{form['bytes']:.2f}", lost, str(point["epochs"]), form["told"])
        made.add_row(f"{point['number']}{mark}", *cells, point["folder"] + ("" if point["number"] else " (dense)"))
    screen.out("The front of the points visited (time and bytes of dense; validation data):")
    screen.show(made)
    for form in told["forms"]:
        ratio, score = form["ratio"], form["test"]
        judged = "" if score is None else f", test {score['metric']} {_score(score)}"
        chosen = " (model.onnx)" if form["chosen"] else ""
        screen.out(
            f"{form['told']}{chosen}: {ratio['value']:.2f}x the speed of dense "
            f"({ratio['low']:.2f} to {ratio['high']:.2f}){judged}"
        )
    for note in told["notes"]:
        screen.say(f"note: {note}")


def _score(score: dict[str, Any]) -> str:
    return f"{score['value']:.1%}" if score["metric"] == "accuracy" else f"{score['value']:.4g}"


def finished(record: dict[str, Any], out: Path, page: Path, *, json: bool) -> None:
    """Print the result; exit code 1 where the budget was not met.

    Raises:
        typer.Exit: it was not.
    """
    if json:
        screen.out_json(record)
    else:
        show_points(record)
        comparing.show_run(record)
        screen.out(f"\nThe model: {out}\nthe whole story: {page}")
    if not record["budget"]["met"] and record["budget"]["stated"]:
        raise typer.Exit(1)
