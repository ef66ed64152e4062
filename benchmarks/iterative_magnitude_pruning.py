"""Train-prune-retrain (63) on the digits, five seeds: criterion against chance, rounds, penalties, bytes, time.

The one-shot arm is also given as many passes as all rounds together, which the paper does not do.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from _common import CACHE, Ledger, claims_table, interval, publish, shown, table, unseen
from _mlp import accuracy, bench_of, mlp
from karui.artifact import save
from karui.data import Splits, load_data
from karui.measuring import Clock, OnnxRuntime, compare
from karui.model import Model
from karui.sparsify import MagnitudePruning
from karui.technique import Bench
from karui.train import Adam
from karui.train.masks import MaskKeeper, masks_by_chance

SEEDS, KEEPS, RATE, EPOCHS, LR = 5, (0.15, 0.08, 0.05), 0.3, 10, 3e-3
ROUNDS = {0.15: 9, 0.08: 11, 0.05: 13}  # about a fifth of the remaining weights in each


def dense(digits: Splits, seed: int) -> tuple[Model, Bench]:
    bench = bench_of(digits, 30, seed, lr=LR)
    return bench.fit(mlp(64, 100, 50, 10, seed=seed)), bench


def arms(digits: Splits, seed: int) -> dict[str, float]:
    """Accuracy of every arm at every share kept."""
    model, bench = dense(digits, seed)
    slower = replace(bench, training=replace(bench.training, optimizer=Adam(lr=RATE * LR)))
    told = {"dense": accuracy(model, digits)}
    for keep in KEEPS:
        once = MagnitudePruning(keep=keep, rounds=1, epochs=EPOCHS, rate=RATE, dead=False)
        chance = MaskKeeper(masks_by_chance(model.module, keep, seed))
        made = {
            "pruned, not retrained": replace(once, epochs=0).apply(model, bench),
            "one-shot": once.apply(model, bench),
            "one-shot, as many passes as all rounds": replace(once, epochs=EPOCHS * ROUNDS[keep]).apply(model, bench),
            "rounds": replace(once, rounds=ROUNDS[keep]).apply(model, bench),
            "random": slower.fit(model, epochs=EPOCHS, influence=chance),
        }
        told |= {f"{keep}: {name}": accuracy(sparse, digits) for name, sparse in made.items()}
    return told


def penalties(digits: Splits, seed: int) -> dict[str, float]:
    """Trained under either penalty, a fifth kept, before and after retraining."""
    told = {}
    bench = bench_of(digits, 30, seed, lr=LR)
    for name, penalty in (("L1", {"l1": 3e-4}), ("L2", {"l2": 1e-3})):
        technique = MagnitudePruning(keep=1.0, learn=30, rounds=1, epochs=0, rate=RATE, dead=False, **penalty)
        learned = technique.apply(mlp(64, 100, 50, 10, seed=seed), bench)
        pruning = replace(technique, keep=0.2, learn=0)
        told[f"{name} before"] = accuracy(pruning.apply(learned, bench), digits)
        told[f"{name} after"] = accuracy(replace(pruning, epochs=EPOCHS).apply(learned, bench), digits)
    return told


def storage(digits: Splits) -> dict[str, Any]:
    """Bytes of the real files, and time in ONNX Runtime, of a large network at a tenth of its weights."""
    bench = bench_of(digits, 10, 0, lr=1e-3)
    model = bench.fit(mlp(64, 1000, 1000, 10, seed=0))
    sparse = MagnitudePruning(keep=0.1, rounds=2, epochs=5, dead=False).apply(model, bench)
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, value in (("dense", model), ("sparse", sparse)):
            save(value, Path(folder) / name, onnx=False)
            sizes[name] = (Path(folder) / name / "model.safetensors").stat().st_size
    clock = Clock(batches=(1, 64), threads=(1,), engines=(OnnxRuntime(),))
    ratios = compare(model, sparse, clock=clock).ratios
    return {"bytes": sizes, "ratios": [str(ratio) for ratio in ratios]}


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    arms, stored = told["arms"], told["storage"]
    scores = [f"{name} {shown(arms[f'0.08: {name}'])}" for name in ("one-shot", "rounds", "random")]
    longer = shown(arms["0.08: one-shot, as many passes as all rounds"])
    time = next(ratio for ratio in stored["ratios"] if "batch 1, 1 thread" in ratio).partition(": ")[2]
    lines = [
        (
            f"digits, 64-100-50-10, 5 seeds, 8 % of the weights kept: accuracy dense {shown(arms['dense'])}, "
            f"{', '.join(scores)}, one-shot with as many passes as all rounds {longer} %"
        ),
        (
            f"digits, 64-1000-1000-10, a tenth kept: weights file {stored['bytes']['dense']:,} to "
            f"{stored['bytes']['sparse']:,} bytes; ONNX Runtime, batch 1, one thread: {time}"
        ),
    ]
    return {"iterative_magnitude_pruning": lines + unseen(told["claims"])}


def main() -> None:
    ledger, digits = Ledger(CACHE / "iterative_magnitude_pruning.json"), load_data("digits")
    runs = [ledger.once(f"arms, seed {s}", lambda s=s: arms(digits, s)) for s in range(SEEDS)]
    both = [ledger.once(f"penalties, seed {s}", lambda s=s: penalties(digits, s)) for s in range(SEEDS)]
    stored = ledger.once("storage", lambda: storage(digits))
    told = {name: interval([run[name] for run in runs]) for name in runs[0]}
    penalised = {name: interval([run[name] for run in both]) for name in both[0]}
    mean = {name: value["mean"] for name, value in (told | penalised).items()}
    claims = {
        "15 % kept: 15 points better than as many random connections": (
            mean["0.15: one-shot"] - mean["0.15: random"] >= 15
        ),
        "8 % kept: rounds are a point better than one shot": mean["0.08: rounds"] - mean["0.08: one-shot"] >= 1,
        "8 % kept: rounds are better than one shot with as many passes": (
            mean["0.08: rounds"] > mean["0.08: one-shot, as many passes as all rounds"]
        ),
        "L1 is better before retraining": mean["L1 before"] > mean["L2 before"],
        "L2 is no worse than 0.3 points after it": mean["L2 after"] >= mean["L1 after"] - 0.3,
    }
    names = list(dict.fromkeys(name.partition(": ")[2] for name in told if ": " in name))
    rows = [[name, *(shown(told[f"{keep}: {name}"]) for keep in KEEPS)] for name in names]
    text = f"""# Train, prune, retrain (63)

Digits, 64-100-50-10, test accuracy in percent, mean and 95 % interval of {SEEDS} seeds; dense {shown(told["dense"])}.

{table(["connections", *(f"{keep:.0%} kept" for keep in KEEPS)], rows)}

Trained under a penalty, 20 % kept:

{table(["penalty", "accuracy"], [[name, shown(value)] for name, value in penalised.items()])}

{claims_table(claims)}

64-1000-1000-10, a tenth kept: {stored["bytes"]["dense"]:,} bytes dense, {stored["bytes"]["sparse"]:,} sparse.
Dense over sparse: {"; ".join(stored["ratios"])}.
"""
    values = {"arms": told, "penalties": penalised, "storage": stored, "claims": claims}
    publish("iterative_magnitude_pruning", values, text, measured(values))


if __name__ == "__main__":
    main()
