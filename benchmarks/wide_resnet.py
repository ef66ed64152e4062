"""Wide residual networks (survey 7): wide and shallow against thin and deep, and wider against narrower.

A small part of CIFAR-10 (32 pixels), three seeds. Time per multiply-accumulate is measured for inference in ONNX
Runtime and for a training step in torch, the two networks in turns.
"""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch.nn import functional

from _common import CACHE, Ledger, cifar10, claims_table, interval, publish, runs_table, shown, table, unseen
from karui.architectures import WideResNet
from karui.data import Splits
from karui.measuring import Clock, count, evaluate
from karui.measuring.engines import OnnxRuntime
from karui.model import Model
from karui.technique import Bench
from karui.train import SGD, Training

SEEDS, PICTURES, EPOCHS = 3, 3000, 6
NETWORKS = ((10, 1), (10, 2), (10, 4), (22, 1))
ROUNDS = 15


def bench(data: Splits) -> Bench:
    training = Training(batch_size=64, optimizer=SGD(lr=0.1))
    return Bench(
        train=data.train,
        validation=data.validation,
        test=data.test,
        training=training,
        checkpoints=CACHE / "wide_resnet",
    )


def build(depth: int, width: int, data: Splits) -> Model:
    return WideResNet(depth=depth, width=width, epochs=0).apply(None, bench(data))


def trained(ledger: Ledger, depth: int, width: int, data: Splits) -> dict[str, Any]:
    """Test accuracy over the seeds, with the counts."""
    name = f"WRN-{depth}-{width}"

    def accuracy(seed: int) -> float:
        model = WideResNet(depth=depth, width=width, epochs=EPOCHS).apply(None, replace(bench(data), seed=seed))
        return 100 * evaluate(model, data.test).value

    key = f"{name} {PICTURES} x {EPOCHS}"
    scores = [ledger.once(f"{key} seed {seed}", lambda seed=seed: accuracy(seed)) for seed in range(SEEDS)]
    told = count(build(depth, width, data))
    return {"network": name, "parameters": told.parameters, "macs": told.macs, "accuracy": interval(scores)}


def per_mac(ledger: Ledger, data: Splits) -> dict[str, dict[str, float]]:
    """Processor nanoseconds for each multiply-accumulate of a forward pass, thin and wide, medians of shared rounds."""
    pair = {"thin": build(22, 1, data), "wide": build(10, 2, data)}
    work = {name: count(model).macs for name, model in pair.items()}

    def inference() -> dict[str, dict[str, float]]:
        clock = Clock(threads=(1,), engines=(OnnxRuntime(),), cpu_time=True, rounds=ROUNDS)
        told: dict[str, dict[str, float]] = {}
        for timing in clock.time(pair).times:
            row = told.setdefault(f"inference, batch {timing.batch}", {})
            row[timing.contestant] = 1e9 * timing.median / timing.batch / work[timing.contestant]
        return told

    def training() -> dict[str, float]:
        samples: dict[str, list[float]] = {name: [] for name in pair}
        x, y = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
        for _ in range(ROUNDS):
            for name, model in pair.items():
                model.module.train()
                started = time.process_time()
                functional.cross_entropy(model.module(x), y).backward()
                samples[name].append(time.process_time() - started)
        return {name: 1e9 * median(seconds) / 64 / work[name] for name, seconds in samples.items()}

    return {**ledger.once("inference", inference), "training step, batch 64": ledger.once("training", training)}


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    lines = [
        f"CIFAR-10, {told['pictures']:,} pictures, {told['epochs']} epochs, {run['network']}: "
        f"{run['parameters']:,} parameters, {run['macs'] / 1e6:.2f} M MACs, accuracy {shown(run['accuracy'])} %"
        for run in told["runs"]
    ]
    times = [f"{name} {row['thin'] / row['wide']:.2f}" for name, row in told["nanoseconds per MAC"].items()]
    lines.append(f"time for each MAC, WRN-22-1 over WRN-10-2, one thread: {'; '.join(times)}")
    return {"wide_resnet": lines + unseen(told["claims"])}


def main() -> None:
    torch.set_num_threads(1)
    ledger, data = Ledger(CACHE / "wide_resnet.json"), cifar10(PICTURES)
    runs = [trained(ledger, depth, width, data) for depth, width in NETWORKS]
    clocked = per_mac(ledger, data)
    means = {run["network"]: run["accuracy"]["mean"] for run in runs}
    claims = {
        "WRN-10-2 within 1 point of the thin and deep WRN-22-1": means["WRN-10-2"] > means["WRN-22-1"] - 1,
        "wider is better: WRN-10-1 < 10-2 < 10-4": means["WRN-10-1"] < means["WRN-10-2"] < means["WRN-10-4"],
    }
    for name, row in clocked.items():
        claims[f"1.3 times less time for each MAC than WRN-22-1 ({name})"] = row["thin"] / row["wide"] >= 1.3
    values = {"pictures": PICTURES, "epochs": EPOCHS, "runs": runs, "nanoseconds per MAC": clocked, "claims": claims}
    publish("wide_resnet", values, _text(runs, clocked, claims), measured(values))


def _text(runs: list[dict[str, Any]], clocked: dict[str, dict[str, float]], claims: dict[str, bool]) -> str:
    speed = [
        [name, f"{row['thin']:.3f}", f"{row['wide']:.3f}", f"{row['thin'] / row['wide']:.2f}"]
        for name, row in clocked.items()
    ]
    parts = [
        "# Wide residual networks (7)",
        f"CIFAR-10, {PICTURES:,} training pictures, {EPOCHS} epochs. Means of {SEEDS} seeds.",
        runs_table(runs),
        f"Processor nanoseconds for each MAC of a forward pass, one thread, medians of {ROUNDS} rounds in turns:",
        table(["", "WRN-22-1", "WRN-10-2", "ratio"], speed),
        claims_table(claims),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
