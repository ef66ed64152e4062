"""Random channel pruning (69) on the digits: criteria and chance under one protocol, before and after fine-tuning.

Layer by layer with an epoch of training after each, then fine-tuning, for every criterion alike; beside them networks
of the same shape trained from nothing, and pruning for half of the classes. Every number is of the test split.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from _common import publish, table
from _digits_pruning import BASE_EPOCHS, digits_bench, network, of_criterion, show, trained, trials_table
from karui.technique import Bench
from karui.technique.pruning.activations import (
    ByActivations,
    BySensitivity,
    entropy,
    mean_activation,
    nonzero_share,
    scaled_entropy,
)
from karui.technique.pruning.classes import of_classes
from karui.technique.pruning.criteria import L1, Uniform
from karui.technique.pruning.harness import Trials, compare_criteria, half_interval
from karui.technique.pruning.selection import removed_count

SEEDS, DRAWS = 3, 5
RATIOS = (0.25, 0.5, 0.75)
LAYER_EPOCHS, EPOCHS = 1, 20
CLASSES = (0, 1, 2, 3, 4)


def criteria() -> dict[str, Any]:
    return {
        "random": [Uniform(draw) for draw in range(DRAWS)],
        "l1": [L1],
        "mean activation": [ByActivations(mean_activation)],
        "entropy": [ByActivations(entropy)],
        "scaled entropy": [ByActivations(scaled_entropy)],
        "apoz": [ByActivations(nonzero_share)],
        "sensitivity": [BySensitivity()],
    }


def findings(told: Trials) -> list[dict[str, float]]:
    """At each ratio: how far criteria lie apart, and how far the best is ahead of chance."""
    rows = []
    for ratio in RATIOS:
        row = {"ratio": ratio}
        for when in ("before", "after"):
            row[f"spread_{when}"], row[f"gap_{when}"] = told.spread(ratio, when), told.gap(ratio, when)
        rows.append(row)
        print(f"  {', '.join(f'{name} {value:.3f}' for name, value in row.items())}")
    return rows


def from_nothing(bench: Bench) -> list[dict[str, Any]]:
    """Networks of the pruned shapes, trained as long as the dense ones were."""
    rows = []
    for ratio in RATIOS:
        first, second, third = (width - removed_count(width, ratio) for width in (16, 32, 32))
        values = []
        for seed in range(SEEDS):
            seeded = replace(bench, seed=seed)
            values.append(seeded.evaluate(seeded.fit(network(seed, (first, second, third))), "test").value)
        mean, half = statistics.fmean(values), half_interval(values) or 0.0
        print(f"  {ratio:.2f}  {100 * mean:5.1f} +- {100 * half:4.1f}")
        rows.append({"ratio": ratio, "values": values, "mean": mean, "half_interval": half})
    return rows


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    lines = []
    for ratio in (0.5, 0.75):
        scores = [f"{name} {of_criterion(told['criteria'], name, ratio)}" for name in ("random", "l1", "entropy")]
        nothing = next(row for row in told["from nothing"] if row["ratio"] == ratio)
        lines.append(
            f"digits, {ratio:.0%} of the filters, {told['epochs of fine-tuning']} epochs of fine-tuning: accuracy, % "
            f"{', '.join(scores)}; the same shape trained from nothing {_percent(nothing)}"
        )
    return {"random_channel_pruning": lines}


def _percent(row: dict[str, Any]) -> str:
    return f"{100 * row['mean']:.2f} +- {100 * row['half_interval']:.2f}"


def report(told: dict[str, Any]) -> str:
    """The results for people."""
    apart = [
        [f"{row.pop('ratio'):.0%}", *(f"{100 * value:.2f}" for value in row.values())]
        for row in map(dict, told["findings"])
    ]
    parts = [
        "# Random channel pruning (69)",
        (
            f"Digits, three convolutions, {told['seeds']} seeds, {told['random draws']} draws of chance for each; "
            f"{told['epochs after each layer']} epoch after each layer, {told['epochs of fine-tuning']} of fine-tuning."
        ),
        trials_table(told["criteria"]),
        "How far the criteria lie apart, and the best ahead of chance, in points of accuracy:",
        table(["cut", "apart before", "ahead before", "apart after", "ahead after"], apart),
        f"The same shapes from nothing, {told['base epochs']} epochs:",
        table(["cut", "accuracy, %"], [[f"{row['ratio']:.0%}", _percent(row)] for row in told["from nothing"]]),
        f"For the classes {told['classes']['classes']} only:",
        trials_table(told["classes"]),
    ]
    return "\n\n".join(parts)


def main() -> None:
    bench = digits_bench()
    models = trained(bench, SEEDS)
    table = compare_criteria(models, bench, criteria(), RATIOS, epochs=EPOCHS, layer_epochs=LAYER_EPOCHS)
    show(f"{LAYER_EPOCHS} epoch after each layer, {EPOCHS} of fine-tuning", table)
    told: dict[str, Any] = {
        "seeds": SEEDS, "random draws": DRAWS, "base epochs": BASE_EPOCHS,
        "epochs after each layer": LAYER_EPOCHS, "epochs of fine-tuning": EPOCHS,
        "criteria": table.to_json(), "findings": findings(table),
    }  # fmt: skip
    print(f"the same shapes from nothing, {BASE_EPOCHS} epochs")
    told["from nothing"] = from_nothing(bench)
    chosen = ("random", "l1", "entropy")
    some = {name: draws for name, draws in criteria().items() if name in chosen}
    classes = compare_criteria(
        models, of_classes(bench, CLASSES), some, (0.5,), epochs=EPOCHS, layer_epochs=LAYER_EPOCHS
    )
    show(f"for the classes {CLASSES} only", classes)
    told["classes"] = {"classes": CLASSES, **classes.to_json()}
    publish("random_channel_pruning", told, report(told), measured(told))


if __name__ == "__main__":
    main()
