"""The initialisation of composite layers (survey 21): ten of them without normalisation, on the digits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from _common import CACHE, Ledger, claims_table, interval, publish, shown, table, unseen
from karui.data import load_data
from karui.errors import TrainingError
from karui.layers.composite import CompositeConv, low_rank_parts
from karui.measuring import evaluate
from karui.model import Classification, Model
from karui.technique import Bench
from karui.train import SGD, Cosine, Training

SEEDS, EPOCHS, RATES = 5, 10, (0.005, 0.02, 0.08)
RULES = ("composite", "He for each group")


def network(rule: str, seed: int) -> Model:
    """Ten layers of 16 filters, a quarter of them 3x3, under each rule."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for depth in range(10):
        layer = CompositeConv(16 if depth else 1, low_rank_parts((3, 3), 16, full=0.25))
        for conv in layer.convs if rule != "composite" else []:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # pyright: ignore[reportArgumentType]
        layers += [layer, nn.ReLU(), *([nn.MaxPool2d(2)] if depth in (2, 5) else [])]
    net = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return Model(net.eval(), example=(torch.zeros(2, 1, 8, 8),), task=Classification())


def accuracy(rule: str, rate: float, seed: int) -> float:
    """Percent of the test digits; chance where the training diverges."""
    data = load_data("digits")
    optimizer = SGD(lr=rate, weight_decay=0.0)
    training = Training(epochs=EPOCHS, batch_size=32, optimizer=optimizer, schedule=Cosine())
    bench = Bench(train=data.train, validation=data.validation, test=data.test, training=training, seed=seed)
    try:
        return 100 * evaluate(bench.fit(network(rule, seed)), data.test).value
    except TrainingError:
        return 10.0


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    rules = [
        f"digits, ten layers without normalisation, {SEEDS} seeds, {rule}: accuracy "
        + ", ".join(f"{shown(row[rule])} % at a rate of {rate}" for rate, row in told["rates"].items())
        for rule in RULES
    ]
    return {"low_rank_filters": rules + unseen(told["claims"])}


def main() -> None:
    torch.set_num_threads(1)
    ledger = Ledger(CACHE / "composite_init.json")
    rates: dict[str, Any] = {}
    for rate in RATES:
        rates[str(rate)] = {}
        for rule in RULES:
            scores = [
                ledger.once(f"{rule} {rate} {seed}", lambda s=seed, q=rule, r=rate: accuracy(q, r, s))
                for seed in range(SEEDS)
            ]
            rates[str(rate)][rule] = interval(scores)
    fast = rates[str(RATES[-1])]
    best = {rule: max((row[rule] for row in rates.values()), key=lambda told: told["mean"]) for rule in RULES}
    claims = {
        f"He for each group needs a smaller rate: at {RATES[-1]} it stays at chance, the composite rule does not": (
            max(fast[RULES[1]]["values"]) < 20 < fast[RULES[0]]["mean"]
        ),
        "the composite rule better at the best rate of each, beyond the intervals": (
            best[RULES[0]]["low"] > best[RULES[1]]["high"]
        ),
    }
    rows = [[rate, *(shown(row[rule]) for rule in RULES)] for rate, row in rates.items()]
    text = "\n\n".join(
        [
            "# Initialisation of composite layers (21)",
            (
                f"Digits, ten layers of 16 filters (a quarter 3x3) without normalisation, SGD, {EPOCHS} epochs, "
                f"{SEEDS} seeds. A training that diverges counts as chance, 10 %."
            ),
            table(["rate", *(f"{rule}, % [95 %]" for rule in RULES)], rows),
            claims_table(claims),
        ]
    )
    values = {"rates": rates, "claims": claims}
    publish("composite_init", values, text, measured(values))


if __name__ == "__main__":
    main()
