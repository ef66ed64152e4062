"""Born-again networks (37): 250 digits, a fifth of them labelled at random, eight seeds.

The first network and each generation are trained for as many passes. Beside the generations: the paper's two control
losses, and networks that were trained alone, of which as many make an ensemble of the same size.
"""

from __future__ import annotations

from typing import Any

from _common import CACHE, Ledger, apart, by_name, claims_table, publish, shown, table, unseen
from _mlp import accuracy, bench_of, few_of, mlp
from karui.data import Splits, load_data
from karui.distill import BornAgain
from karui.model import averaged

SEEDS, SAMPLES, WRONG, UNITS, GENERATIONS = 8, 250, 0.2, 48, 3
SETTINGS = {
    "a fifth of the labels wrong, 150 passes": (WRONG, 150),
    "a fifth of the labels wrong, 60 passes": (WRONG, 60),
}
FIRST, INDEPENDENT = "the first network", f"{GENERATIONS} networks alone, their mean"
CWTM, DKPP = "control CWTM: labels by the teacher's confidence", "control DKPP: the other outputs shuffled"


def arms(digits: Splits, wrong: float, passes: int, seed: int) -> dict[str, float]:
    bench = bench_of(few_of(digits, SAMPLES, seed, wrong), passes, seed)
    alone = [bench.fit(mlp(64, UNITS, 10, seed=seed + 1000 * number)) for number in range(GENERATIONS)]
    told = {FIRST: accuracy(alone[0], digits), INDEPENDENT: accuracy(averaged(alone), digits)}
    for name, labels in (("by outputs alone", False), ("by outputs and labels", True)):
        made = BornAgain(generations=GENERATIONS, labels=labels).study(alone[0], bench)
        for number, model in enumerate(made, 1):
            told[f"generation {number}, {name}"] = accuracy(model, digits)
        told[f"{GENERATIONS} generations, their mean, {name}"] = accuracy(averaged(made), digits)
    told[CWTM] = accuracy(BornAgain(loss="cwtm").apply(alone[0], bench), digits)
    told[DKPP] = accuracy(BornAgain(loss="dkpp", labels=False).apply(alone[0], bench), digits)
    return told


def claims_of(gains: dict[str, Any]) -> dict[str, bool]:
    """What the paper claims, at each setting, of generations taught by outputs alone."""
    claims: dict[str, bool] = {}
    for setting, gain in gains.items():
        claims |= {
            f"{setting}: generation 1 half a point better than the first network": gain["generation 1"]["mean"] >= 0.5,
            f"{setting}: generation 1 better beyond chance": gain["generation 1"]["low"] > 0,
            f"{setting}: the mean of generations better than the first network beyond chance": gain["mean"]["low"] > 0,
            f"{setting}: and within half a point of as many networks alone": gain["mean over alone"]["mean"] >= -0.5,
            f"{setting}: generation 1 better than the control whose other outputs are shuffled": gain["control"]["mean"]
            > 0,
        }
    return claims


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    lines = []
    for setting in SETTINGS:
        arm = told["arms"][setting]
        lines.append(
            f"{SAMPLES} digits, {setting}, {SEEDS} seeds: accuracy of the first network {shown(arm[FIRST])}, "
            f"generation 1 {shown(arm['generation 1, by outputs alone'])}, {GENERATIONS} generations' mean "
            f"{shown(arm[f'{GENERATIONS} generations, their mean, by outputs alone'])}, as many networks alone "
            f"{shown(arm[INDEPENDENT])}, the control with shuffled outputs {shown(arm[DKPP])} %"
        )
    return {"born_again_network": lines + unseen(told["claims"])}


def main() -> None:
    ledger, digits = Ledger(CACHE / "born_again_network.json"), load_data("digits")
    told, gains = {}, {}
    for setting, (wrong, passes) in SETTINGS.items():
        runs = [
            ledger.once(f"{setting}, seed {s}", lambda w=wrong, p=passes, s=s: arms(digits, w, p, s))
            for s in range(SEEDS)
        ]
        told[setting] = by_name(runs)
        mean = f"{GENERATIONS} generations, their mean, by outputs alone"
        gains[setting] = {
            "generation 1": apart(runs, "generation 1, by outputs alone", FIRST),
            "mean": apart(runs, mean, FIRST),
            "mean over alone": apart(runs, mean, INDEPENDENT),
            "control": apart(runs, "generation 1, by outputs alone", DKPP),
        }
    claims = claims_of(gains)
    names = next(iter(told.values()))
    rows = [[name, *(shown(arm[name]) for arm in told.values())] for name in names]
    paired = {
        "generation 1 over the first network": "generation 1",
        "the mean over the first network": "mean",
        f"the mean over that of {GENERATIONS} networks alone": "mean over alone",
        "generation 1 over the control with shuffled outputs": "control",
    }
    differences = [[text, *(shown(gain[name]) for gain in gains.values())] for text, name in paired.items()]
    text = f"""# Born-again networks (37)

{SAMPLES} digits, a perceptron of {UNITS} units, Adam at 0.003; {SEEDS} seeds, each with pictures of its own. Every
network, the first one too, is trained for as many passes from initial values of its own. Test accuracy in percent.

{table(["network", *told], rows)}

Differences in points, seed by seed, of generations taught by outputs alone:

{table(["difference", *told], differences)}

{claims_table(claims)}
"""
    values = {"arms": told, "gains": gains, "claims": claims}
    publish("born_again_network", values, text, measured(values))


if __name__ == "__main__":
    main()
