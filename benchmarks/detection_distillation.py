"""Detection distillation (35): digits on a cluttered canvas, a narrow detector alone and under a wide one, five seeds.

The teacher saw four times as many pictures. Every arm trains the same student for as many passes, but for the student
alone and soft classes, which have more passes too: they are [30] for a detector, and dear enough to stand beside all
three parts at their cost. mAP at an overlap of 0.5 on pictures of digits that no training saw; CPU seconds of each
training. The teacher whose boxes are noised is a control: what is drawn to it follows the noise, what is only bounded
by it does not.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean as mean_of
from typing import Any

import torch
from torch.utils.data import TensorDataset

from _common import CACHE, Ledger, claims_table, interval, publish, shown, table, unseen
from karui.data import load_data
from karui.distill.detection import DetectionDistillation
from karui.model import Model
from karui.technique import Bench
from karui.train import Adam, Training
from karui.train.guide import Guide

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "distill"))
from micro_detection import Drawn, Noised, detector, mean_precision, scenes

SEEDS, MANY, FEW, TEST = 5, 1200, 300, 300
SOFT, WHOLE, LONGER = "soft classes, background 1", "all three", 2
EPOCHS, TEACHER_EPOCHS, WIDTH, TEACHER_WIDTH = 40, 14, 8, 16


def bench_of(data: TensorDataset, seed: int, batch: int = 16) -> Bench:
    training = Training(batch_size=batch, optimizer=Adam(lr=5e-3))
    return Bench(train=data, validation=data, test=data, training=training, seed=seed)


def longer(arm: str) -> str:
    """The name of an arm that has more passes."""
    return f"{arm}, {LONGER} times as long"


def trained(make: Callable[[], Model], test: TensorDataset) -> dict[str, float]:
    """Score and CPU seconds of an arm."""
    began = time.process_time()
    model = make()
    seconds = time.process_time() - began
    return {"score": mean_precision(model, test), "seconds": seconds}


def arms(teacher: Model, student: Model, bench: Bench) -> dict[str, Callable[[], Model]]:
    noised = replace(teacher, module=Noised(teacher.module), lineage=())
    full = DetectionDistillation(teacher=teacher, epochs=EPOCHS)
    boxes, soft = (
        replace(full, teacher=noised, hard=1.0, hint=0.0),
        replace(full, bounded=0.0, hint=0.0, background=1.0),
    )
    return {
        "alone": lambda: bench.fit(student, epochs=EPOCHS),
        longer("alone"): lambda: bench.fit(student, epochs=LONGER * EPOCHS),
        SOFT: lambda: soft.apply(student, bench),
        longer(SOFT): lambda: replace(soft, epochs=LONGER * EPOCHS).apply(student, bench),
        "soft classes, background 1.5": lambda: replace(full, bounded=0.0, hint=0.0).apply(student, bench),
        "bounded boxes": lambda: replace(full, hard=1.0, hint=0.0).apply(student, bench),
        "hint": lambda: replace(full, hard=1.0, bounded=0.0).apply(student, bench),
        WHOLE: lambda: full.apply(student, bench),
        "boxes bounded by a noised teacher": lambda: boxes.apply(student, bench),
        "boxes drawn to a noised teacher": lambda: bench.fit(student, epochs=EPOCHS, influence=Drawn(Guide(noised))),
    }


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    line = "; ".join(f"{name} {shown(told['arms'][name])}" for name in ("alone", "hint", WHOLE))
    text = (
        f"micro detector, {told['pictures']} pictures, {SEEDS} seeds: mAP@0.5, %: {line}; teacher {told['teacher']:.1f}"
    )
    return {"detection_distillation": [text, *(beside(told, base) for base in BASES), *unseen(told["claims"])]}


BASES = {SOFT: "soft classes alone ([30] at temperature 1 and half the weight)", "alone": "the student alone"}


def beside(told: dict[str, Any], base: str) -> str:
    """All three parts against a base in as many passes, and in more passes, with what each costs."""
    parts = []
    for other in (base, longer(base)):
        pairs = zip(*(told["arms"][name]["values"] for name in (WHOLE, other)), strict=True)
        over = interval([a - b for a, b in pairs])
        cost = told["seconds"][other] / told["seconds"][WHOLE]
        word = "better" if over["low"] > 0 else "worse" if over["high"] < 0 else "not told apart"
        parts.append(f"{shown(over)} points where that costs {cost:.2f} of it ({word})")
    return f"all three over {BASES[base]}: {', '.join(parts)}"


def main() -> None:
    torch.set_num_threads(1)
    ledger = Ledger(CACHE / "detection_distillation.json")
    many, test = scenes(load_data("digits"), MANY, TEST)
    few = TensorDataset(*(tensor[:FEW] for tensor in many.tensors))
    teacher = bench_of(many, 0, 32).fit(detector(TEACHER_WIDTH), epochs=TEACHER_EPOCHS)
    best = ledger.once("teacher", lambda: mean_precision(teacher, test))
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in range(SEEDS):
        for name, make in arms(teacher, detector(WIDTH, seed=seed + 5), bench_of(few, seed)).items():
            run = ledger.once(f"{name}, seed {seed}", lambda make=make: trained(make, test))
            runs.setdefault(name, []).append(run)
    told = {name: interval([run["score"] for run in found]) for name, found in runs.items()}
    seconds = {name: mean_of([run["seconds"] for run in found]) for name, found in runs.items()}
    mean = {name: row["mean"] for name, row in told.items()}
    noised = mean["boxes bounded by a noised teacher"], mean["boxes drawn to a noised teacher"]
    claims = {
        "all three at least 2 points above the student alone": mean[WHOLE] >= mean["alone"] + 2,
        "all three above soft classes that cost more": mean[WHOLE] > mean[longer(SOFT)],
        "a background of 1.5 no worse than 1": mean["soft classes, background 1.5"] >= mean[SOFT],
        "bounded by a noised teacher no worse than drawn to it": noised[0] >= noised[1],
        "the hint above the student alone": mean["hint"] > mean["alone"],
    }
    values = {"pictures": FEW, "epochs": EPOCHS, "teacher": best, "arms": told, "seconds": seconds, "claims": claims}
    rows = [[name, shown(row), f"{seconds[name]:.1f}"] for name, row in told.items()]
    text = f"""# Detection distillation (35)

Digits of five classes on a cluttered canvas of 32 pixels: {FEW} pictures to train on ({MANY} for the teacher, which
reaches {best:.1f}), {TEST} to test. Student and teacher have the same three convolutions, {WIDTH} and {TEACHER_WIDTH}
wide at first. mAP at an overlap of 0.5 in percent, mean and 95 % interval of {SEEDS} seeds; {EPOCHS} passes each where
nothing else is said. Seconds are those of the CPU for a whole training, the teacher's passes included; the teacher is
asked once for each picture where only its answers are wanted, and in each pass where the hint looks inside.

{table(["arm", "mAP@0.5, % [95 %]", "CPU seconds"], rows)}

{" ".join(f"{line[0].upper()}{line[1:]}." for line in (beside(values, base) for base in BASES))}

{claims_table(claims)}

A hint without its adaptation layer needs equal channels, and has a test of its own (`tests/distill/test_detection.py`):
between detectors of one width it is better than one with the layer, which is not what the paper finds.
"""
    publish("detection_distillation", values, text, measured(values))


if __name__ == "__main__":
    main()
