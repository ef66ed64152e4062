"""Data-free distillation (41): students of noise, of rebuilt inputs and of real data; digits and MNIST, three seeds.

Every student has as many inputs, passes and steps. Noise by pixel, with the mean and the deviation that each pixel has
in the data, is a control that uses statistics of the data, but none of the network. On 8x8 digits nearly anything
teaches; kinds of records are told apart on the 784 pixels of MNIST.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from _common import CACHE, Ledger, apart, by_name, claims_table, mnist, publish, shown, table, unseen
from _mlp import accuracy, bench_of, few_of, mlp
from karui.data import Splits, load_data, tensors_of
from karui.distill._reconstruction import Descent, Rebuilt, reconstruct
from karui.distill._recording import record
from karui.distill.data_free import distil
from karui.model import Model

SEEDS, TEMPERATURE, PASSES = 3, 8.0, 30
NOISE, BY_PIXEL, REAL = "noise", "noise by pixel", "real data, as many"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is taught, on how many inputs, in which ways.

    Settings:
        data: the splits.
        teacher, student: units of their layers.
        passes: of the teacher's training.
        samples: inputs of each class.
        kinds: of records.
        descent: how inputs are rebuilt.
    """

    data: Callable[[], Splits]
    teacher: tuple[int, ...]
    student: tuple[int, ...]
    passes: int
    samples: int
    kinds: tuple[str, ...]
    descent: Descent


SETTINGS = {
    "digits": Setting(
        data=lambda: load_data("digits"), teacher=(64, 128, 128, 10), student=(64, 64, 64, 10), passes=40, samples=100,
        kinds=("top", "all"), descent=Descent(steps=300, lr=0.05),
    ),
    "MNIST": Setting(
        data=lambda: mnist(6000), teacher=(784, 256, 128, 10), student=(784, 128, 64, 10), passes=8, samples=50,
        kinds=("top", "all", "spectral_all", "spectral_pairs", "jl"), descent=Descent(steps=150, lr=0.05),
    ),
}  # fmt: skip


def inputs_of(one: Setting, splits: Splits, teacher: Model, seed: int) -> dict[str, Callable[[], Tensor]]:
    """Transfer sets by name."""
    x, number = tensors_of(splits.train)[0], 10 * one.samples
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(number, *x.shape[1:], generator=draw)

    def rebuilt(kind: Any) -> Tensor:
        return reconstruct(
            teacher, record(teacher, splits.train, kind, seed=seed), one.descent, samples=one.samples, seed=seed
        ).inputs

    return {
        NOISE: lambda: noise * x.std() + x.mean(),
        BY_PIXEL: lambda: noise * x.std(0) + x.mean(0),
        **{kind: lambda kind=kind: rebuilt(kind) for kind in one.kinds},
        REAL: lambda: tensors_of(few_of(splits, min(number, len(x) - 1), seed).train)[0],
    }


def arms(one: Setting, seed: int) -> dict[str, float]:
    splits = one.data()
    lr = 3e-3 if one.teacher[0] == 64 else 1e-3
    teacher = bench_of(splits, one.passes, seed, lr=lr).fit(mlp(*one.teacher, seed=100 + seed))
    told = {"the teacher": accuracy(teacher, splits)}
    bench = replace(bench_of(splits, PASSES, seed, lr=1e-3), train=None, validation=None)
    for name, make in inputs_of(one, splits, teacher, seed).items():
        inputs = make()
        transfer = Rebuilt(inputs, torch.zeros(len(inputs), dtype=torch.long), ())
        student = mlp(*one.student, seed=seed)
        taught = distil(student, teacher, transfer, bench, temperature=TEMPERATURE, epochs=PASSES)
        told[name] = accuracy(taught, splits)
    return told


def claims_of(told: dict[str, dict[str, Any]], gains: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """What the section asks and the paper claims."""
    digits, larger = gains["digits"], gains["MNIST"]
    share = told["digits"]["all"]["mean"] / told["digits"]["the teacher"]["mean"]
    return {
        "digits: top layer 15 points above noise": digits["top over noise"]["mean"] >= 15,
        "digits: all layers no worse than the top layer, on average": digits["all over top"]["mean"] >= 0,
        "digits: all layers reach 90 % of the teacher's accuracy": share >= 0.9,
        "digits: real data no worse than all layers, on average": digits["real over all"]["mean"] >= 0,
        "digits: all layers better than noise by pixel, beyond chance": digits["all over noise by pixel"]["low"] > 0,
        "MNIST: all layers better than the top layer, beyond chance": larger["all over top"]["low"] > 0,
        "MNIST: all layers better than noise by pixel, beyond chance": larger["all over noise by pixel"]["low"] > 0,
        "MNIST: a spectral record better than all layers, on average": max(
            larger[f"{kind} over all"]["mean"] for kind in ("spectral_all", "spectral_pairs")
        )
        > 0,
    }


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    lines = []
    for name, arm in told["arms"].items():
        one = SETTINGS[name]
        names = (NOISE, BY_PIXEL, *one.kinds, REAL)
        lines.append(
            f"{name}, {SEEDS} seeds, {10 * one.samples:,} inputs, teacher {arm['the teacher']['mean']:.1f} %: "
            + ", ".join(f"{way} {shown(arm[way])}" for way in names)
        )
    return {"data_free_distillation": lines + unseen(told["claims"])}


def main() -> None:
    ledger = Ledger(CACHE / "data_free_distillation.json")
    told, gains = {}, {}
    for name, one in SETTINGS.items():
        runs = [ledger.once(f"{name}, seed {s}", lambda one=one, s=s: arms(one, s)) for s in range(SEEDS)]
        told[name] = by_name(runs)
        pairs = {
            "top over noise": ("top", NOISE),
            "all over noise by pixel": ("all", BY_PIXEL),
            "all over top": ("all", "top"),
            "real over all": (REAL, "all"),
            **{f"{kind} over all": (kind, "all") for kind in one.kinds[2:]},
        }
        gains[name] = {pair: apart(runs, *ways) for pair, ways in pairs.items()}
    claims = claims_of(told, gains)
    ways = told["MNIST"]
    rows = [[way, *(shown(arm[way]) if way in arm else "" for arm in told.values())] for way in ways]
    differences = [
        [pair, *(shown(gain[pair]) if pair in gain else "" for gain in gains.values())] for pair in gains["MNIST"]
    ]
    shapes = "; ".join(
        f"{name}: {'-'.join(map(str, one.teacher))} teaches {'-'.join(map(str, one.student))}, {one.samples} inputs of "
        f"each class, {one.descent.steps} steps to rebuild them"
        for name, one in SETTINGS.items()
    )
    text = f"""# Data-free distillation (41)

{shapes}. T = {TEMPERATURE:g}, {PASSES} passes over the inputs, Adam at 0.001; test accuracy in percent, mean and 95 %
interval of {SEEDS} seeds.

{table(["taught on", *told], rows)}

Differences in points, seed by seed:

{table(["difference", *gains], differences)}

{claims_table(claims)}
"""
    values = {"arms": told, "gains": gains, "claims": claims}
    publish("data_free_distillation", values, text, measured(values))


if __name__ == "__main__":
    main()
