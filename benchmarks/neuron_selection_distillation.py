"""Neuron selection (32): faces of people that nobody was taught, and pairs of digits as a hundred classes.

Faces: neurons of the teacher itself and students of selected, random and all neurons, five seeds. A hundred classes:
two digits side by side, of which eighty pairs are taught; the student of neurons and the one of soft targets after
more and more passes, judged on the twenty others, three seeds.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import TensorDataset

from _common import CACHE, Ledger, apart, by_name, claims_table, mnist, publish, shown, table, unseen
from _distill_arms import Lesson
from _distill_tasks import faces, kept, verified
from distillation_table import FOLDER
from karui.architectures.perceptron import perceptron
from karui.data import tensors_of
from karui.distill import KnowledgeDistillation, NeuronSelection
from karui.distill._selection import select_neurons, verification_accuracy
from karui.distill.neurons import last_hidden
from karui.model import Classification, Model
from karui.technique import Bench
from karui.train import Adam, Constant, Training
from karui.train.guide import Guide

SEEDS, PAIRED_SEEDS, DRAWS, NUMBER, FEW = 5, 3, 10, 24, 8
PASSES = (1, 2, 4, 8, 16)
TAUGHT, PICTURES = 80, 4000
SELECTED, RANDOM = f"{FEW} selected of the teacher's", f"{FEW} random of the teacher's"


def passes_of(number: int) -> str:
    """So many passes, in words."""
    return f"{number} pass" if number == 1 else f"{number} passes"


def own_neurons(lesson: Lesson) -> dict[str, float]:
    """Pairs told rightly by selected neurons of the teacher, by random ones (the mean of draws), and by all."""
    x, people = lesson.bench.test.tensors
    layer, seed = last_hidden(lesson.teacher), lesson.bench.seed
    with torch.no_grad():
        values = Guide(lesson.teacher, (layer,))((x,))[1][layer].relu()

    def right(chosen: torch.Tensor) -> float:
        return 100 * verification_accuracy(values[:, chosen], people, pairs=4000, seed=seed)

    draw = torch.Generator().manual_seed(seed)
    units = values.shape[1]
    return {
        SELECTED: right(select_neurons(lesson.teacher, layer, lesson.bench.validation, FEW, seed=seed)),
        RANDOM: mean(right(torch.randperm(units, generator=draw)[:FEW]) for _ in range(DRAWS)),
        "all of the teacher's": right(torch.arange(units)),
    }


def of_faces(seed: int) -> dict[str, float]:
    lesson = faces().lesson(seed, FOLDER)
    told = own_neurons(lesson)
    neurons = NeuronSelection(teacher=lesson.teacher, number=NUMBER, epochs=lesson.bench.training.epochs)
    students = {
        "student of selected neurons": neurons,
        "student of random neurons": replace(neurons, by="random"),
        "student of all neurons": replace(neurons, by="all", number=None),
        "student of soft targets": KnowledgeDistillation(
            teacher=lesson.teacher, epochs=neurons.epochs, remember=len(lesson.bench.train)
        ),
    }
    return told | {name: verified(step.apply(lesson.student, lesson.bench), lesson) for name, step in students.items()}


def pairs_of_digits(seed: int) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Two digits side by side, changed in light: to train on, to judge neurons by, and the classes not taught."""
    splits = mnist(6000)
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(100, generator=draw)
    names = torch.full((100,), -1)
    names[order[:TAUGHT]] = torch.arange(TAUGHT)

    def made(part: Any, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = tensors_of(part)
        small = functional.avg_pool2d(x, 2)
        left, right = (torch.randint(len(x), (number,), generator=draw) for _ in range(2))
        light = 0.6 + 0.8 * torch.rand(number, 1, 1, 1, generator=draw)
        noise = 0.2 * torch.randn(number, 1, 14, 28, generator=draw)
        return torch.cat([small[left], small[right]], 3) * light + noise, 10 * y[left] + y[right]

    x, classes = made(splits.train, 2 * PICTURES)
    known = names[classes] >= 0
    taught = TensorDataset(x[known][:PICTURES], names[classes[known][:PICTURES]])
    x, classes = made(splits.validation, 1500)
    held = TensorDataset(x[names[classes] >= 0], names[classes[names[classes] >= 0]])
    x, classes = made(splits.test, 6000)
    others = TensorDataset(x[names[classes] < 0], classes[names[classes] < 0])
    return taught, held, others


def of_pairs(seed: int) -> dict[str, float]:
    """Both kinds of student after so many passes."""
    taught, held, others = pairs_of_digits(seed)
    training = Training(batch_size=64, optimizer=Adam(lr=1e-3), schedule=Constant())
    bench = Bench(train=taught, validation=held, test=others, training=training, seed=seed)

    def net(start: int, *hidden: int) -> Model:
        torch.manual_seed(start)
        return Model(perceptron((392, *hidden, TAUGHT)), example=(torch.zeros(1, 1, 14, 28),), task=Classification())

    fresh = net(100 + seed, 256, 128)
    teacher = kept(CACHE / "neuron_selection", f"pairs-{seed}", lambda: bench.fit(fresh, epochs=15), fresh)
    lesson = Lesson(student=net(seed, 48, NUMBER), teacher=teacher, bench=bench)
    told = {"the teacher": verified(teacher, lesson)}
    for passes in PASSES:
        for name, step in (
            ("neurons", NeuronSelection(teacher=teacher, number=NUMBER, epochs=passes)),
            ("soft targets", KnowledgeDistillation(teacher=teacher, epochs=passes)),
        ):
            told[f"{name}, {passes_of(passes)}"] = verified(step.apply(lesson.student, bench), lesson)
    return told


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    face, pair = told["faces"], told["pairs"]
    last = PASSES[-1]
    lines = [
        (
            f"ORL faces, {SEEDS} seeds, pairs of people not taught told rightly: by {FEW} neurons of the teacher, "
            f"selected {shown(face[SELECTED])}, random {shown(face[RANDOM])} %"
        ),
        (
            f"students of {NUMBER} neurons: selected {shown(face['student of selected neurons'])}, random "
            f"{shown(face['student of random neurons'])}, of all {shown(face['student of all neurons'])}, of soft "
            f"targets {shown(face['student of soft targets'])} %"
        ),
        (
            f"pairs of digits, {TAUGHT} classes: after 1 pass a student of neurons {shown(pair['neurons, 1 pass'])}, "
            f"of soft targets {shown(pair['soft targets, 1 pass'])}; after {last} "
            f"{shown(pair[f'neurons, {last} passes'])} and {shown(pair[f'soft targets, {last} passes'])} %"
        ),
    ]
    return {"neuron_selection_distillation": lines + unseen(told["claims"])}


def main() -> None:
    torch.set_num_threads(1)
    ledger = Ledger(CACHE / "neuron_selection_distillation.json")
    face_runs = [ledger.once(f"faces, seed {s}", lambda s=s: of_faces(s)) for s in range(SEEDS)]
    pair_runs = [ledger.once(f"pairs, seed {s}", lambda s=s: of_pairs(s)) for s in range(PAIRED_SEEDS)]
    face, pair = by_name(face_runs), by_name(pair_runs)
    student = "student of selected neurons"
    gains = {
        "selected over random, the teacher's own": apart(face_runs, SELECTED, RANDOM),
        "students, selected over random": apart(face_runs, student, "student of random neurons"),
        "students, selected over all": apart(face_runs, student, "student of all neurons"),
        "students, selected over soft targets": apart(face_runs, student, "student of soft targets"),
        **{
            f"pairs of digits, {passes_of(n)}: neurons over soft targets": apart(
                pair_runs, f"neurons, {passes_of(n)}", f"soft targets, {passes_of(n)}"
            )
            for n in PASSES
        },
    }
    first = gains[f"pairs of digits, {passes_of(PASSES[0])}: neurons over soft targets"]
    claims = {
        "neurons of the teacher: selected a point better than random, on average": gains[
            "selected over random, the teacher's own"
        ]["mean"]
        >= 1,
        "students: selected a point better than random, on average": gains["students, selected over random"]["mean"]
        >= 1,
        "students: selected better than random, beyond chance": gains["students, selected over random"]["low"] > 0,
        "students: selected no worse than all, on average": gains["students, selected over all"]["mean"] >= 0,
        f"{TAUGHT} classes: soft targets converge slower (worse after one pass, beyond chance)": first["low"] > 0,
    }
    text = f"""# Neuron selection (32)

ORL faces of 28x23: the teacher knows 25 people, 4,000 pairs of changed pictures of the 15 others judge; percent told
rightly, {SEEDS} seeds. Random neurons of the teacher are the mean of {DRAWS} draws. Students give {NUMBER} neurons.

{table(["features", "pairs right, %"], [[name, shown(one)] for name, one in face.items()])}

Pairs of MNIST digits of 14 pixels side by side, changed in light and noise: {TAUGHT} of the 100 classes are taught on
{PICTURES:,} pictures, pairs of pictures of the 20 others judge, {PAIRED_SEEDS} seeds.

{table(["student, passes", "pairs right, %"], [[name, shown(one)] for name, one in pair.items()])}

{table(["difference", "points, seed by seed"], [[name, shown(one)] for name, one in gains.items()])}

{claims_table(claims)}
"""
    values = {"faces": face, "pairs": pair, "gains": gains, "claims": claims}
    publish("neuron_selection_distillation", values, text, measured(values))


if __name__ == "__main__":
    main()
