"""FitNets (33): a deep thin network that does not train from the start, and one that does, five seeds.

All arms have the same passes in all, those of the hint included.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from _common import CACHE, Ledger, apart, by_name, claims_table, publish, shown, table, unseen
from _mlp import accuracy, bench_of, mlp
from karui.data import Splits, load_data
from karui.distill import FitNets
from karui.model import Model
from karui.technique import Bench
from karui.train import SGD, Constant, Training

SEEDS, PASSES, HINT, WIDTH = 5, 24, 12, 16
STUDENTS = {"18 layers of 16": (18, "18"), "3 layers of 16": (3, "4")}
LABELS, SOFT, HINTED = "labels alone", "[30] without a hint", "hint, then [30]"


def small_start(*sizes: int, seed: int) -> Model:
    """Weights drawn with variance 1 / inputs: too small for many ReLUs in a row."""
    model = mlp(*sizes, seed=seed)
    for layer in model.module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
    return model


def bench_for(digits: Splits, seed: int) -> Bench:
    training = Training(epochs=PASSES, batch_size=32, optimizer=SGD(lr=0.02), schedule=Constant())
    return replace(bench_of(digits, PASSES, seed), training=training)


def arms(digits: Splits, depth: int, layer: str, seed: int) -> dict[str, float]:
    teacher = bench_of(digits, 20, seed).fit(small_start(64, 64, 64, 10, seed=100 + seed))
    bench, student = bench_for(digits, seed), small_start(64, *[WIDTH] * depth, 10, seed=seed)
    taught = FitNets(teacher=teacher, layer=layer, teacher_layer="2", hint_epochs=HINT, epochs=PASSES - HINT)
    made = {
        LABELS: bench.fit(student),
        SOFT: replace(taught, hint_epochs=0, epochs=PASSES).apply(student, bench),
        HINTED: taught.apply(student, bench),
    }
    return {"the teacher": accuracy(teacher, digits)} | {name: accuracy(model, digits) for name, model in made.items()}


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    lines = [
        f"digits, {name} (no normalisation, no shortcuts), {SEEDS} seeds, {PASSES} passes in all: accuracy with "
        + ", ".join(f"{arm} {shown(told['arms'][name][arm])}" for arm in (LABELS, SOFT, HINTED))
        + " %"
        for name in STUDENTS
    ]
    return {"fitnets_hint": lines + unseen(told["claims"])}


def main() -> None:
    torch.set_num_threads(1)
    ledger, digits = Ledger(CACHE / "fitnets_hint.json"), load_data("digits")
    runs = {
        name: [
            ledger.once(f"{name}, seed {s}", lambda d=depth, p=layer, s=s: arms(digits, d, p, s)) for s in range(SEEDS)
        ]
        for name, (depth, layer) in STUDENTS.items()
    }
    told = {name: by_name(found) for name, found in runs.items()}
    gains = {
        name: {"over labels": apart(found, HINTED, LABELS), "over [30]": apart(found, HINTED, SOFT)}
        for name, found in runs.items()
    }
    deep, easy = (gains[name] for name in STUDENTS)
    claims = {
        "deep and thin: 5 points better than labels and than [30] alone": min(d["mean"] for d in deep.values()) >= 5,
        "deep and thin: better than both beyond chance": min(d["low"] for d in deep.values()) > 0,
        "easily trained: the gain is small, below 2 points": max(d["mean"] for d in easy.values()) < 2,
    }
    rows = [[name, *(shown(told[student][name]) for student in told)] for name in next(iter(told.values()))]
    paired = [[f"hint {name}", *(shown(gain[name]) for gain in gains.values())] for name in deep]
    text = f"""# FitNets (33)

Digits. The teacher is a perceptron of 64 and 64 units; the hint is the output of its first hidden layer, the guided
layer lies in the middle of the student. Students of layers of {WIDTH} units, no normalisation, no shortcuts, weights
of variance 1 / inputs; SGD at 0.02, {PASSES} passes in every arm, of which the hint takes {HINT}. Test accuracy in
percent, mean and 95 % interval of {SEEDS} seeds.

{table(["arm", *told], rows)}

Differences in points, seed by seed:

{table(["difference", *told], paired)}

{claims_table(claims)}
"""
    values = {"arms": told, "gains": gains, "claims": claims}
    publish("fitnets_hint", values, text, measured(values))


if __name__ == "__main__":
    main()
