"""What a teacher adds to the retraining of techniques that know nothing of one: [62], [12] and [63] on ResNet-20.

Published weights, a part of CIFAR-10, a few passes after each compression: on the labels alone, and under the dense
network by `bench.under(...)`, as every budget retrains by default. Two rates, as gradients of soft targets are larger
than those of labels. Three seeds.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Subset

from _common import CACHE, Ledger, apart, by_name, cifar10, interval, publish, shown, table
from cifar_resnets import published
from karui.distill import KnowledgeDistillation
from karui.lowrank import Tucker2
from karui.measuring import evaluate
from karui.sparsify import L1Filters, MagnitudePruning
from karui.technique import Bench, Technique
from karui.train import SGD, Cosine, Training

SEEDS, PICTURES, PASSES, TEST = 3, 1500, 3, 2000
RATES = (0.01, 0.0025)
STEPS: dict[str, tuple[str, Technique]] = {
    "l1_filter_pruning": ("[62] half of the filters", L1Filters(ratio=0.5, epochs=PASSES)),
    "tucker2": ("[12] half of the ranks", Tucker2(ratio=0.5, epochs=PASSES)),
    "iterative_magnitude_pruning": (
        "[63] a tenth of the weights",
        MagnitudePruning(keep=0.1, rounds=1, epochs=PASSES, rate=1.0),
    ),
}
ALONE, UNDER = "labels alone", "under the dense network"


def arms(name: str, rate: float, seed: int) -> dict[str, float]:
    """Accuracy and processor seconds of both retrainings, the compression included."""
    data, dense = cifar10(PICTURES), published("resnet20")
    dense.module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (as what is trained)
    training = Training(batch_size=32, optimizer=SGD(lr=rate, weight_decay=1e-4), schedule=Cosine(), channels_last=True)
    test = Subset(data.test, range(TEST))
    bench = Bench(train=data.train, validation=data.validation, test=test, training=training, seed=seed)
    step, told = STEPS[name][1], {}
    teaching = KnowledgeDistillation(teacher=dense.copy(), epochs=PASSES)
    for way in (ALONE, UNDER):
        began = time.process_time()
        taught = bench if way == ALONE else bench.under(teaching.influence(dense, bench))
        light = step.apply(dense, taught)
        told[f"seconds, {way}"] = time.process_time() - began
        told[way] = 100 * evaluate(light, test).value
    if seed == 0:
        bare = replace(step, epochs=0).apply(dense, bench)  # pyright: ignore[reportArgumentType, reportCallIssue]
        told["before"] = 100 * evaluate(bare, test).value
    return told


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    lines: dict[str, list[str]] = {}
    for slug, (name, _) in STEPS.items():
        parts = [
            f"at rate {rate:g} {shown(row[ALONE])} on labels alone, {shown(row[UNDER])} under the dense network"
            for rate in RATES
            if (row := told["rows"][f"{slug}, {rate:g}"])
        ]
        start = f"ResNet-20, {name.partition('] ')[2]}, {PASSES} passes over {PICTURES:,} pictures: accuracy, %, "
        lines[slug] = [start + "; ".join(parts)]
    gains = "; ".join(
        f"{STEPS[slug][0]} {', '.join(shown(told['rows'][f'{slug}, {rate:g}']['gain']) for rate in RATES)}"
        for slug in STEPS
    )
    rates = " and ".join(f"{rate:g}" for rate in RATES)
    whole = f"ResNet-20 retrained under the dense network, points over labels alone at rates {rates}: {gains}"
    return {"knowledge_distillation": [whole], **lines}


def main() -> None:
    torch.set_num_threads(1)
    ledger, rows, body = Ledger(CACHE / "recovery_under_teacher.json"), {}, []
    for slug, (name, _) in STEPS.items():
        for rate in RATES:
            key = f"{slug}, {rate:g}"
            runs = [ledger.once(f"{key}, seed {s}", lambda n=slug, r=rate, s=s: arms(n, r, s)) for s in range(SEEDS)]
            same = [{part: value for part, value in run.items() if part != "before"} for run in runs]
            cost = interval([run[f"seconds, {UNDER}"] / run[f"seconds, {ALONE}"] for run in same])
            rows[key] = by_name(same) | {"before": runs[0]["before"], "gain": apart(same, UNDER, ALONE), "cost": cost}
            told = [shown(rows[key][part]) for part in (ALONE, UNDER, "gain", "cost")]
            body.append([name, f"{rate:g}", f"{rows[key]['before']:.2f}", *told])
    head = ["compression", "rate", "before retraining", ALONE, UNDER, "difference, points", "times the cost"]
    text = f"""# Retraining under the dense network

ResNet-20 with published weights (91.73 %), compressed and retrained for {PASSES} passes over {PICTURES:,} pictures of
CIFAR-10 (batches of 32, SGD, cosine, no augmentation, so that the teacher answers once), judged on {TEST:,} test
pictures: accuracy in percent, mean and 95 % interval of {SEEDS} seeds. Gradients of soft targets are up to T = 4 times
those of labels, so that a rate which suits the one need not suit the other; budgets look for a rate under the teacher.

{table(head, body)}
"""
    publish("recovery_under_teacher", {"rows": rows}, text, measured({"rows": rows}))


if __name__ == "__main__":
    main()
