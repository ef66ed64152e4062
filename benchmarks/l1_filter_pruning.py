"""Filter pruning by L1 norm (62) on the digits: against chance and the opposite choice, by schedule, and in time.

Every number is of the test split, which no decision saw. `greedy` and `iterative` train as long in all as `one-shot`.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from _common import publish, table
from _digits_pruning import digits_bench, of_criterion, show, trained, trials_table
from karui.measuring import Clock, Ratio, compare
from karui.model import Model
from karui.sparsify import L1Filters
from karui.technique import Bench
from karui.technique.pruning.criteria import L1, ByWeights, Largest, Uniform, l2_norm
from karui.technique.pruning.harness import compare_criteria, half_interval
from karui.technique.pruning.plan import candidates
from karui.technique.pruning.scope import Scope
from karui.technique.pruning.sensitivity import scan

SEEDS, DRAWS = 5, 5
RATIOS = (0.25, 0.5, 0.75)
EPOCHS = 12


def criteria() -> dict[str, Any]:
    return {
        "l1": [L1],
        "l2": [ByWeights(l2_norm)],
        "largest": [Largest(L1)],
        "random": [Uniform(draw) for draw in range(DRAWS)],
    }


def schedules(models: dict[int, Model], bench: Bench) -> list[dict[str, Any]]:
    """One-shot, greedy and iterative pruning with equal training in all."""
    rows = []
    for ratio in (0.5, 0.75):
        for name, settings in (
            ("one-shot", L1Filters(ratio=ratio, epochs=EPOCHS)),
            ("greedy", L1Filters(ratio=ratio, epochs=EPOCHS, greedy=True)),
            ("iterative", L1Filters(ratio=ratio, epochs=EPOCHS // 3, iterative=True)),
        ):
            values = []
            for seed, model in models.items():
                seeded = replace(bench, seed=seed)
                values.append(seeded.evaluate(settings.apply(model, seeded), "test").value)
            row = {
                "schedule": name, "ratio": ratio, "values": values,
                "mean": statistics.fmean(values), "half_interval": half_interval(values),
            }  # fmt: skip
            rows.append(row)
            print(f"  {name:10} {ratio:.2f}  {100 * row['mean']:5.1f} +- {100 * (row['half_interval'] or 0):4.1f}")
    return rows


def wide() -> Model:
    """Layers of 32 to 128 filters on 32x32 pictures, where arithmetic, and not overhead, takes the time."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    return Model(net.eval(), example=(torch.rand(2, 3, 32, 32),))


def times() -> dict[str, Any]:
    """Half of the filters of the wide network: counts and time, dense and thin in turns."""
    dense = wide()
    thin = L1Filters(ratio=0.5, epochs=0).apply(dense, Bench())
    clock = Clock(batches=(1, 256), threads=(1,), rounds=9, cpu_time=True, seconds=120)
    told = compare(dense, thin, clock=clock)
    for ratio in told.ratios:
        print(f"  {ratio}")
    return told.to_json()


def verdicts(told: dict[str, Any]) -> list[str]:
    """Ratios of time, dense against thin."""
    times = [Ratio(**ratio) for ratio in told["ratios"] if ratio["quantity"] == "time"]
    return [f"{time.engine}, batch {time.batch}, one thread: {time.verdict}" for time in times]


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    lines = []
    for epochs in (2, EPOCHS):
        trials = told[f"criteria, {epochs} epochs"]
        scores = [f"{name} {of_criterion(trials, name, 0.5)}" for name in ("l1", "random", "largest")]
        lines.append(
            f"digits, half of the filters, {epochs} epochs of retraining, 5 seeds: accuracy, % {', '.join(scores)}"
        )
    lines.append(f"half of the filters of a wide network: {'; '.join(verdicts(told['time at 50 %']))}")
    return {"l1_filter_pruning": lines}


def report(told: dict[str, Any]) -> str:
    """The results for people."""
    parts = ["# Filter pruning by L1 norm (62)", f"Digits, three convolutions, {told['seeds']} seeds; test accuracy."]
    for name, trials in told.items():
        if name.startswith("criteria"):
            parts += [f"{name.replace('criteria', 'Criteria')} of retraining:", trials_table(trials)]
    rows = [
        [row["schedule"], f"{row['ratio']:.0%}", f"{100 * row['mean']:.2f} +- {100 * (row['half_interval'] or 0):.2f}"]
        for row in told["schedules"]
    ]
    parts += [f"Schedules with {EPOCHS} epochs in all:", table(["schedule", "cut", "accuracy, %"], rows)]
    parts += ["Half of the filters of a wide network, dense against thin in turns:"]
    parts += ["\n".join(f"- {verdict}" for verdict in verdicts(told["time at 50 %"]))]
    return "\n\n".join(parts)


def main() -> None:
    bench = digits_bench()
    plain = trained(bench, SEEDS)
    told: dict[str, Any] = {"seeds": SEEDS, "random draws": DRAWS, "base epochs": bench.training.epochs}
    for epochs in (2, EPOCHS):
        table = compare_criteria(plain, bench, criteria(), RATIOS, epochs=epochs)
        show(f"{epochs} epochs of retraining", table)
        told[f"criteria, {epochs} epochs"] = table.to_json()
    table = compare_criteria(trained(bench, 3, normalised=True), bench, criteria(), (0.5, 0.75), epochs=2)
    show("with batch normalisation, 2 epochs of retraining", table)
    told["criteria, batch normalisation, 2 epochs"] = table.to_json()
    print(f"schedules, {EPOCHS} epochs in all")
    told["schedules"] = schedules(plain, bench)
    groups = candidates(plain[0], Scope()).groups
    told["sensitivity of seed 0"] = scan(plain[0], bench, groups, L1, [k / 10 for k in range(1, 10)]).to_json()
    print("half of the filters of a wide network")
    told["time at 50 %"] = times()
    publish("l1_filter_pruning", told, report(told), measured(told))


if __name__ == "__main__":
    main()
