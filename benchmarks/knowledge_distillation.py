"""Knowledge distillation (30): a class never seen, few pictures, an ensemble, on the digits; and MNIST at two sizes.

Every number is of the test split. The digits parts are the means of five seeds, the MNIST part of three (10,000 of the
training pictures, so no error here compares with a published one).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from _common import CACHE, Ledger, by_name, claims_table, interval, mnist, publish, shown, table, unseen
from _mlp import accuracy, bench_of, few_of, mlp
from karui.data import Splits, load_data, targets_of
from karui.data.augment import RandomCrop
from karui.data.splits import take
from karui.distill import KnowledgeDistillation
from karui.measuring import sample_scores
from karui.model import Classification, Model

SEEDS, MNIST_SEEDS = 5, 3
MNIST_PICTURES, MNIST_EPOCHS = 10_000, 20


def missing_class(digits: Splits, seed: int) -> dict[str, dict[str, float]]:
    """No 3 in the transfer set: recall of threes before and after the bias is lifted, and the accuracy after."""
    seen = replace(digits, train=take(digits.train, (targets_of(digits.train) != 3).nonzero().flatten()))
    threes = targets_of(digits.test) == 3
    teacher = bench_of(digits, 40, seed).fit(mlp(64, 128, 128, 10, seed=100 + seed))
    bench, student = bench_of(seen, 60, seed), mlp(64, 64, 10, seed=seed)
    technique = KnowledgeDistillation(teacher=teacher, weight=1.0, epochs=60, remember=2000)
    arms = {
        "hard targets": replace(technique, weight=0.0),
        **{f"T = {t:g}": replace(technique, temperature=t) for t in (2.0, 4.0, 8.0)},
    }
    told = {"teacher": {"accuracy": accuracy(teacher, digits)}}
    for name, arm in arms.items():
        before, after = arm.apply(student, bench), replace(arm, missing=(3,)).apply(student, bench)
        recall = [100 * sample_scores(model, digits.test)[threes].mean().item() for model in (before, after)]
        told[name] = {"recall before": recall[0], "recall after": recall[1], "accuracy": accuracy(after, digits)}
    return told


def few_pictures(digits: Splits, seed: int) -> dict[str, float]:
    """100 transfer pictures, a teacher of two networks that saw all of them; full batches until converged."""
    teachers = tuple(bench_of(digits, 40, s).fit(mlp(64, 128, 128, 10, seed=100 + s)) for s in (2 * seed, 2 * seed + 1))
    bench, student = bench_of(few_of(digits, 100, seed), 1200, seed, batch=100), mlp(64, 32, 10, seed=seed)
    technique = KnowledgeDistillation(teacher=teachers, weight=1.0, epochs=1200, remember=100)
    soft = {f"T = {t:g}": replace(technique, temperature=t).apply(student, bench) for t in (2.0, 4.0)}
    return {name: accuracy(model, digits) for name, model in {"hard targets": bench.fit(student), **soft}.items()}


def ensemble(digits: Splits) -> dict[str, list[float]]:
    """Five CNNs and every student see the same 100 pictures."""
    seen = few_of(digits, 100, 0)
    members = tuple(bench_of(seen, 60, seed).fit(cnn(seed)) for seed in range(SEEDS))
    technique = KnowledgeDistillation(teacher=members, temperature=4.0, weight=0.9, epochs=400, remember=100)
    told: dict[str, list[float]] = {"members": [accuracy(member, digits) for member in members], "hard": [], "soft": []}
    for seed in range(SEEDS):
        bench, student = bench_of(seen, 400, seed), mlp(64, 16, 10, seed=seed)
        told["hard"].append(accuracy(bench.fit(student), digits))
        told["soft"].append(accuracy(technique.apply(student, bench), digits))
    return told


def cnn(seed: int) -> Model:
    torch.manual_seed(seed)
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)),
    )
    return Model(net, example=(torch.zeros(1, 1, 8, 8),), task=Classification())


def two_sizes(splits: Splits, seed: int) -> dict[str, float]:
    """784-1200-1200-10 with dropout and shifts by two pixels teaches 784-800-800-10, which has neither."""
    teacher_bench = bench_of(splits, MNIST_EPOCHS, seed, lr=1e-3, batch=128, augment=RandomCrop(2))
    teacher = teacher_bench.fit(mlp(784, 1200, 1200, 10, seed=100 + seed, dropout=0.5))
    bench, student = bench_of(splits, MNIST_EPOCHS, seed, lr=1e-3, batch=128), mlp(784, 800, 800, 10, seed=seed)
    technique = KnowledgeDistillation(
        teacher=teacher, temperature=20.0, weight=0.95, epochs=MNIST_EPOCHS, remember=MNIST_PICTURES
    )
    models = {"large net": teacher, "small net, hard targets": bench.fit(student)}
    models["small net, T = 20"] = technique.apply(student, bench)
    return {name: accuracy(model, splits) for name, model in models.items()}


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    missing, few, sizes = told["missing class"], told["few pictures"], told["mnist"]
    lost = {name: shown(missing[name]["recall after"]) for name in ("hard targets", "T = 8")}
    lines = [
        (
            "digits, no threes in the transfer set: recall of threes, % (after the bias is lifted): "
            f"hard targets {lost['hard targets']}, T = 8 {lost['T = 8']}"
        ),
        (
            f"digits, 100 transfer pictures: accuracy with hard targets {shown(few['hard targets'])}, "
            f"T = 4 {shown(few['T = 4'])} %"
        ),
        (
            f"MNIST, 784-800-800-10: accuracy with hard targets {shown(sizes['small net, hard targets'])}, taught by a "
            f"larger net {shown(sizes['small net, T = 20'])} %"
        ),
    ]
    return {"knowledge_distillation": lines + unseen(told["claims"])}


def main() -> None:
    ledger, digits = Ledger(CACHE / "knowledge_distillation.json"), load_data("digits")
    lost = [ledger.once(f"missing class, seed {s}", lambda s=s: missing_class(digits, s)) for s in range(SEEDS)]
    few = by_name([ledger.once(f"few pictures, seed {s}", lambda s=s: few_pictures(digits, s)) for s in range(SEEDS)])
    members = {name: interval(values) for name, values in ledger.once("ensemble", lambda: ensemble(digits)).items()}
    pictures = mnist(MNIST_PICTURES)
    sizes = by_name([ledger.once(f"mnist, seed {s}", lambda s=s: two_sizes(pictures, s)) for s in range(MNIST_SEEDS)])
    missing = {arm: by_name([run[arm] for run in lost]) for arm in lost[0]}
    soft, hard = missing["T = 8"], missing["hard targets"]
    claims = {
        "a class never seen: recall of 80 % and accuracy of 93 % from soft targets, after the bias is lifted": (
            soft["recall after"]["mean"] >= 80 and soft["accuracy"]["mean"] >= 93
        ),
        "hard targets stay below 40 % recall, whatever the bias": hard["recall after"]["mean"] < 40,
        "100 pictures: soft targets at T = 4 are 4 points better": few["T = 4"]["mean"] - few["hard targets"]["mean"]
        >= 4,
        "a distilled ensemble of five beats a single net on hard targets, on average": members["soft"]["mean"]
        > members["hard"]["mean"],
        "MNIST: the small net is better for what the large one tells it, on average": (
            sizes["small net, T = 20"]["mean"] > sizes["small net, hard targets"]["mean"]
        ),
    }
    columns = ("recall before", "recall after", "accuracy")
    text = f"""# Knowledge distillation (30)

Test accuracy in percent, mean and 95 % interval over the seeds.

Digits without threes in the transfer set; teacher {shown(missing["teacher"]["accuracy"])}:

{table(["student", *columns], [[a, *(shown(t[c]) for c in columns)] for a, t in missing.items() if a != "teacher"])}

100 transfer pictures of the digits, a teacher of two networks trained on all of them:

{table(["targets", "accuracy"], [[name, shown(told)] for name, told in few.items()])}

100 pictures of the digits for everybody, five CNNs taught into one 64-16-10 network:

{table(["network", "accuracy"], [[name, shown(told)] for name, told in members.items()])}

MNIST, {MNIST_PICTURES:,} pictures, {MNIST_EPOCHS} epochs for each network:

{table(["network", "accuracy"], [[name, shown(told)] for name, told in sizes.items()])}

{claims_table(claims)}
"""
    values = {"missing class": missing, "few pictures": few, "ensemble": members, "mnist": sizes, "claims": claims}
    publish("knowledge_distillation", values, text, measured(values))


if __name__ == "__main__":
    main()
