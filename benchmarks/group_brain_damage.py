"""Group-wise brain damage (survey 26): columns removed gradually and at once, and the time of single layers.

On the digits, three seeds: three 5x5 convolutions of which the two inner ones lose columns, a quarter or a tenth left,
in equal epochs; beside it patterns that are kept from the start.

Times are of convolutions with random weights and a random pattern, batch 1, one thread, processor time, in turns with
the dense layer in torch (both layouts) and in ONNX Runtime. The layer is timed in torch (with the numba kernel where
that is installed) and as the ONNX file of standard operators that it is saved as.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from _common import CACHE, Ledger, claims_table, publish, table, unseen
from _layers import against, race
from _over_seeds import Run, convolutions, digits_bench, over_seeds, percent, right, sentence
from karui.layers.group_sparse import group_sparse_layer
from karui.lowrank import GroupBrainDamage
from karui.lowrank._columns import column_norms
from karui.measuring import OnnxRuntime, Torch
from karui.numerics.kernels import has_numba

BASE, SPENT = 12, (6, 4)
"""Epochs of the dense network, then those while columns go and those after."""
DENSITIES = (0.25, 0.1)
WAYS: dict[str, dict[str, Any]] = {
    "gradual": {"rounds": 20},
    "at once": {"rounds": 1},
    "at once, no penalty": {"rounds": 1, "lam": 0.0},
    "random from the start": {"pattern": "random"},
}
CASES = ((256, 14, 0.1), (256, 14, 0.2), (256, 14, 0.5), (64, 56, 0.1), (64, 56, 0.2), (64, 56, 0.5))
"""Channels (and filters), side of the map, density; kernels of 3x3."""
GOOD = 2.5
"""What the layer of 256 channels is to gain at a fifth of its columns."""


def one_seed(seed: int) -> Run:
    bench = digits_bench(seed, BASE, lr=2e-3)
    dense = bench.fit(convolutions(seed, (12, 16, 16), kernel=5))
    told: Run = {"dense": {"accuracy": right(bench, dense)}}
    told["dense, trained on as long"] = {"accuracy": right(bench, bench.fit(dense, epochs=sum(SPENT)))}
    for density in DENSITIES:
        for name, settings in WAYS.items():
            own: dict[str, Any] = {"density": density, "epochs": SPENT[0], "tuning": SPENT[1], "skip": ("convs.0",)}
            step = GroupBrainDamage(**own, **settings)
            told[f"{name}, {density:.0%}"] = {"accuracy": right(bench, step.apply(dense, bench))}
    for name, settings in (("with the penalty", {}), ("without", {"lam": 0.0})):
        steps = GroupBrainDamage(density=1.0, skip=("convs.0",), **settings).influence(dense, bench)
        trained = bench.fit(dense, epochs=SPENT[0], influence=steps)
        norms = [column_norms(trained.module.get_submodule(f"convs.{n}").weight.detach()).flatten() for n in (1, 2)]
        told[f"norms of columns {name}"] = {"bimodality": mean(map(bimodality, norms))}
    return told


def bimodality(norms: Tensor) -> float:
    """Sarle's coefficient of the logarithms: 5/9 for an even spread, more for two heaps."""
    logs = (norms + 1e-6 * norms.max()).log().double()
    apart = (logs - logs.mean()) / logs.std(correction=0)
    return float((apart.pow(3).mean() ** 2 + 1) / apart.pow(4).mean())


def timed(channels: int, side: int, density: float) -> dict[str, Any]:
    """A convolution against the fastest dense one, and against itself with all columns."""
    torch.manual_seed(0)
    dense = nn.Conv2d(channels, channels, 3, padding=1).eval()
    alive = torch.zeros(1, 9 * channels, dtype=torch.bool)
    alive[0, torch.randperm(9 * channels)[: round(9 * channels * density)]] = True
    light, whole = group_sparse_layer(dense, alive).eval(), group_sparse_layer(dense, alive | True).eval()
    best, times = race(
        dense,
        {
            "gathered, torch": (Torch(), light),
            "gathered, ONNX Runtime": (OnnxRuntime(), light),
            "all columns gathered, torch": (Torch(), whole),
        },
        torch.randn(1, channels, side, side),
    )
    told: dict[str, Any] = {"best dense": best, **{name: str(time) for name, time in times.items()}}
    for name in ("gathered, torch", "gathered, ONNX Runtime"):
        ratio = against(times, best, name)
        told[f"{name}: ratio"], told[f"{name}: verdict"] = ratio.value, ratio.verdict
    told["against all columns"] = against(times, "all columns gathered, torch", "gathered, torch").value
    return told


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    runs = told["runs"]
    lines = [
        f"digits, 5x5 kernels, {density:.0%} of the inner columns left, 3 seeds, equal epochs, accuracy in %: "
        + sentence(runs, "accuracy", percent, ("dense", *(f"{name}, {density:.0%}" for name in WAYS)))
        for density in DENSITIES
    ]
    lines += [
        f"{name}, one thread, against the best dense engine: {one['gathered, torch: verdict']} {told['kernel']}, "
        f"{one['gathered, ONNX Runtime: verdict']} as an ONNX file"
        for name, one in told["times"].items()
    ]
    return {"group_brain_damage": lines + unseen(told["claims"])}


def main() -> None:
    runs = over_seeds("group_brain_damage", one_seed)
    ledger = Ledger(CACHE / "group_brain_damage.json")
    times = {
        f"{c} channels, {side}x{side}, density {d}": ledger.once(
            f"{c} {side} {d}", lambda c=c, side=side, d=d: timed(c, side, d)
        )
        for c, side, d in CASES
    }
    fifth = times["256 channels, 14x14, density 0.2"]
    quarter, tenth = (f"{density:.0%}" for density in DENSITIES)
    claims = {
        f"gradual within 1 point of dense at {quarter}": runs.mean(f"gradual, {quarter}") >= runs.mean("dense") - 1,
        **{
            f"{better} no worse than {worse} at {share}": runs.mean(f"{better}, {share}")
            >= runs.mean(f"{worse}, {share}")
            for share in (quarter, tenth)
            for better, worse in (
                ("gradual", "at once"),
                ("at once", "at once, no penalty"),
                ("gradual", "random from the start"),
            )
        },
        "norms of columns form two heaps under the penalty (over 5/9, every seed), and more so than without": all(
            run["norms of columns with the penalty"]["bimodality"]
            > max(5 / 9, run["norms of columns without"]["bimodality"])
            for run in runs.seeds
        ),
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
    columns = {"accuracy": ("test accuracy, %", percent), "bimodality": ("bimodality coefficient", percent)}
    text = f"""# Group-wise brain damage (26)

The digits, three 5x5 convolutions trained for {BASE} epochs, then {SPENT[0]} epochs while columns of the inner two go
and {SPENT[1]} after; {len(runs.seeds)} seeds, mean and 95 % interval; the share of columns left in each row's name.

{runs.table(columns)}

Convolutions of 3x3 of which a share of the columns is left, {kernel}; batch 1, one thread, processor time, in turns;
verdicts are against the fastest of the dense ones.

{table(["layer", *names], rows)}

{claims_table(claims)}
"""
    values = {"runs": runs.told(), "kernel": kernel, "times": times, "claims": claims}
    publish("group_brain_damage", values, text, measured(values))


if __name__ == "__main__":
    main()
