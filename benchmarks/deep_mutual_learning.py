"""Deep mutual learning (39): two peers and the same two networks alone, on few pictures, six seeds in each setting.

A pair is told by the mean of both, never by the better one. Beside accuracy: the entropy of their predictions, and how
much noise on the weights (a twentieth of each weight's size) raises the training loss.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from _common import CACHE, Ledger, apart, by_name, claims_table, half_sized_cifar10, publish, shown, table, unseen
from _mlp import accuracy, bench_of, few_of, mlp
from karui.data import Splits, load_data, tensors_of
from karui.distill import MutualLearning
from karui.model import Classification, Model

SEEDS, DRAWS, NOISE = 6, 5, 0.05
ALONE, TOGETHER = "alone", "together"


def convolutional(seed: int) -> Model:
    """Three convolutions with batch normalisation for pictures of 16 pixels in three colours."""
    torch.manual_seed(seed)
    widths = (3, 8, 16, 16)
    blocks = [
        part
        for a, b in pairwise(widths)
        for part in (nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
    ]
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    return Model(net, example=(torch.zeros(1, 3, 16, 16),), task=Classification())


def perceptrons(*widths: int) -> Callable[[int], Model]:
    return lambda seed: mlp(64, *widths, 10, seed=seed)


def settings() -> dict[str, tuple[Callable[[int], Splits], Callable[[int], Model], int]]:
    digits = load_data("digits")
    pictures = half_sized_cifar10(600, 2000)
    return {
        "300 digits, 48 units": (lambda s: few_of(digits, 300, s), perceptrons(48), 30),
        "400 digits, 48 and 48 units": (lambda s: few_of(digits, 400, s), perceptrons(48, 48), 30),
        "300 digits, a fifth of the labels wrong": (lambda s: few_of(digits, 300, s, 0.2), perceptrons(48), 60),
        "600 colour pictures of 16 pixels, three convolutions": (lambda _: pictures, convolutional, 20),
    }


def entropy(model: Model, splits: Splits) -> float:
    """Mean of the predictions' over the test data, in nats."""
    with torch.no_grad():
        told = model.module.eval()(tensors_of(splits.test)[0]).log_softmax(1)
    return -float((told.exp() * told).sum(1).mean())


def rise(model: Model, splits: Splits, seed: int) -> float:
    """What noise of a twentieth of each weight adds to the training loss, the mean of some draws."""
    x, y = tensors_of(splits.train)
    draw, losses = torch.Generator().manual_seed(seed), []
    for number in range(DRAWS + 1):
        noised = model.copy().module.eval()
        with torch.no_grad():
            for parameter in noised.parameters() if number else ():
                parameter.add_(NOISE * parameter.abs() * torch.randn(parameter.shape, generator=draw))
            losses.append(float(functional.cross_entropy(noised(x), y)))
    return mean(losses[1:]) - losses[0]


def facts(splits: Splits, make: Callable[[int], Model], passes: int, seed: int) -> dict[str, float]:
    """Of two networks alone and of two peers of the same initial values, the means."""
    bench, told = bench_of(splits, passes, seed), {}
    for name, weight in ((ALONE, 0.0), (TOGETHER, 1.0)):
        both = MutualLearning(weight=weight).study(make(seed), bench)
        told[f"accuracy, {name}"] = mean(accuracy(one, splits) for one in both)
        told[f"entropy, {name}"] = mean(entropy(one, splits) for one in both)
        told[f"rise, {name}"] = mean(rise(one, splits, seed) for one in both)
    return told


def unequal(digits: Splits, seed: int) -> dict[str, float]:
    """10 units beside 256 and 256."""
    splits = few_of(digits, 300, seed)
    bench, small, large = bench_of(splits, 60, seed), mlp(64, 10, 10, seed=seed), mlp(64, 256, 256, 10, seed=seed + 50)
    told = {}
    for name, weight in ((ALONE, 0.0), (TOGETHER, 1.0)):
        pair_ = MutualLearning(peers=1, partners=(large,), weight=weight).study(small, bench)
        told |= {f"{size}, {name}": accuracy(one, splits) for size, one in zip(("small", "large"), pair_, strict=True)}
    return told


def claims_of(gains: dict[str, Any], beside: dict[str, Any]) -> dict[str, bool]:
    """What the paper claims."""
    claims: dict[str, bool] = {}
    for name, gain in gains.items():
        claims |= {
            f"{name}: peers half a point better than alone, on average": gain["accuracy"]["mean"] >= 0.5,
            f"{name}: better beyond chance": gain["accuracy"]["low"] > 0,
            f"{name}: predictions softer, beyond chance": gain["entropy"]["low"] > 0,
            f"{name}: noise on the weights raises the loss less, beyond chance": gain["rise"]["high"] < 0,
        }
    claims["a small network beside a large one gains more than the large one loses"] = (
        beside["small"]["mean"] > 0 and beside["small"]["mean"] > -beside["large"]["mean"]
    )
    return claims


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    lines = [
        f"{name}, {SEEDS} seeds: accuracy alone {shown(fact[f'accuracy, {ALONE}'])}, with a peer "
        f"{shown(fact[f'accuracy, {TOGETHER}'])} %; difference {shown(told['gains'][name]['accuracy'])}"
        for name, fact in told["facts"].items()
    ]
    beside = told["beside"]
    lines.append(
        f"300 digits, 10 units beside 256 and 256: the small one gains {shown(beside['small'])} points, the large one "
        f"{shown(beside['large'])}"
    )
    return {"deep_mutual_learning": lines + unseen(told["claims"])}


def main() -> None:
    ledger, told, gains = Ledger(CACHE / "deep_mutual_learning.json"), {}, {}
    for name, (data, make, passes) in settings().items():
        runs = [
            ledger.once(f"{name}, seed {s}", lambda d=data, m=make, p=passes, s=s: facts(d(s), m, p, s))
            for s in range(SEEDS)
        ]
        told[name] = by_name(runs)
        gains[name] = {
            what: apart(runs, f"{what}, {TOGETHER}", f"{what}, {ALONE}") for what in ("accuracy", "entropy", "rise")
        }
    digits = load_data("digits")
    unlike = [ledger.once(f"unequal, seed {s}", lambda s=s: unequal(digits, s)) for s in range(SEEDS)]
    beside = {size: apart(unlike, f"{size}, {TOGETHER}", f"{size}, {ALONE}") for size in ("small", "large")}
    claims = claims_of(gains, beside)
    head = ["setting", "alone, %", "with a peer, %", "accuracy, points", "entropy, nats", "rise of the loss by noise"]
    rows = [
        [
            name,
            *(shown(fact[f"accuracy, {way}"]) for way in (ALONE, TOGETHER)),
            shown(gains[name]["accuracy"]),
            *(_fine(gains[name][what]) for what in ("entropy", "rise")),
        ]
        for name, fact in told.items()
    ]
    text = f"""# Deep mutual learning (39)

Two peers and the same two networks alone, by turns at the same initial values and batches, {SEEDS} seeds, Adam at
0.003. Test accuracy in percent, of both networks the mean; the last three columns are differences, together less
alone, seed by seed, with their 95 % intervals.

{table(head, rows)}

300 digits, a network of 10 units beside one of 256 and 256, points of accuracy over the same network alone: the small
one {shown(beside["small"])}, the large one {shown(beside["large"])}.

{claims_table(claims)}
"""
    values = {"facts": told, "gains": gains, "beside": beside, "claims": claims}
    publish("deep_mutual_learning", values, text, measured(values))


def _fine(told: dict[str, Any]) -> str:
    return f"{told['mean']:.4f} [{told['low']:.4f}, {told['high']:.4f}]"


if __name__ == "__main__":
    main()
