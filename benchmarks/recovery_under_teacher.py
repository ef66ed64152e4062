"""What a teacher adds to the retraining of techniques that know nothing of one: [62], [12] and [63] on ResNet-20.

Published weights, a part of CIFAR-10, a few passes after each compression: on the labels alone, and under the dense
network by `bench.under(...)`, as every budget retrains by default. Three seeds.
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
STEPS: dict[str, tuple[str, Technique]] = {
    "l1_filter_pruning": ("[62] half of the filters", L1Filters(ratio=0.5, epochs=PASSES)),
    "tucker2": ("[12] half of the ranks", Tucker2(ratio=0.5, epochs=PASSES)),
    "iterative_magnitude_pruning": (
        "[63] a tenth of the weights",
        MagnitudePruning(keep=0.1, rounds=1, epochs=PASSES, rate=1.0),
    ),
}
ALONE, UNDER = "labels alone", "under the dense network"


def arms(name: str, seed: int) -> dict[str, float]:
    """Accuracy and processor seconds of both retrainings, the compression included."""
    data, dense = cifar10(PICTURES), published("resnet20")
    dense.module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (as what is trained)
    training = Training(batch_size=32, optimizer=SGD(lr=0.01, weight_decay=1e-4), schedule=Cosine(), channels_last=True)
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
    lines = {
        slug: f"ResNet-20, {STEPS[slug][0].partition('] ')[2]}, {PASSES} passes over {PICTURES:,} pictures: accuracy "
        f"{shown(row[ALONE])} on labels alone, {shown(row[UNDER])} % under the dense network ([30])"
        for slug, row in told["rows"].items()
    }
    gains = "; ".join(f"{STEPS[slug][0]} {shown(row['gain'])}" for slug, row in told["rows"].items())
    whole = f"ResNet-20, retraining under the dense network, points over the same on labels alone: {gains}"
    return {"knowledge_distillation": [whole], **{slug: [line] for slug, line in lines.items()}}


def main() -> None:
    torch.set_num_threads(1)
    ledger, rows = Ledger(CACHE / "recovery_under_teacher.json"), {}
    for slug in STEPS:
        runs = [ledger.once(f"{slug}, seed {s}", lambda n=slug, s=s: arms(n, s)) for s in range(SEEDS)]
        same = [{key: value for key, value in run.items() if key != "before"} for run in runs]
        ratio = interval([run[f"seconds, {UNDER}"] / run[f"seconds, {ALONE}"] for run in same])
        rows[slug] = by_name(same) | {"before": runs[0]["before"], "gain": apart(same, UNDER, ALONE), "cost": ratio}
    body = [
        [
            STEPS[slug][0],
            f"{row['before']:.2f}",
            *(shown(row[key]) for key in (ALONE, UNDER, "gain", "cost")),
        ]
        for slug, row in rows.items()
    ]
    head = ["compression", "before retraining", ALONE, UNDER, "difference, points", "times the cost"]
    text = f"""# Retraining under the dense network

ResNet-20 with published weights (91.73 %), compressed and retrained for {PASSES} passes over {PICTURES:,} pictures of
CIFAR-10 (batches of 32, SGD, rate 0.01, cosine, no augmentation, so that the teacher answers once), judged on {TEST:,}
test pictures: accuracy in percent, mean and 95 % interval of {SEEDS} seeds.

{table(head, body)}
"""
    publish("recovery_under_teacher", {"rows": rows}, text, measured({"rows": rows}))


if __name__ == "__main__":
    main()
