"""Low-rank regularisation (survey 22): the closed form after training, and the factored network from scratch.

The digits, seven 3x3 convolutions, three seeds. A trained network is factored at three times fewer multiply-adds a
layer: errors of its kernels beside CP (survey 17) at equal cost, and accuracy before and after one epoch, beside random
factors trained as long. From scratch, at half the multiply-adds: with batch normalisation and without, beside the dense
network with it.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

from _common import claims_table, publish, unseen
from _over_seeds import (
    Run,
    convolutions,
    digits_bench,
    over_seeds,
    percent,
    right,
    sentence,
    small,
    whole,
    with_random_factors,
)
from karui.layers.axes import axis_stages, chain_cost
from karui.lowrank import LowRankRegularization
from karui.measuring import count
from karui.model import Model
from karui.numerics.cp_fit import cp

EPOCHS, RATE = 10, 1e-2
FIRST = ("convs.0",)


def untrained(seed: int, *, norm: bool = True) -> Model:
    return convolutions(seed, (16, 24, 32, 48, 48, 48, 48), pooled=(2,), norm=norm)


def one_seed(seed: int) -> Run:
    bench, tuning = digits_bench(seed, EPOCHS, lr=RATE), digits_bench(seed, 1, lr=3e-3)
    dense = bench.fit(untrained(seed))
    bare = LowRankRegularization(share=1 / 3, skip=FIRST, epochs=0).apply(dense, bench)
    scratch: dict[str, Any] = {"scratch": True, "share": 0.5, "skip": FIRST, "epochs": EPOCHS}
    bare_net = untrained(seed, norm=False)
    lights = {
        "dense": dense,
        "closed form, bare": bare,
        "closed form, one epoch": tuning.fit(bare),
        "random factors, one epoch": tuning.fit(with_random_factors(bare)),
        "from scratch, normalised": LowRankRegularization(**scratch).apply(bare_net, bench),
        "from scratch, not normalised": LowRankRegularization(**scratch, normalise=False).apply(bare_net, bench),
    }
    told: Run = {
        name: {"accuracy": right(bench, light), "macs": count(light).macs, "parameters": light.parameters}
        for name, light in lights.items()
    }
    errors = kernel_errors(dense, bare)
    return {**told, **{name: {"error": mean(found)} for name, found in errors.items()}}


def kernel_errors(dense: Model, bare: Model) -> dict[str, list[float]]:
    """Relative errors of the factored kernels, and those of CP at as many multiply-adds."""
    found: dict[str, list[float]] = {"closed form": [], "CP, least squares": [], "CP, greedy": []}
    (note,) = (step for step in bare.lineage if "factored" in getattr(step, "settings", {}))
    for entry in note.settings["factored"]:  # pyright: ignore[reportAttributeAccessIssue]
        conv: Any = dense.module.get_submodule(entry["layer"])
        unit = chain_cost(axis_stages(conv, 1), (1, 1))[1] / conv.weight.numel()
        rank = round(entry["macs"][1] / entry["macs"][0] / unit)
        found["closed form"].append(entry["error"])
        for name, solver in (("CP, least squares", "nls"), ("CP, greedy", "greedy")):
            error = cp(conv.weight.detach(), rank, solver=solver, restarts=0, sweeps=50, iterations=10).error  # pyright: ignore[reportArgumentType]
            found[name].append(error)
    return found


WAYS = ("closed form, bare", "closed form, one epoch", "random factors, one epoch")
SCRATCH = ("from scratch, normalised", "from scratch, not normalised")
FORMS = ("closed form", "CP, least squares", "CP, greedy")


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    runs = told["runs"]
    lines = [
        (
            f"digits, seven 3x3 convolutions, 3 seeds, accuracy in %, at a third of the MACs: "
            f"{sentence(runs, 'accuracy', percent, ('dense', *WAYS))}"
        ),
        f"from scratch, at half of them: {sentence(runs, 'accuracy', percent, SCRATCH)}",
        f"mean error of trained kernels at a third of the MACs: {sentence(runs, 'error', small, FORMS)}",
    ]
    return {"low_rank_regularization": lines + unseen(told["claims"])}


def main() -> None:
    runs = over_seeds("low_rank_regularization", one_seed)
    told = runs.told()
    closed, least, greedy = FORMS
    tuned, drawn = WAYS[1:]
    claims = {
        "lower kernel error than CP by least squares at equal cost, every seed": runs.always(closed, least, "error"),
        "lower kernel error than greedy CP at equal cost, every seed": runs.always(closed, greedy, "error"),
        "within 1 point of dense after one epoch": runs.mean(tuned) >= runs.mean("dense") - 1,
        "random factors are worse after the same epoch": runs.mean(drawn) < runs.mean(tuned),
        "from scratch, normalised: within 0.7 points of dense": runs.mean(SCRATCH[0]) >= runs.mean("dense") - 0.7,
        "without normalisation it is worse by a point": runs.mean(SCRATCH[1]) < runs.mean(SCRATCH[0]) - 1,
    }
    columns = {
        "accuracy": ("test accuracy, %", percent),
        "macs": ("multiply-adds", whole),
        "parameters": ("parameters", whole),
        "error": ("mean error of kernels", small),
    }
    text = f"""# Low-rank regularisation (22)

The digits, seven 3x3 convolutions, {EPOCHS} epochs, {len(runs.seeds)} seeds, mean and 95 % interval; the first one is
left. After training the layers do a third of their multiply-adds; CP is at as many. From scratch they do half.

{runs.table(columns)}

{claims_table(claims)}
"""
    values = {"runs": told, "claims": claims}
    publish("low_rank_regularization", values, text, measured(values))


if __name__ == "__main__":
    main()
