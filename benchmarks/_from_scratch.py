"""What the benchmarks of networks that are trained from scratch share: accuracy over seeds, counts, bytes, time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from _common import CACHE, Ledger, cifar10, claims_table, interval, publish, shown, table, unseen
from karui.artifact import stored_bytes
from karui.measuring import Clock, count, evaluate
from karui.measuring.clock import time_ratio
from karui.measuring.engines import OnnxRuntime
from karui.model import Classification, Model
from karui.technique import Bench
from karui.train import Adam, Cosine, Training

SEEDS = 3
PICTURES, EPOCHS = 3000, 8
Make = Callable[[int], Model]
Measured = Callable[[dict[str, Any]], dict[str, list[str]]]


def vgg(seed: int, widths: tuple[int, ...], *, kernel: int = 3, pools: tuple[int, ...], norm: bool = True) -> Model:
    """Convolutions of one kernel size with batch normalisation, pooled after some, averaged, and a linear layer."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for depth, (inputs, outputs) in enumerate(pairwise((3, *widths))):
        layers.append(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not norm))
        layers += [nn.BatchNorm2d(outputs)] if norm else []
        layers += [nn.ReLU(), *([nn.MaxPool2d(2)] if depth in pools else [])]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    return Model(net.eval(), example=(torch.zeros(1, 3, 32, 32),), task=Classification())


def compare(
    name: str,
    title: str,
    nets: Mapping[str, Make],
    claims: Callable[[dict[str, Any]], dict[str, bool]],
    *,
    measured: Measured,
    epochs: int = EPOCHS,
) -> None:
    """Train each network over the seeds, time them all in turns, and publish a table.

    Args:
        name: of the benchmark.
        title: of its page.
        nets: by name, the untrained network of a seed; the first is the dense one.
        claims: from the rows by name, what was claimed and whether it is seen.
        measured: the lines that are told of the techniques.
        epochs: passes over the training pictures.
    """
    torch.set_num_threads(1)
    ledger = Ledger(CACHE / f"{name}.json")
    speed = ledger.once("times", lambda: _times({net: make(0) for net, make in nets.items()}))
    rows = {net: {**_row(ledger, name, net, make, epochs), "time": speed[net]} for net, make in nets.items()}
    seen = claims(rows)
    plan = {"pictures": PICTURES, "epochs": epochs, "seeds": SEEDS}
    values = {"plan": plan, "networks": rows, "claims": seen}
    publish(name, values, _text(title, plan, rows, seen), measured(values))


def lines(told: dict[str, Any], names: Sequence[str]) -> list[str]:
    """What `karui show` tells of some of the networks: a line each, then the claims that were not seen."""
    where = f"CIFAR-10, {told['plan']['pictures']:,} pictures, {told['plan']['seeds']} seeds"
    rows = told["networks"]
    made = [
        f"{where}, {name}: {rows[name]['parameters']:,} parameters, {rows[name]['macs'] / 1e6:.2f} M MACs, accuracy "
        f"{shown(rows[name]['accuracy'])} %"
        + (f"; {'; '.join(rows[name]['time'].values())}" if name != "dense" else "")
        for name in ("dense", *names)
    ]
    return made + unseen(told["claims"])


def _row(ledger: Ledger, benchmark: str, name: str, make: Make, epochs: int) -> dict[str, Any]:
    def accuracy(seed: int) -> float:
        data = cifar10(PICTURES, seed)
        training = Training(epochs=epochs, batch_size=64, optimizer=Adam(lr=4e-3), schedule=Cosine())
        bench = Bench(
            train=data.train,
            validation=data.validation,
            test=data.test,
            training=training,
            seed=seed,
            checkpoints=CACHE / benchmark,
        )
        return 100 * evaluate(bench.fit(make(seed), label=f"{name} {seed}"), data.test).value

    scores = [ledger.once(f"{name}, seed {seed}", lambda seed=seed: accuracy(seed)) for seed in range(SEEDS)]
    model = make(0)
    told = count(model)
    stored = stored_bytes(model)
    return {"parameters": told.parameters, "macs": told.macs, "bytes": stored, "accuracy": interval(scores)}


def _times(nets: dict[str, Model]) -> dict[str, Any]:
    """Time of the first network over that of each, in ONNX Runtime, in turns in one run, at each batch size."""
    clock = Clock(threads=(1,), engines=(OnnxRuntime(),), cpu_time=True)
    timings = clock.time(nets)
    dense = timings.of(next(iter(nets)))
    return {
        name: {f"batch {a.batch}": str(time_ratio(a, b)) for a, b in zip(dense, timings.of(name), strict=True)}
        for name in nets
    }


def _text(title: str, plan: dict[str, int], rows: dict[str, Any], claims: dict[str, bool]) -> str:
    batches = list(next(iter(rows.values()))["time"])
    body = [
        [
            name,
            f"{row['parameters']:,}",
            f"{row['macs'] / 1e6:.2f}",
            f"{row['bytes']:,}",
            shown(row["accuracy"]),
            *(row["time"][batch] for batch in batches),
        ]
        for name, row in rows.items()
    ]
    head = [
        "network",
        "parameters",
        "million MACs",
        "bytes",
        "test accuracy, % [95 %]",
        *(f"time, {b}" for b in batches),
    ]
    told = (
        f"CIFAR-10, {plan['pictures']:,} training pictures, {plan['epochs']} epochs, {plan['seeds']} seeds. Time in "
        "ONNX Runtime against the first network, one thread (processor time), all in turns in one run."
    )
    return "\n\n".join([f"# {title}", told, table(head, body), claims_table(claims)])


def mean_of(rows: dict[str, Any], name: str) -> float:
    """Mean accuracy of a network."""
    return rows[name]["accuracy"]["mean"]
