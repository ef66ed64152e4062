"""`karui plan`: what can be cut, what cannot and why, and what each step of a recipe would do, before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from karui.cli import options, screen

if TYPE_CHECKING:
    from karui.recipes.planned import Preflight

SHOWN = 40
"""Rows of a long list that are printed; `--all` prints the others, and `--json` always tells all."""


def plan(
    model: options.MODEL,
    *,
    recipe: options.RECIPE = None,
    data: options.DATA = None,
    weights: options.WEIGHTS = None,
    shape: options.INPUT = None,
    task: options.TASK = None,
    everything: Annotated[bool, typer.Option("--all", help="Print every row of a long list.")] = False,
    json: options.JSON = False,
) -> None:
    """Look before anything runs: what can be cut, what cannot and why, what a recipe would gain."""
    from karui.recipes.planned import plan_recipe

    steps = options.recipe_of(recipe)
    seed = options.seed_of(None, steps)
    splits = options.data_of(data, seed)
    opened = options.model_of(model, weights=weights, shape=shape, task=task, data=splits, seed=seed)
    bench = options.bench_of(splits, steps, seed=seed, epochs=None, progress=False)
    found = plan_recipe(opened.model, steps, bench)
    if json:
        screen.out_json({"model": model, **found.to_json()})
    else:
        show_plan(found, None if everything else SHOWN)
    found.check()


def show_plan(found: Preflight, limit: int | None) -> None:
    """Print groups, locked layers and steps."""
    told = found.to_json()
    if found.uncaptured:
        screen.out(f"The network cannot be captured as a graph, so no channels can be cut: {found.uncaptured}\n")
    if found.unmeasured:
        screen.out(f"note: {found.unmeasured}\n")
    groups, locked = told.get("groups", []), told.get("locked", [])
    if groups:
        made = screen.table("can be cut", "units", "tensors", "exact", right=("units", "tensors"), wrap=("exact",))
        for group in groups[:limit]:
            exact = "yes" if group["exact"] else f"up to normalisation: {group['reason']}"
            mark = "*" if group["graph_form"] else ""
            made.add_row(f"{group['name']}{mark}", str(group["size"]), str(len(group["members"])), exact)
        screen.show(made)
        _more(len(groups), limit)
        if found.formed:
            screen.out(
                "* The network's own code cannot run after this cut, as sizes are written in it;\n"
                "  the result is a program for any batch, but only for inputs of this size.\n"
            )
    if locked:
        made = screen.table("cannot be cut", "units", "because", right=("units",), wrap=("because",))
        for row in locked[:limit]:
            made.add_row(row["name"], str(row["size"]), row["reason"])
        screen.show(made)
        _more(len(locked), limit)
    if found.steps:
        _show_steps(found, limit)


def _more(count: int, limit: int | None) -> None:
    if limit is not None and count > limit:
        screen.out(f"... and {count - limit} more (--all prints them)\n")


def _show_steps(found: Preflight, limit: int | None) -> None:
    from karui.measuring.values import count_text

    made = screen.table("step", "parameters", "MACs", "", right=("parameters", "MACs"))
    made.add_row("as it is", count_text(found.parameters), count_text(found.macs), "")
    for number, step in enumerate(found.steps, 1):
        counts = ["?" if count is None else count_text(count) for count in (step.parameters, step.macs)]
        made.add_row(f"{number}. {step.technique}", *counts, "REFUSED" if step.refusals else "ready")
    screen.show(made)
    for number, step in enumerate(found.steps, 1):
        told = [*(f"REFUSED: {message} {hint}" for message, hint in step.refusals), *step.remarks]
        for text in told[:limit]:
            screen.out(f"{number}. {text}")
        _more(len(told), limit)
