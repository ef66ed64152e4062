"""LCNN (survey 29): sparse mixtures of a dictionary against the dense network, and few examples of new classes.

On the digits, three seeds, equal epochs: a network of three convolutions, dense with batch normalisation, and with
dictionaries of 6, 12 and 24 vectors; and without the penalty. Then, from six classes, two examples each of the other
four, over ten episodes: mixtures learn on frozen dictionaries, beside a plain network whose trunk is frozen. Last, the
time of single layers with random sparse mixtures, batch 1, one thread, processor time, in turns with the dense layer in
torch (both layouts) and in ONNX Runtime.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from _common import CACHE, Ledger, claims_table, interval, publish, shown, table, unseen
from _layers import against, race
from karui.artifact import save
from karui.data import Splits, load_data
from karui.layers.lookup import LookupConv, lookup_layers
from karui.lowrank import Lcnn
from karui.lowrank.lcnn import multiplications
from karui.measuring import OnnxRuntime, Torch, count
from karui.model import Classification, Model, replace_layers
from karui.numerics.kernels import has_numba
from karui.technique import Bench
from karui.train import SGD, Cosine, Paced, Training

SEEDS, EPISODES, EPOCHS = 3, 10, 12
STRENGTH = 3.0
LAYERS = ((64, 56, 30, 0.1), (64, 56, 30, 0.05), (256, 14, 30, 0.1), (256, 14, 60, 0.1), (256, 14, 60, 0.05))
"""Channels (and filters), side of the map, dictionary, live share of the mixture; kernels of 3x3."""


def network(seed: int, *, norm: bool) -> Model:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for depth, (inputs, outputs) in enumerate(((1, 24), (24, 32), (32, 48))):
        conv: nn.Module = nn.Conv2d(inputs, outputs, 3, padding=1)
        layers += [nn.Sequential(conv, nn.BatchNorm2d(outputs)) if norm else conv, nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if depth == 1 else []
    net = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(48, 10))
    return Model(net, example=(torch.zeros(2, 1, 8, 8),), task=Classification())


def make_bench(data: Splits, seed: int, epochs: int = EPOCHS) -> Bench:
    training = Training(epochs=epochs, batch_size=32, optimizer=SGD(lr=0.05, momentum=0.9), schedule=Cosine())
    return Bench(train=data.train, validation=data.validation, test=data.test, training=training, seed=seed)


def one_seed(seed: int) -> dict[str, Any]:
    data = load_data("digits")
    bench = make_bench(data, seed)
    dense = bench.fit(network(seed, norm=True))
    plain = count(network(seed, norm=False))
    told = {"dense": judged(dense, bench) | {"multiplications": float(plain.macs), "live": 100.0}}
    cases = {f"dictionaries of {size}": Lcnn(size=size, strength=STRENGTH, epochs=EPOCHS) for size in (6, 12, 24)}
    cases["dictionaries of 12, no penalty"] = Lcnn(size=12, strength=0.0, epochs=EPOCHS)
    for name, step in cases.items():
        light = step.apply(network(seed, norm=False), bench)
        mixtures = [layer.mixture.weight for layer in lookup_layers(light.module).values()]
        live = sum(int(torch.count_nonzero(one)) for one in mixtures) / sum(one.numel() for one in mixtures)
        done = sum(multiplications(light).values()) + 480
        told[name] = judged(light, bench) | {"multiplications": float(done), "live": 100 * live}
    return told


def judged(model: Model, bench: Bench) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        held = save(model, Path(scratch) / "model", onnx=False).weights_bytes
    return {"accuracy": 100 * bench.evaluate(model, "test").value, "bytes": float(held)}


def few_shot() -> dict[str, list[float]]:
    """Accuracy among four new classes, episode by episode."""
    data = load_data("digits")
    labels, tested = (torch.tensor([int(y) for _, y in part]) for part in (data.train, data.test))
    base = Subset(data.train, torch.nonzero(labels < 6).flatten().tolist())
    novel = Subset(data.test, torch.nonzero(tested >= 6).flatten().tolist())
    bench = Bench(train=base, test=novel, training=make_bench(data, 0, epochs=6).training)
    lookup = Lcnn(size=12, strength=0.3, epochs=6).apply(network(0, norm=False), bench)
    plain = bench.fit(network(0, norm=True))
    trunk = tuple(str(place) for place in range(9))
    dictionaries = tuple(f"{place}.{part}" for place in (0, 2, 5) for part in ("dictionary", "norm"))
    sides = {"mixtures learn": (lookup, dictionaries), "frozen": (lookup, trunk), "plain, frozen": (plain, trunk)}
    training = Training(epochs=40, batch_size=8, optimizer=SGD(lr=0.01, momentum=0.9), schedule=Cosine())
    told: dict[str, list[float]] = {name: [] for name in sides}
    for episode in range(EPISODES):
        generator, picked = torch.Generator().manual_seed(episode), []
        for label in range(6, 10):
            known = torch.nonzero(labels == label).flatten()
            picked.append(known[torch.randperm(len(known), generator=generator)[:2]])
        shown_few = Subset(data.train, torch.cat(picked).tolist())
        few = Bench(train=shown_few, validation=novel, test=novel, seed=episode, training=training)
        for name, (model, held) in sides.items():
            torch.manual_seed(episode)
            start = replace_layers(model, {"9": nn.Linear(48, 10)})
            told[name].append(100 * few.evaluate(few.fit(start, influence=Paced(held, 0.0)), "test").value)
    return told


def timed(channels: int, side: int, size: int, live: float) -> dict[str, Any]:
    """A lookup layer against the fastest of the dense layer in torch (both layouts) and in ONNX Runtime."""
    torch.manual_seed(0)
    dense = nn.Conv2d(channels, channels, 3, padding=1).eval()
    light = LookupConv(channels, channels, (3, 3), size=size, padding=(1, 1)).eval()
    with torch.no_grad():
        light.mixture.weight.mul_(torch.rand_like(light.mixture.weight) < live)
    best, times = race(
        dense,
        {"looked up, torch": (Torch(), light), "zeros multiplied, ONNX Runtime": (OnnxRuntime(), light)},
        torch.randn(1, channels, side, side),
    )
    ratio = against(times, best, "looked up, torch")
    return {
        **{name: str(time) for name, time in times.items()},
        "best": best,
        "ratio": ratio.value,
        "verdict": ratio.verdict,
    }


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    runs, few = told["runs"], told["few"]
    dense = runs["dense"]
    lines = [
        f"digits, {told['seeds']} seeds, {name}: accuracy {shown(one['accuracy'])} % (dense "
        f"{shown(dense['accuracy'])}), {dense['multiplications']['mean'] / one['multiplications']['mean']:.1f} times "
        f"fewer counted multiplications, {one['live']['mean']:.1f} % of the mixtures live, weights file "
        f"{dense['bytes']['mean'] / one['bytes']['mean']:.1f} times smaller"
        for name, one in runs.items()
        if name != "dense"
    ]
    gain = few["gain"]
    lines.append(
        f"two examples each of four new digits, {told['episodes']} episodes: {shown(gain)} points over a plain network "
        "whose trunk is frozen"
    )
    lines += [
        f"{name}, batch 1, one thread, {told['kernel']}, against the best dense engine: {one['verdict']}"
        for name, one in told["times"].items()
    ]
    return {"lcnn": lines + unseen(told["claims"])}


def main() -> None:
    torch.set_num_threads(1)
    ledger = Ledger(CACHE / "lcnn.json")
    few = ledger.once("few examples", few_shot)
    seeds = [ledger.once(f"seed {seed}", lambda seed=seed: one_seed(seed)) for seed in range(SEEDS)]
    times = {
        f"{c} channels, {side}x{side}, dictionary of {size}, {100 * live:g} % live": ledger.once(
            f"{c} {side} {size} {live}", lambda case=(c, side, size, live): timed(*case)
        )
        for c, side, size, live in LAYERS
    }
    kernel = "with the numba kernel" if has_numba() else "without numba"
    keys = ("accuracy", "multiplications", "live", "bytes")
    runs = {name: {key: interval([seed[name][key] for seed in seeds]) for key in keys} for name in seeds[0]}
    gain = interval([a - b for a, b in zip(few["mixtures learn"], few["plain, frozen"], strict=True)])
    small, middle, large = (runs[f"dictionaries of {size}"] for size in (6, 12, 24))
    dense, free = runs["dense"], runs["dictionaries of 12, no penalty"]
    claims = {
        "under 10 % of the mixtures live, dictionaries of 12": middle["live"]["mean"] < 10,
        "five times fewer multiplications at a point of accuracy, dictionaries of 12": middle["accuracy"]["mean"]
        >= dense["accuracy"]["mean"] - 1
        and dense["multiplications"]["mean"] >= 5 * middle["multiplications"]["mean"],
        "a larger dictionary costs more": small["multiplications"]["mean"]
        < middle["multiplications"]["mean"]
        < large["multiplications"]["mean"],
        "a larger dictionary is more accurate": small["accuracy"]["mean"]
        < middle["accuracy"]["mean"]
        < large["accuracy"]["mean"],
        "without the penalty mixtures stay dense (over 60 %)": free["live"]["mean"] > 60,
        "few examples: mixtures on frozen dictionaries are no worse than a plain frozen trunk": gain["mean"] >= 0,
        "a layer is faster than the best dense engine, every shape": all(
            "x faster" in t["verdict"] for t in times.values()
        ),
    }
    rows = [
        [
            name,
            shown(one["accuracy"]),
            f"{one['live']['mean']:.1f}",
            f"{one['multiplications']['mean']:,.0f}",
            f"{one['bytes']['mean']:,.0f}",
        ]
        for name, one in runs.items()
    ]
    lines = [[name, f"{mean(values):.2f}"] for name, values in few.items()]
    sides = [side for side in next(iter(times.values())) if side not in ("ratio", "best")]
    head = ["", "test accuracy, %", "mixtures that live, %", "counted multiplications", "weights file, bytes"]
    text = f"""# LCNN (29)

The digits, three 3x3 convolutions, {EPOCHS} epochs each, {SEEDS} seeds, mean and 95 % interval; strength {STRENGTH:g},
more than the authors' 0.1 to 0.4, since so short a training sees few steps. Multiplications are counted for one sample,
without those with zeros; an engine that multiplies zeros does not show them in time.

{table(head, rows)}

Two examples each of four new classes, {EPISODES} episodes, accuracy among the four, %; mixtures against the plain
network {shown(gain)} points.

{table(["", "accuracy, %"], lines)}

Single layers, {kernel}, the dictionary's convolution included; verdicts are against the
fastest of the dense ones.

{table(["layer", *sides], [[name, *(one[side] for side in sides)] for name, one in times.items()])}

{claims_table(claims)}
"""
    values = {
        "seeds": SEEDS,
        "episodes": EPISODES,
        "runs": runs,
        "few": {**few, "gain": gain},
        "kernel": kernel,
        "times": times,
        "claims": claims,
    }
    publish("lcnn", values, text, measured(values))


if __name__ == "__main__":
    main()
