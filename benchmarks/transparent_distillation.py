"""Transparent distillation (40): students that a person can read, of networks on three real tables, five splits each.

Each student beside the same one taught by labels or true values, and beside the network. Everything is measured on the
third of each table that is held out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from torch.utils.data import TensorDataset

from _common import CACHE, Ledger, claims_table, interval, publish, table, unseen
from karui.architectures.perceptron import perceptron
from karui.distill import TransparentDistillation
from karui.distill.comparison import compare
from karui.model import Classification, Model, Regression
from karui.technique import Bench
from karui.train import Adam, Constant, Training

SPLITS, ROUNDS, BAGS, BINS = 5, 100, 4, 32
GA2M = TransparentDistillation(rounds=ROUNDS, bags=BAGS, bins=BINS)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of numbers and the network that learns it.

    Settings:
        load: of scikit-learn.
        passes: of the network's training.
        students: by name.
        classes: how many; 0 for a regression.
    """

    load: Callable[..., Any]
    passes: int
    students: dict[str, TransparentDistillation]
    classes: int = 0


ADDITIVE = {"additive, no pairs": replace(GA2M, pairs=0), "additive, 5 pairs": replace(GA2M, pairs=5)}
TREES = {
    "boosted trees": replace(GA2M, student="boosted_trees"),
    "one tree": replace(GA2M, student="tree"),
}
TABLES = {
    "breast cancer": Table(load=load_breast_cancer, passes=20, students=ADDITIVE, classes=2),
    "wine": Table(load=load_wine, passes=60, students=ADDITIVE, classes=3),
    "diabetes": Table(load=load_diabetes, passes=60, students=ADDITIVE | TREES),
}


def data_of(one: Table) -> TensorDataset:
    x, y = one.load(return_X_y=True)
    inputs = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)
    targets = torch.tensor(y) if one.classes else torch.tensor((y - y.mean()) / y.std(), dtype=torch.float32)
    return TensorDataset(inputs, targets)


def teacher(one: Table, data: TensorDataset) -> Callable[[Any, int], Model]:
    """A perceptron of 32 units, trained on a split."""
    example = (data.tensors[0][:2],)
    training = Training(
        epochs=one.passes, batch_size=32, optimizer=Adam(lr=2e-3, weight_decay=1e-3), schedule=Constant()
    )

    def teach(train: Any, seed: int) -> Model:
        torch.manual_seed(seed)
        net = perceptron((example[0].shape[1], 32, one.classes or 1))
        if not one.classes:
            net.append(torch.nn.Flatten(0))
        task = Classification() if one.classes else Regression()
        bench = Bench(train=train, validation=train, training=training, seed=seed)
        return bench.fit(Model(net, example=example, task=task))

    return teach


def compared(one: Table, technique: TransparentDistillation) -> dict[str, Any]:
    data = data_of(one)
    found = compare(technique, teacher(one, data), data, splits=SPLITS)
    told = {spread.name: interval(spread.values) for spread in found.spreads}
    return told | {pair.name: interval(pair.values) for pair in found.paired}


def claims_of(rows: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """What the section asks, and what the authors hold to be promising and what not yet."""
    told: dict[str, bool] = {}
    for name in ("breast cancer", "wine"):
        best = rows[f"{name}, additive, 5 pairs"]
        told |= {
            f"{name}: fidelity (R2 on logits) of the additive student 0.8 at least": best["distilled fidelity R2"][
                "mean"
            ]
            >= 0.8,
            f"{name}: 0.05 above the same student taught by labels, beyond chance": best[
                "fidelity R2, distilled - direct"
            ]["low"]
            >= 0.05,
            f"{name}: AUC within 0.02 of the network's": abs(best["accuracy AUC, distilled - network"]["mean"]) <= 0.02,
        }
    additive, trees = (rows[f"diabetes, {student}"] for student in ("additive, 5 pairs", "boosted trees"))
    told["diabetes: fidelity of the additive student 0.8 at least"] = additive["distilled fidelity R2"]["mean"] >= 0.8
    told["diabetes: taught by the network no worse (RMSE) than by the true values"] = (
        additive["error RMSE, distilled - direct"]["mean"] <= 0
    )
    told["diabetes: boosted trees truer to the network than the additive student, on average"] = (
        trees["distilled fidelity R2"]["mean"] > additive["distilled fidelity R2"]["mean"]
    )
    return told


def fine(told: dict[str, Any] | None) -> str:
    """Three digits, for numbers near 1."""
    return "" if told is None else f"{told['mean']:.3f} [{told['low']:.3f}, {told['high']:.3f}]"


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    lines = []
    for name in TABLES:
        row = told["rows"][f"{name}, additive, 5 pairs"]
        lines.append(
            f"{name}, {SPLITS} splits: fidelity (R2) of an additive student {fine(row['distilled fidelity R2'])}, of "
            f"the same taught without the network {fine(row['direct fidelity R2'])}"
        )
    return {"transparent_distillation": lines + unseen(told["claims"])}


def main() -> None:
    torch.set_num_threads(1)
    ledger = Ledger(CACHE / "transparent_distillation.json")
    rows = {
        f"{name}, {student}": ledger.once(f"{name}, {student}", lambda one=one, t=technique: compared(one, t))
        for name, one in TABLES.items()
        for student, technique in one.students.items()
    }
    claims = claims_of(rows)
    quality = ("accuracy AUC", "error RMSE")
    body = []
    for name, row in rows.items():
        what = quality[0] if f"distilled {quality[0]}" in row else quality[1]
        body.append(
            [
                name,
                *(fine(row[f"{way} fidelity R2"]) for way in ("distilled", "direct")),
                fine(row["fidelity R2, distilled - direct"]),
                *(fine(row[f"{way} {what}"]) for way in ("distilled", "direct", "network")),
            ]
        )
    head = ["table, student", "fidelity", "fidelity of the direct one", "difference", "quality", "direct", "network"]
    text = f"""# Transparent distillation (40)

Perceptrons of 32 units teach additive students ({ROUNDS} rounds, {BAGS} bags, {BINS} bins) and trees, {SPLITS} splits
of each table, all measured on the third that is held out: mean and 95 % interval. Fidelity is R2 of the student's
scores on the network's. A direct student is the same one, taught by labels or true values. Quality is the AUC of
classifiers, and the root mean squared error (in deviations of the target) of the regression.

{table(head, body)}

{claims_table(claims)}
"""
    values = {"rows": rows, "claims": claims}
    publish("transparent_distillation", values, text, measured(values))


if __name__ == "__main__":
    main()
