"""Lottery tickets (66): the digits at 64-300-100-10 with both controls in every round, and the paper's XOR experiment.

XOR: networks of ten hidden units that learn it are pruned to two units, those of largest product of in- and outgoing
magnitudes, and trained again from their own initial values; beside them the same units drawn anew, and two units of the
ten by chance.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from _common import CACHE, Ledger, claims_table, interval, publish, shown, table, unseen
from _mlp import bench_of, mlp
from karui.data import Splits, load_data
from karui.sparsify.lottery_ticket import ANEW, MOVED, OWN, LotteryTicket

SEEDS, ROUNDS, EPOCHS = 5, 14, 12
NETWORKS, HIDDEN, STEPS, LR = 2000, 10, 2000, 1e-2
INPUTS, TARGETS = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), torch.tensor([0.0, 1.0, 1.0, 0.0])

Parameters = tuple[Tensor, Tensor, Tensor, Tensor]


def study(digits: Splits, seed: int) -> list[dict[str, Any]]:
    """All rounds and controls of one seed; Glorot normal values, as in the paper."""
    technique, bench = (
        LotteryTicket(rounds=ROUNDS, epochs=EPOCHS, draw=False),
        bench_of(digits, EPOCHS, seed, lr=2e-3, batch=60),
    )
    return technique.study(mlp(64, 300, 100, 10, seed=seed, glorot=True), bench).to_json()["trials"]


def draw(networks: int, hidden: int, generator: torch.Generator) -> Parameters:
    """Glorot normal weights and no biases, for many networks at once."""
    inner, outer = (2 / (2 + hidden)) ** 0.5, (2 / (hidden + 1)) ** 0.5
    return (
        inner * torch.randn(networks, hidden, 2, generator=generator),
        torch.zeros(networks, hidden),
        outer * torch.randn(networks, hidden, generator=generator),
        torch.zeros(networks, 1),
    )


def logits(parameters: Parameters) -> Float[Tensor, "networks samples"]:
    first, first_bias, second, second_bias = parameters
    hidden = (torch.einsum("nhi,si->nsh", first, INPUTS) + first_bias[:, None]).relu()
    return torch.einsum("nsh,nh->ns", hidden, second) + second_bias


def train(start: Parameters) -> tuple[Parameters, Tensor]:
    """Each network by itself (Adam works on each weight alone); the step since which it makes no error, or -1."""
    moved = [part.clone().requires_grad_() for part in start]
    optimizer = torch.optim.Adam(moved, lr=LR)
    since = torch.full((len(start[0]),), -1)
    for step in range(STEPS):
        optimizer.zero_grad()
        told = logits((moved[0], moved[1], moved[2], moved[3]))
        right = ((told > 0).float() == TARGETS).all(1)
        since = torch.where(right, torch.where(since < 0, step, since), -1)
        targets = TARGETS.expand_as(told)
        functional.binary_cross_entropy_with_logits(told, targets, reduction="sum").backward()
        optimizer.step()
    first, first_bias, second, second_bias = (part.detach() for part in moved)
    return (first, first_bias, second, second_bias), since


def units(parameters: Parameters, keep: Int[Tensor, "networks kept"]) -> Parameters:
    """The networks with these hidden units only."""
    first, first_bias, second, second_bias = parameters
    rows = torch.arange(len(keep))[:, None]
    return first[rows, keep], first_bias[rows, keep], second[rows, keep], second_bias


def xor() -> dict[str, dict[str, float]]:
    """How often, and how soon, two units make no error any more."""
    generator = torch.Generator().manual_seed(0)
    start = draw(NETWORKS, HIDDEN, generator)
    trained, since = train(start)
    told = {"all ten units": outcome(since)}
    learned = since >= 0
    start, trained = (tuple(part[learned] for part in parts) for parts in (start, trained))
    kept, count = (start, trained), int(learned.sum())
    product = trained[0].abs().sum(2) * trained[2].abs()
    arms = {"two units, own values, one shot": units(start, product.topk(2, dim=1).indices)}
    current, outcome_of = kept
    for remaining in range(HIDDEN - 1, 1, -1):
        chosen = (outcome_of[0].abs().sum(2) * outcome_of[2].abs()).topk(remaining, dim=1).indices
        current = units(current, chosen)
        outcome_of = train(current)[0]
    arms["two units, own values, one unit a round"] = current
    arms["two of the ten by chance, own values"] = units(
        start, torch.rand(count, HIDDEN, generator=generator).topk(2).indices
    )
    arms["two units of ten, drawn anew"] = units(draw(count, HIDDEN, generator), torch.arange(2).expand(count, 2))
    arms["two units, drawn for two"] = draw(count, 2, generator)
    return told | {name: outcome(train(arm)[1]) for name, arm in arms.items()}


def outcome(since: Int[Tensor, " networks"]) -> dict[str, float]:
    done = since >= 0
    share, count = float(done.float().mean()), len(since)
    half = 1.96 * (share * (1 - share) / count) ** 0.5
    steps = float(since[done].float().median()) if done.any() else float("nan")
    return {"networks": count, "learn it, %": 100 * share, "half interval": 100 * half, "median step": steps}


def at(studies: list[list[dict[str, Any]]], kind: str, number: int, what: str) -> list[float]:
    return [t[what] for trials in studies for t in trials if t["kind"] == kind and t["round"] == number]


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    dense, xor = told["digits"][0][OWN]["accuracy"], told["xor"]
    lines = [
        f"digits, 64-300-100-10, {SEEDS} seeds, {row['kept']:.1%} of the weights: accuracy, %, ticket "
        f"{shown(row[OWN]['accuracy'])}, drawn anew {shown(row[ANEW]['accuracy'])}, rearranged "
        f"{shown(row[MOVED]['accuracy'])}, dense {shown(dense)}"
        for row in (told["digits"][11], told["digits"][14])
    ]
    names = ("two units, own values, one unit a round", "two units of ten, drawn anew")
    shares = [f"{name} {xor[name]['learn it, %']:.1f} +- {xor[name]['half interval']:.1f}" for name in names]
    lines.append(f"XOR, networks that learn it, %: {', '.join(shares)}")
    return {"lottery_ticket": lines + unseen(told["claims"])}


def main() -> None:
    ledger, digits = Ledger(CACHE / "lottery_ticket.json"), load_data("digits")
    studies = [ledger.once(f"digits, seed {s}", lambda s=s: study(digits, s)) for s in range(SEEDS)]
    units_told = ledger.once("xor", xor)
    rounds = []
    for number in range(ROUNDS + 1):
        row: dict[str, Any] = {"round": number, "kept": at(studies, OWN, number, "kept")[0]}
        for kind in (OWN, ANEW, MOVED) if number else (OWN,):
            row[kind] = {
                "accuracy": interval([100 * value for value in at(studies, kind, number, "score")]),
                "loss": mean(at(studies, kind, number, "loss")),
                "stop": mean(at(studies, kind, number, "stop")),
            }
        rounds.append(row)

    def gap(number: int, kind: str) -> float:
        return rounds[number][OWN]["accuracy"]["mean"] - rounds[number][kind]["accuracy"]["mean"]

    tickets = max(units_told[name]["learn it, %"] for name in units_told if "own values, one" in name)
    claims = {
        "9 % left: 2 points better than drawn anew and than rearranged": min(gap(11, ANEW), gap(11, MOVED)) >= 2,
        "5 % left: 3 points better than either": min(gap(14, ANEW), gap(14, MOVED)) >= 3,
        "9 % left: within a point of the dense network": (
            rounds[11][OWN]["accuracy"]["mean"] >= rounds[0][OWN]["accuracy"]["mean"] - 1
        ),
        "21 % left: the smallest validation loss comes no later than the dense network's": (
            rounds[7][OWN]["stop"] <= rounds[0][OWN]["stop"]
        ),
        "XOR: two units learn it oftener from their own values than drawn anew": (
            tickets > units_told["two units of ten, drawn anew"]["learn it, %"]
        ),
    }
    head = [
        "round",
        "left",
        *(f"{kind}: {what}" for kind in (OWN, ANEW, MOVED) for what in ("accuracy", "loss", "stop")),
    ]
    rows = [
        [str(row["round"]), f"{row['kept']:.1%}"]
        + [
            cell
            for kind in (OWN, ANEW, MOVED)
            for cell in (
                [shown(row[kind]["accuracy"]), f"{row[kind]['loss']:.3f}", f"{row[kind]['stop']:.0f}"]
                if kind in row
                else ["", "", ""]
            )
        ]
        for row in rounds
    ]
    xor_rows = [
        [name, str(t["networks"]), f"{t['learn it, %']:.1f} +- {t['half interval']:.1f}", f"{t['median step']:.0f}"]
        for name, t in units_told.items()
    ]
    text = f"""# Lottery tickets (66)

Digits, 64-300-100-10, {EPOCHS} epochs a round, {SEEDS} seeds: test accuracy in percent with its 95 % interval, test
loss, and the step of the smallest validation loss.

{table(head, rows)}

XOR, ten hidden units pruned to two, {STEPS} steps; networks that make no error at the end, and the median step since
which they make none:

{table(["network", "networks", "learn it, %", "median step"], xor_rows)}

{claims_table(claims)}
"""
    values = {"digits": rounds, "xor": units_told, "claims": claims}
    publish("lottery_ticket", values, text, measured(values))


if __name__ == "__main__":
    main()
