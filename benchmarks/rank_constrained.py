"""Rank-constrained topology (survey 27): filters of low rank in a first layer, and a bottleneck of as many parameters.

Perceptrons on log-mel pictures of spoken digits (32 frames of 32 bands, a class for each digit and speaker) and on the
8x8 digits, three seeds: the full first layer, each of its units with a filter of rank 1, 2 and 4, and the layer's
matrix in two factors (a linear bottleneck) with no fewer parameters than ranks 1 and 2 have.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from _common import claims_table, publish, unseen
from _low_rank_nets import spoken
from _over_seeds import Run, bench_of, digits_bench, over_seeds, percent, right, sentence, whole
from karui.data import Splits
from karui.layers.factored import FactoredLinear
from karui.lowrank import RankConstrainedTopology
from karui.model import Classification, Model, replace_layers
from karui.technique import Bench

SPOKEN, DIGITS = "spoken digits", "digits"
RANKS = {SPOKEN: (1, 2, 4), DIGITS: (1, 2)}
EPOCHS = {SPOKEN: 8, DIGITS: 30}
UNITS = {SPOKEN: 512, DIGITS: 96}


def network(side: int, units: int, classes: int, seed: int) -> Model:
    """One wide first layer; a second, narrower one where there are many units; and a head."""
    torch.manual_seed(seed)
    rest = [nn.Linear(units, 128), nn.ReLU(), nn.Linear(128, classes)] if units > 96 else [nn.Linear(units, classes)]
    net = nn.Sequential(nn.Flatten(), nn.Linear(side * side, units), nn.ReLU(), *rest)
    shape = (1, side, side) if side == 32 else (1, 1, side, side)
    return Model(net.eval(), example=(torch.zeros(shape),), task=Classification())


def compared(task: str, model: Model, bench: Bench) -> Run:
    """Each form of the first layer, trained as long."""
    layer: Any = model.module[1]  # pyright: ignore[reportIndexIssue]
    told: Run = {}

    def note(name: str, trained: Model) -> None:
        told[f"{task}, {name}"] = {"accuracy": right(bench, trained), "parameters": trained.parameters}

    note("full", bench.fit(model))
    for rank in RANKS[task]:
        light = RankConstrainedTopology(rank=rank, epochs=EPOCHS[task]).apply(model, bench)
        note(f"rank {rank}", light)
        if rank < 4:
            saved = model.parameters - light.parameters
            spent = layer.weight.numel() - saved
            narrow = -(-spent // (layer.in_features + layer.out_features))  # no fewer parameters
            note(
                f"bottleneck as rank {rank}",
                bench.fit(replace_layers(model, {"1": FactoredLinear(layer.in_features, narrow, layer.out_features)})),
            )
    return told


def one_seed(seed: int) -> Run:
    train, test = spoken()
    data = Splits(train=train, validation=test, test=test, classes=(), name=SPOKEN)
    heard = compared(
        SPOKEN, network(32, UNITS[SPOKEN], 60, seed), bench_of(data, seed, EPOCHS[SPOKEN], lr=1e-3, batch=64)
    )
    return heard | compared(DIGITS, network(8, UNITS[DIGITS], 10, seed), digits_bench(seed, EPOCHS[DIGITS], lr=3e-3))


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    runs = told["runs"]
    lines = []
    for task in RANKS:
        ways = [way for way in runs if way.startswith(f"{task},")]
        sizes = "; ".join(whole(runs[way]["parameters"]) for way in ways)
        lines.append(
            f"3 seeds, accuracy in %: {sentence(runs, 'accuracy', percent, ways)}; parameters in turn: {sizes}"
        )
    return {"rank_constrained": lines + unseen(told["claims"])}


def main() -> None:
    runs = over_seeds("rank_constrained", one_seed)
    claims = {}
    for task, ranks in RANKS.items():
        full = f"{task}, full"
        gains = [runs.mean(f"{task}, rank {r}") - runs.mean(f"{task}, bottleneck as rank {r}") for r in (1, 2)]
        claims[f"{task}: ahead of a bottleneck of as many parameters by 0.3 points, mean of ranks 1 and 2"] = (
            sum(gains) / 2 >= 0.3
        )
        claims[f"{task}: within 0.7 points of the full layer at 40 % of its parameters or fewer"] = any(
            runs.mean(f"{task}, rank {rank}") >= runs.mean(full) - 0.7
            and runs.mean(f"{task}, rank {rank}", "parameters") <= 0.4 * runs.mean(full, "parameters")
            for rank in ranks
        )
        claims[f"{task}: a larger rank does not hurt (0.3 points)"] = all(
            runs.mean(f"{task}, rank {b}") >= runs.mean(f"{task}, rank {a}") - 0.3 for a, b in itertools.pairwise(ranks)
        )
    text = f"""# Rank-constrained topology (27)

Spoken digits, {UNITS[SPOKEN]} units in the first layer, {EPOCHS[SPOKEN]} epochs; the 8x8 digits, {UNITS[DIGITS]} units,
{EPOCHS[DIGITS]} epochs; {len(runs.seeds)} seeds, mean and 95 % interval; parameters of the whole network.

{runs.table({"accuracy": ("test accuracy, %", percent), "parameters": ("parameters", whole)})}

{claims_table(claims)}
"""
    values = {"runs": runs.told(), "claims": claims}
    publish("rank_constrained", values, text, measured(values))


if __name__ == "__main__":
    main()
