"""What a teacher costs a fine-tuning: with its answers kept, and asked anew at each step.

A ResNet-20 of half the channels learns colour pictures of 32x32 from a whole one, against the same fine-tuning on
labels. CPU time of an epoch, one process and one thread, all ways in each round in random order; ratios of medians.
Goals: with answers kept at most 1.15 times the plain epoch; asked anew at most the plain epoch and one forward pass of
the teacher over the data, with 5 % for noise.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import TensorDataset

from _common import publish, table
from karui.architectures.cifar_resnet import cifar_resnet
from karui.distill import KnowledgeDistillation, LogitRegression
from karui.model import Classification, Model
from karui.technique import Bench
from karui.train import SGD, Constant, Training
from karui.train.teaching import Teachers

SAMPLES, BATCH, ROUNDS = 512, 64, 11
KEPT, NOISE = 1.15, 1.05


def networks() -> tuple[Model, Model, Bench]:
    """Student, teacher and bench; the labels are drawn, since only time is measured."""
    torch.manual_seed(0)
    x, y = torch.randn(SAMPLES, 3, 32, 32), torch.randint(10, (SAMPLES,))
    student, teacher = (
        Model(cifar_resnet(20, width=width), example=(x[:2],), task=Classification()) for width in (0.5, 1.0)
    )
    training = Training(epochs=1, batch_size=BATCH, optimizer=SGD(), schedule=Constant())
    data = TensorDataset(x, y)
    return student, teacher, Bench(train=data, validation=data, training=training)


def ways(student: Model, teacher: Model, bench: Bench) -> dict[str, Callable[[], Any]]:
    """One epoch each. What is kept was asked before: it is another epoch of the same training that is timed."""
    asked = KnowledgeDistillation(teacher=teacher, epochs=1)
    kept = bench.under(replace(asked, remember=SAMPLES).influence(student, bench))
    anew = bench.under(asked.influence(student, bench))
    logits = bench.under(LogitRegression(teacher=teacher, remember=SAMPLES, normalise=False).influence(student, bench))
    inputs = bench.train.tensors[0]
    alone = Teachers((teacher,))
    return {
        "plain": lambda: bench.fit(student, epochs=1),
        "soft targets, kept": lambda: kept.fit(student, epochs=1),
        "logits, kept": lambda: logits.fit(student, epochs=1),
        "soft targets, anew": lambda: anew.fit(student, epochs=1),
        "the teacher alone": lambda: [alone((part,)) for part in inputs.split(BATCH)],
    }


def main() -> None:
    torch.set_num_threads(1)
    work = ways(*networks())
    for run in work.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in work}
    order = random.Random(0)  # noqa: S311  (no secret)
    for _ in range(ROUNDS):
        for name in order.sample(list(work), len(work)):
            began = time.process_time()
            work[name]()
            times[name].append(time.process_time() - began)
    medians = {name: statistics.median(found) for name, found in times.items()}
    plain, bound = medians["plain"], medians["plain"] + medians["the teacher alone"]
    claims = {
        f"answers kept cost at most {KEPT} times the plain epoch": max(
            medians["soft targets, kept"], medians["logits, kept"]
        )
        <= KEPT * plain,
        "asked anew, the epoch costs at most the plain one and a forward pass of the teacher": (
            medians["soft targets, anew"] <= NOISE * bound
        ),
    }
    quartiles = {name: statistics.quantiles(found, n=4) for name, found in times.items()}
    rows = [
        [name, f"{value:.3f}", f"{quartiles[name][0]:.3f} to {quartiles[name][2]:.3f}", f"{value / plain:.3f}"]
        for name, value in medians.items()
    ]
    text = f"""# What a teacher costs a fine-tuning

Seconds of CPU for an epoch of {SAMPLES} pictures of 3x32x32 in batches of {BATCH}, one thread, median of {ROUNDS}
rounds: a ResNet-20 of half the channels, taught by a whole one.

{table(["way", "seconds", "quartiles", "times the plain epoch"], rows)}

{table(["goal", "reached"], [[claim, "yes" if held else "no"] for claim, held in claims.items()])}
"""
    publish("distill_overhead", {"seconds": times, "medians": medians, "claims": claims}, text)


if __name__ == "__main__":
    main()
