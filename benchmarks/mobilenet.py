"""MobileNets (survey 4): what its paper claims, at a scale that two cores can train.

The paper trains on ImageNet at widths 1 to 0.25. Here: MNIST (28 pixels) for separable against dense layers, a small
part of CIFAR-10 (32 pixels) for widths and depth, with every width halved. Three seeds each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from _common import CACHE, Ledger, cifar10, claims_table, interval, mnist, publish, runs_table, shown, table, unseen
from karui.architectures import MobileNet
from karui.data import Splits
from karui.measuring import Clock, count, evaluate
from karui.measuring.clock import time_ratio
from karui.measuring.engines import OnnxRuntime
from karui.model import Model
from karui.technique import Bench
from karui.train import Adam, Training

SEEDS = 3
PLANS = {"mnist": (3000, 8), "cifar10": (3000, 6)}
WIDTHS = (0.5, 0.375, 0.25, 0.125)


def bench(data: Splits) -> Bench:
    training = Training(batch_size=32, optimizer=Adam(lr=5e-3))
    return Bench(
        train=data.train,
        validation=data.validation,
        test=data.test,
        training=training,
        checkpoints=CACHE / "mobilenet",
    )


def untrained(step: MobileNet, data: Splits) -> Model:
    return replace(step, epochs=0).apply(None, bench(data))


def trained(ledger: Ledger, step: MobileNet, data: Splits) -> dict[str, Any]:
    """Test accuracy over the seeds, with the counts."""
    name = f"{data.name} width {step.width}{' dense' * step.dense}{' shallow' * step.shallow}"
    step = replace(step, epochs=PLANS[data.name][1])

    def accuracy(seed: int) -> float:
        model = step.apply(None, replace(bench(data), seed=seed))
        return 100 * evaluate(model, data.test).value

    key = f"{name} {PLANS[data.name]}"
    scores = [ledger.once(f"{key} seed {seed}", lambda seed=seed: accuracy(seed)) for seed in range(SEEDS)]
    told = count(untrained(step, data))
    return {"network": name, "parameters": told.parameters, "macs": told.macs, "accuracy": interval(scores)}


def times(ledger: Ledger, data: Splits) -> dict[str, Any]:
    """Dense and separable, in turns in one run."""

    def measure() -> dict[str, Any]:
        clock = Clock(threads=(1,), engines=(OnnxRuntime(),), cpu_time=True)
        pair = {name: untrained(MobileNet(width=0.25, dense=name == "dense"), data) for name in ("dense", "separable")}
        timings = clock.time(pair)
        told = {}
        for dense, light in zip(timings.of("dense"), timings.of("separable"), strict=True):
            ratio = time_ratio(dense, light)
            told[f"batch {dense.batch}"] = {"dense": str(dense), "separable": str(light), "ratio": str(ratio)}
        return told

    return ledger.once(f"{data.name} times", measure)


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    lines = [
        f"{run['network']}: {run['parameters']:,} parameters, {run['macs'] / 1e6:.2f} M MACs, accuracy "
        f"{shown(run['accuracy'])} %"
        for run in told["runs"]
    ]
    times = "; ".join(f"{name}, {clocked['ratio']}" for name, clocked in told["times"].items())
    lines.append(f"width 0.25, 32x32 pixels, ONNX Runtime, one thread, dense and separable: {times}")
    return {"mobilenet": lines + unseen(told["claims"])}


def main() -> None:
    torch.set_num_threads(1)
    ledger = Ledger(CACHE / "mobilenet.json")
    digits, pictures = (load(PLANS[name][0]) for name, load in (("mnist", mnist), ("cifar10", cifar10)))
    runs = [trained(ledger, MobileNet(width=0.25, dense=dense), digits) for dense in (False, True)]
    runs += [trained(ledger, MobileNet(width=width), pictures) for width in WIDTHS]
    runs += [trained(ledger, MobileNet(width=0.25, dense=True), pictures)]
    runs += [trained(ledger, MobileNet(width=0.5, shallow=True), pictures)]
    found = {run["network"]: run for run in runs}
    light, dense = found["mnist width 0.25"], found["mnist width 0.25 dense"]
    ladder = [found[f"cifar10 width {width}"]["accuracy"]["mean"] for width in WIDTHS]
    deep, shallow = found["cifar10 width 0.375"], found["cifar10 width 0.5 shallow"]
    claims = {
        "at least 5 times fewer multiply-accumulates than the dense network": dense["macs"] >= 5 * light["macs"],
        "accuracy within 1.5 points of it (MNIST)": _mean(light) > _mean(dense) - 1.5,
        "accuracy falls with the width (CIFAR-10)": ladder == sorted(ladder, reverse=True),
        "thin and deep beats shallow at equal parameters (CIFAR-10)": _mean(deep) > _mean(shallow),
    }
    clocked = times(ledger, pictures)
    values = {"plans": PLANS, "runs": runs, "times": clocked, "claims": claims}
    publish("mobilenet", values, _text(runs, clocked, claims), measured(values))


def _mean(run: dict[str, Any]) -> float:
    return run["accuracy"]["mean"]


def _text(runs: list[dict[str, Any]], clocked: dict[str, Any], claims: dict[str, bool]) -> str:
    speed = [[name, told["dense"], told["separable"], told["ratio"]] for name, told in clocked.items()]
    plans = [f"{name}: {pictures:,} training pictures, {epochs} epochs" for name, (pictures, epochs) in PLANS.items()]
    parts = [
        "# MobileNets (4)",
        f"{'; '.join(plans)}. Means of {SEEDS} seeds.",
        runs_table(runs),
        "Width 0.25, 32x32 pixels, ONNX Runtime, one thread (processor time), dense and separable in turns:",
        table(["", "dense", "separable", "dense / separable"], speed),
        claims_table(claims),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
