"""Logit regression (31): logits against labels on the same few digits, a pool of more; and what the bottleneck saves.

The first part has five seeds, each with teachers and pictures of its own, and full batches until the students have
converged. The second trains one wide layer on MNIST with and without the linear bottleneck, and tells the processor
time until the mean loss of an epoch has fallen to the value that both reach.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from _common import CACHE, Ledger, apart, by_name, claims_table, interval, mnist, publish, shown, table, unseen
from _mlp import accuracy, bench_of, few_of, mlp
from karui.data import Splits, load_data
from karui.distill import LogitRegression
from karui.distill.shallow import wide_shallow
from karui.model import Classification, Model
from karui.technique import Bench
from karui.train import SGD, Constant, Training

SEEDS, CLOCKED, FEW, STEPS = 5, 3, 100, 1200
HIDDEN, RANK, PICTURES, EPOCHS = 4096, 100, 1500, 8


def teachers_of(digits: Splits, seed: int) -> tuple[Model, ...]:
    return tuple(bench_of(digits, 40, s).fit(mlp(64, 128, 128, 10, seed=100 + s)) for s in (2 * seed, 2 * seed + 1))


def arms(digits: Splits, seed: int) -> dict[str, float]:
    """A student of 32 units on few labels, on their logits, and on those of all digits."""
    teachers = teachers_of(digits, seed)
    bench, student = bench_of(few_of(digits, FEW, seed), STEPS, seed, batch=FEW), mlp(64, 32, 10, seed=seed)
    logits = LogitRegression(teacher=teachers, epochs=STEPS, remember=len(digits.train))
    batches = -(-len(digits.train) // FEW)
    pooled = replace(logits, epochs=2 * STEPS // batches)
    every = replace(bench, train=digits.train)
    made = {
        "labels": bench.fit(student),
        "logits, not normalised": replace(logits, normalise=False).apply(student, bench),
        "logits": logits.apply(student, bench),
        "logits of all": pooled.apply(student, every),
    }
    told = {name: accuracy(model, digits) for name, model in made.items()}
    return {"the teachers": sum(accuracy(one, digits) for one in teachers) / 2} | told


def trained(splits: Splits, teacher: Model, rank: int, seed: int) -> tuple[list[float], float]:
    """The mean loss of each epoch, and processor seconds of one."""
    torch.manual_seed(seed)
    net = Model(wide_shallow(784, HIDDEN, 10, rank=rank), example=(torch.zeros(1, 1, 28, 28),), task=Classification())
    training = Training(batch_size=32, optimizer=SGD(lr=0.02, weight_decay=0.0), schedule=Constant())
    bench = Bench(train=splits.train, validation=splits.validation, training=training, seed=seed)
    began = time.process_time()
    made = LogitRegression(teacher=teacher, epochs=EPOCHS).apply(net, bench)
    spent = time.process_time() - began
    return [epoch["loss"] for epoch in made.lineage[-1].settings["history"]], spent / EPOCHS


def clocked(seed: int) -> dict[str, dict[str, float]]:
    """Both students of one teacher: epochs and seconds until the loss that both of them reach."""
    splits = mnist(PICTURES)
    teacher = bench_of(splits, 8, seed, lr=1e-3, batch=64).fit(mlp(784, 200, 10, seed=100 + seed))
    made = {name: trained(splits, teacher, rank, seed) for name, rank in (("bottleneck", RANK), ("full", 0))}
    goal = max(min(losses) for losses, _ in made.values())
    told = {}
    for name, (losses, each) in made.items():
        epochs = next(number for number, loss in enumerate(losses, 1) if loss <= goal)
        told[name] = {"loss": goal, "epochs": epochs, "seconds of an epoch": each, "seconds": epochs * each}
    return told


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    arm, clock = told["arms"], told["clock"]
    lines = [
        (
            f"{FEW} digits, 64-32-10, {SEEDS} seeds: accuracy from labels {shown(arm['labels'])}, from their logits "
            f"{shown(arm['logits'])} (not normalised {shown(arm['logits, not normalised'])}), from those of all "
            f"{told['pool']:,} {shown(arm['logits of all'])} %"
        ),
        (
            f"{HIDDEN} hidden units, MNIST, {CLOCKED} seeds: seconds of one core to the same loss behind a bottleneck "
            f"of {RANK} {shown(clock['bottleneck'])}, without {shown(clock['full'])}"
        ),
    ]
    return {"logit_regression": lines + unseen(told["claims"])}


def main() -> None:
    ledger, digits = Ledger(CACHE / "logit_regression.json"), load_data("digits")
    runs = [ledger.once(f"seed {s}", lambda s=s: arms(digits, s)) for s in range(SEEDS)]
    clocks = [ledger.once(f"clock, seed {s}", lambda s=s: clocked(s)) for s in range(CLOCKED)]
    told = by_name(runs)
    gains = {
        "logits over labels": apart(runs, "logits", "labels"),
        "logits of all over those of the few": apart(runs, "logits of all", "logits"),
        "normalised over not": apart(runs, "logits", "logits, not normalised"),
    }
    loss = interval([one["full"]["loss"] for one in clocks])
    clock = {way: interval([one[way]["seconds"] for one in clocks]) for way in ("bottleneck", "full")}
    claims = {
        "logits of the same points 3 points better than their labels": gains["logits over labels"]["mean"] >= 3,
        "a larger pool adds half a point, on average": gains["logits of all over those of the few"]["mean"] >= 0.5,
        "the bottleneck reaches the same loss in less time, for every seed": all(
            one["bottleneck"]["seconds"] < one["full"]["seconds"] for one in clocks
        ),
    }
    steps = [
        [
            way,
            *(shown(interval([one[key][what] for one in clocks])) for what in ("seconds of an epoch", "epochs")),
            shown(clock[key]),
        ]
        for way, key in ((f"bottleneck of {RANK}", "bottleneck"), ("full", "full"))
    ]
    text = f"""# Logit regression (31)

A student of 32 units, {FEW} digits, two teachers of 128 and 128 units that have seen all {len(digits.train):,}; full
batches, {STEPS:,} steps (twice as many on the logits of all). Test accuracy in percent, {SEEDS} seeds.

{table(["taught by", "accuracy, %"], [[name, shown(one)] for name, one in told.items()])}

{table(["difference", "points, seed by seed"], [[name, shown(one)] for name, one in gains.items()])}

One hidden layer of {HIDDEN} units on {PICTURES:,} MNIST digits (784 inputs), SGD at 0.02, {EPOCHS} epochs, until the
mean loss of an epoch that both reach ({shown(loss)}); processor seconds of one core, {CLOCKED} seeds.

{table(["first layer", "seconds of an epoch", "epochs", "seconds to the loss"], steps)}

{claims_table(claims)}
"""
    values = {"pool": len(digits.train), "arms": told, "gains": gains, "clock": clock, "claims": claims}
    publish("logit_regression", values, text, measured(values))


if __name__ == "__main__":
    main()
