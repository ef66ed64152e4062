"""Group-wise brain damage (survey 26): the time of single convolutions that hold a share of their columns.

Random weights and a random pattern, batch 1, one thread, processor time, in turns with the dense layer in torch and in
ONNX Runtime. The layer is timed in torch (with the numba kernel where that is installed) and as the ONNX file of
standard operators that it is saved as.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from _common import CACHE, Ledger, claims_table, publish, table, unseen
from karui.layers.group_sparse import group_sparse_layer
from karui.measuring import Clock, OnnxRuntime, Torch, time_ratio
from karui.model import Model
from karui.numerics.kernels import has_numba

CASES = ((256, 14, 0.1), (256, 14, 0.2), (256, 14, 0.5), (64, 56, 0.1), (64, 56, 0.2), (64, 56, 0.5))
"""Channels (and filters), side of the map, density; kernels of 3x3."""
GOOD = 2.5
"""What the layer of 256 channels is to gain at a fifth of its columns."""


def timed(channels: int, side: int, density: float) -> dict[str, Any]:
    """A convolution against the faster of torch and ONNX Runtime, and against itself with all columns."""
    torch.manual_seed(0)
    dense = nn.Conv2d(channels, channels, 3, padding=1).eval()
    alive = torch.zeros(1, 9 * channels, dtype=torch.bool)
    alive[0, torch.randperm(9 * channels)[: round(9 * channels * density)]] = True
    light, whole = group_sparse_layer(dense, alive).eval(), group_sparse_layer(dense, alive | True).eval()
    example = (torch.randn(1, channels, side, side),)
    sides: Any = {
        "dense, torch": (Torch(), Model(dense, example=example)),
        "dense, ONNX Runtime": (OnnxRuntime(), Model(dense, example=example)),
        "gathered, torch": (Torch(), Model(light, example=example)),
        "gathered, ONNX Runtime": (OnnxRuntime(), Model(light, example=example)),
        "all columns gathered, torch": (Torch(), Model(whole, example=example)),
    }
    found = Clock(batches=(1,), threads=(1,), cpu_time=True, rounds=25).race(sides, example)
    times = {name: found.of(name)[0] for name in sides}
    best = min((name for name in times if name.startswith("dense")), key=lambda name: times[name].median)
    told: dict[str, Any] = {"best dense": best, **{name: str(time) for name, time in times.items()}}
    for name in ("gathered, torch", "gathered, ONNX Runtime"):
        ratio = time_ratio(times[best], times[name], across=True)
        told[f"{name}: ratio"], told[f"{name}: verdict"] = ratio.value, ratio.verdict
    told["against all columns"] = time_ratio(
        times["all columns gathered, torch"], times["gathered, torch"], across=True
    ).value
    return told


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    lines = [
        f"{name}, one thread, against the best dense engine: {one['gathered, torch: verdict']} {told['kernel']}, "
        f"{one['gathered, ONNX Runtime: verdict']} as an ONNX file"
        for name, one in told["times"].items()
    ]
    return {"group_brain_damage": lines + unseen(told["claims"])}


def main() -> None:
    torch.set_num_threads(1)
    ledger = Ledger(CACHE / "group_brain_damage.json")
    times = {
        f"{c} channels, {side}x{side}, density {d}": ledger.once(
            f"{c} {side} {d}", lambda c=c, side=side, d=d: timed(c, side, d)
        )
        for c, side, d in CASES
    }
    fifth = times["256 channels, 14x14, density 0.2"]
    claims = {
        f"{GOOD} times faster at a fifth of the columns of 256 channels": fifth["gathered, torch: ratio"] >= GOOD,
        "1.8 times faster than the same product with all columns, at a fifth": all(
            one["against all columns"] >= 1.8 for name, one in times.items() if name.endswith("0.2")
        ),
        "faster than the best dense engine at half of the columns": all(
            "x faster" in one["gathered, torch: verdict"] for name, one in times.items() if name.endswith("0.5")
        ),
    }
    kernel = "with the numba kernel" if has_numba() else "without numba"
    names = [name for name in fifth if "ratio" not in name and name not in ("best dense", "against all columns")]
    rows = [[name, *(one[key] for key in names)] for name, one in times.items()]
    text = f"""# Group-wise brain damage (26)

Convolutions of 3x3 of which a share of the columns is left, {kernel}; batch 1, one thread, processor time, in turns;
verdicts are against the faster of the two dense ones.

{table(["layer", *names], rows)}

{claims_table(claims)}
"""
    values = {"kernel": kernel, "times": times, "claims": claims}
    publish("group_brain_damage", values, text, measured(values))


if __name__ == "__main__":
    main()
