"""What a teacher costs a fine-tuning: its answers kept, in memory and on disk, and asked anew at each step.

Three students, from one whose step is little more than the calls of its operations to one that computes: a perceptron
of 32 units on 1,080 rows, an LSTM over 2,001 words, and a ResNet-20 of half the channels on pictures of 32x32. Each is
taught by a larger one, against the same fine-tuning on labels. Beside them the same by hand: the barest loop over the
data, on labels and with soft targets, whose answers are indexed by the numbers of samples: what the loss itself costs.
CPU time of an epoch, one process and one thread, all ways in each round in random order; ratios of medians.
Goals: with answers kept at most 1.15 times the plain epoch; asked anew at most the plain epoch and one forward pass of
the teacher over the data, with 5 % for noise.
"""

from __future__ import annotations

import copy
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from _common import publish, table
from karui.architectures.cifar_resnet import cifar_resnet
from karui.architectures.perceptron import perceptron
from karui.distill import KnowledgeDistillation
from karui.model import Classification, Model
from karui.technique import Bench
from karui.train import Adam, Constant, Training
from karui.train.teaching import Teachers

ROUNDS = 11
KEPT, NOISE = 1.15, 1.05
TEMPERATURE, WEIGHT, RATE = 4.0, 0.9, 1e-3
PLAIN, MEMORY, DISK, ANEW = "plain", "kept in memory", "kept on disk", "asked anew"
ALONE, HAND, HAND_KEPT = "the teacher alone", "by hand, plain", "by hand, kept"


class Words(nn.Module):
    """The next word after some, from the last state of an LSTM."""

    def __init__(self, words: int, units: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, units)
        self.states = nn.LSTM(units, units, batch_first=True)
        self.last = nn.Linear(units, words)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the next word, `[batch, words]`, of `[batch, length]` numbers of words."""
        return self.last(self.states(self.embedding(x))[0][:, -1])


@dataclass(frozen=True)
class Case:
    """A student and its teacher, data, batches, and the epochs that are timed together."""

    name: str
    student: nn.Module
    teacher: nn.Module
    inputs: Tensor
    labels: Tensor
    batch: int
    epochs: int


def cases() -> list[Case]:
    """The labels are drawn, since only time is measured."""
    torch.manual_seed(0)
    return [
        Case(
            "perceptron, 64-32-10",
            perceptron((64, 32, 10)),
            perceptron((64, 256, 128, 10)),
            torch.randn(1080, 64),
            torch.randint(10, (1080,)),
            batch=32,
            epochs=20,
        ),
        Case(
            "LSTM of 32 cells, 2,001 words",
            Words(2001, 32),
            Words(2001, 128),
            torch.randint(2001, (4096, 20)),
            torch.randint(2001, (4096,)),
            batch=128,
            epochs=4,
        ),
        Case(
            "ResNet-20, half the channels",
            cifar_resnet(20, width=0.5),
            cifar_resnet(20),
            torch.randn(512, 3, 32, 32),
            torch.randint(10, (512,)),
            batch=64,
            epochs=1,
        ),
    ]


def by_hand(case: Case, answers: Tensor | None) -> None:
    """The barest training; under soft targets where there are answers."""
    module = copy.deepcopy(case.student).train()
    optimizer = torch.optim.Adam(module.parameters(), lr=RATE)
    for _ in range(case.epochs):
        for index in torch.randperm(len(case.inputs)).split(case.batch):
            outputs = module(case.inputs[index])
            loss = functional.cross_entropy(outputs, case.labels[index])
            if answers is not None:
                soft = (answers[index] / TEMPERATURE).softmax(1) * (outputs / TEMPERATURE).log_softmax(1)
                loss = (1 - WEIGHT) * loss - WEIGHT * TEMPERATURE**2 * soft.sum(1).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def ways(case: Case, folder: Path) -> dict[str, Callable[[], Any]]:
    """Some epochs each. What is kept was asked before: further epochs of the same training are timed."""
    student, teacher = (
        Model(module.eval(), example=(case.inputs[:2],), task=Classification())
        for module in (case.student, case.teacher)
    )
    data = TensorDataset(case.inputs, case.labels)
    training = Training(epochs=case.epochs, batch_size=case.batch, optimizer=Adam(lr=RATE), schedule=Constant())
    bench = Bench(train=data, validation=data, training=training)
    kept = KnowledgeDistillation(teacher=teacher, temperature=TEMPERATURE, weight=WEIGHT)
    anew = replace(kept, remember=0).influence(student, bench)
    in_memory, on_disk = kept.influence(student, bench), kept.influence(student, replace(bench, checkpoints=folder))
    alone = Teachers((teacher,))
    with torch.no_grad():
        answers = teacher.module(case.inputs)
    return {
        PLAIN: lambda: bench.fit(student),
        MEMORY: lambda: bench.under(in_memory).fit(student),
        DISK: lambda: bench.under(on_disk).fit(student),
        ANEW: lambda: bench.under(anew).fit(student),
        ALONE: lambda: [alone((part,)) for _ in range(case.epochs) for part in case.inputs.split(case.batch)],
        HAND: lambda: by_hand(case, None),
        HAND_KEPT: lambda: by_hand(case, answers),
    }


def timed(case: Case) -> dict[str, list[float]]:
    """Seconds of an epoch of each way, in each round."""
    with tempfile.TemporaryDirectory() as folder:
        work = ways(case, Path(folder))
        for run in work.values():
            run()
        times: dict[str, list[float]] = {name: [] for name in work}
        order = random.Random(0)  # noqa: S311  (no secret)
        for _ in range(ROUNDS):
            for name in order.sample(list(work), len(work)):
                began = time.process_time()
                work[name]()
                times[name].append((time.process_time() - began) / case.epochs)
    return times


def told(case: Case, times: dict[str, list[float]]) -> tuple[str, dict[str, bool]]:
    """A case's section, and which goals it reaches."""
    medians = {name: statistics.median(found) for name, found in times.items()}
    plain = medians[PLAIN]
    claims = {
        f"answers kept in memory cost at most {KEPT} times the plain epoch": medians[MEMORY] <= KEPT * plain,
        f"answers kept on disk cost at most {KEPT} times the plain epoch": medians[DISK] <= KEPT * plain,
        "asked anew, the epoch costs at most the plain one and a forward pass of the teacher": (
            medians[ANEW] <= NOISE * (plain + medians[ALONE])
        ),
    }
    rows = []
    for name, found in times.items():
        low, _, high = (1000 * value for value in statistics.quantiles(found, n=4))
        against = medians[HAND if name in (HAND, HAND_KEPT) else PLAIN]
        ratio = f"{medians[name] / against:.2f}"
        rows.append([name, f"{1000 * medians[name]:.1f}", f"{low:.1f} to {high:.1f}", ratio])
    steps = -(-len(case.inputs) // case.batch)
    text = f"""## {case.name}

{len(case.inputs):,} samples in {steps} batches of {case.batch}.

{table(["way", "milliseconds", "quartiles", "times the plain epoch of its kind"], rows)}

{table(["goal", "reached"], [[claim, "yes" if held else "no"] for claim, held in claims.items()])}
"""
    return text, claims


def main() -> None:
    torch.set_num_threads(1)
    measured = {case.name: (case, timed(case)) for case in cases()}
    sections = {name: told(case, times) for name, (case, times) in measured.items()}
    text = f"""# What a teacher costs a fine-tuning

CPU time of an epoch, one thread, median of {ROUNDS} rounds; "by hand" is the barest loop over the same data, whose soft
loss indexes a table of all answers: what the loss itself costs there no way of keeping answers can save.

{chr(10).join(section for section, _ in sections.values())}"""
    values = {
        "seconds": {name: times for name, (_, times) in measured.items()},
        "claims": {name: claims for name, (_, claims) in sections.items()},
    }
    publish("distill_overhead", values, text)


if __name__ == "__main__":
    main()
