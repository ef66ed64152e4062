"""Compression-aware training (survey 28): ranks and units that fall while a network trains, and factoring after it.

The digits, four 3x3 convolutions with batch normalisation, three seeds, as many epochs for all. Networks under three
thresholds on singular values, under one on units, and under both, beside the ordinary one; each is factored without
fine-tuning, at the ranks that it reached and at a fifth of the weights of its layers, and so is the ordinary one.
"""

from __future__ import annotations

from typing import Any

import torch

from _common import claims_table, publish, unseen
from _over_seeds import Run, convolutions, digits_bench, over_seeds, percent, right, sentence, whole
from karui.lowrank import CompressionAwareTraining
from karui.model import Model
from karui.numerics.svd import truncated_svd

EPOCHS, RATE, FIFTH, HALF = 14, 1e-2, 0.2, 0.4
SKIP = ("convs.0", "head")
INNER = ("convs.1", "convs.2", "convs.3")
TAUS = (0.05, 0.08, 0.12)
PRESSED: dict[str, dict[str, Any]] = {
    **{f"tau {tau}": {"tau": tau} for tau in TAUS},
    "lam 0.002": {"tau": 0.0, "lam": 0.002},
    "tau 0.05 and lam 0.002": {"tau": 0.05, "lam": 0.002},
}


def at_share(model: Model, share: float) -> Model:
    """Its layers by truncated SVD at a share of their weights."""
    return CompressionAwareTraining(skip=SKIP, share=share, epochs=0).compress(model)


def one_seed(seed: int) -> Run:
    bench = digits_bench(seed, EPOCHS, lr=RATE)
    model = convolutions(seed)
    dense = bench.fit(model)
    told: Run = {"ordinary": judged(dense, bench) | ranks_of(dense)}
    for name, settings in PRESSED.items():
        step = CompressionAwareTraining(skip=SKIP, epochs=0, **settings)
        steps = step.influence(model, bench)
        trained = bench.fit(model, influence=steps)
        light = step.compress(trained)
        told[name] = judged(trained, bench) | {
            "ranks": sum(rank for rank, _ in steps.history[-1]),
            "units": sum(units for _, units in steps.history[-1]),
            "factored at its ranks": right(bench, light),
            "parameters then": light.parameters,
        }
        told[name]["ordinary by SVD at these ranks"] = right(bench, at_ranks(dense, trained))
    return told


def judged(model: Model, bench: Any) -> dict[str, float]:
    """Accuracy as trained, and factored at two shares of the weights."""
    return {
        "accuracy": right(bench, model),
        "factored at 2/5": right(bench, at_share(model, HALF)),
        "factored at 1/5": right(bench, at_share(model, FIFTH)),
    }


def ranks_of(model: Model) -> dict[str, float]:
    """Sums over the inner layers of singular values and units that are not zero."""
    matrices = [model.module.get_submodule(path).weight.detach().flatten(1) for path in INNER]
    return {
        "ranks": sum(living_rank(one) for one in matrices),
        "units": sum(int((one.norm(dim=1) > 0).sum()) for one in matrices),
    }


def living_rank(matrix: torch.Tensor) -> int:
    values = torch.linalg.svdvals(matrix)
    return int((values > 1e-5 * values.max()).sum())


def at_ranks(dense: Model, trained: Model) -> Model:
    """The ordinary network with its inner layers cut to the ranks of another one."""
    cut = dense.copy()
    for path in INNER:
        rank = living_rank(trained.module.get_submodule(path).weight.detach().flatten(1))
        weight: Any = cut.module.get_submodule(path).weight
        with torch.no_grad():
            left, right_ = truncated_svd(weight.flatten(1), max(1, rank)).factors()
            weight.copy_((left @ right_).reshape(weight.shape))
    return cut


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    runs = told["runs"]
    lines = [
        f"digits, four 3x3 convolutions, 3 seeds, accuracy in %: {sentence(runs, 'accuracy', percent, list(runs))}",
        (
            f"sum of the ranks of three layers: {sentence(runs, 'ranks', whole, list(runs))}; of their units: "
            f"{sentence(runs, 'units', whole, list(runs))}"
        ),
        *(
            f"factored at {share} of the weights, not fine-tuned, accuracy in %: "
            f"{sentence(runs, f'factored at {share}', percent, list(runs))}"
            for share in ("2/5", "1/5")
        ),
    ]
    return {"compression_aware_training": lines + unseen(told["claims"])}


def main() -> None:
    runs = over_seeds("compression_aware_training", one_seed)
    low, middle, high = (f"tau {tau}" for tau in TAUS)
    units, both = list(PRESSED)[len(TAUS) :]
    claims = {
        **{
            f"{middle}, factored at {share} of the weights without fine-tuning: 3 points above ordinary training and "
            "SVD": runs.mean(middle, f"factored at {share}") >= runs.mean("ordinary", f"factored at {share}") + 3
            for share in ("2/5", "1/5")
        },
        f"{middle}, at the ranks that training reached: 3 points above the SVD of the ordinary network": runs.mean(
            middle, "factored at its ranks"
        )
        >= runs.mean(middle, "ordinary by SVD at these ranks") + 3,
        f"{middle}: within 1 point of ordinary training": runs.mean(middle) >= runs.mean("ordinary") - 1,
        "ranks fall as tau rises, every seed": runs.always(high, middle, "ranks") and runs.always(middle, low, "ranks"),
        "with both terms fewer ranks and fewer units than with the other term alone, within a point": runs.mean(
            both, "ranks"
        )
        < runs.mean(units, "ranks")
        and runs.mean(both, "units") < runs.mean(low, "units")
        and runs.mean(both) >= min(runs.mean(low), runs.mean(units)) - 1,
        "exact zeros in regularised spectra, none in ordinary ones": all(
            run[low]["ranks"] < run["ordinary"]["ranks"] == run["ordinary"]["units"] for run in runs.seeds
        ),
    }
    columns = {
        "accuracy": ("test accuracy, %", percent),
        "ranks": ("sum of ranks", whole),
        "units": ("units", whole),
        "parameters then": ("parameters at its ranks", whole),
        "factored at its ranks": ("factored at its ranks, %", percent),
        "ordinary by SVD at these ranks": ("ordinary at these ranks, %", percent),
        "factored at 2/5": ("factored at 2/5 of the weights, %", percent),
        "factored at 1/5": ("at 1/5, %", percent),
    }
    text = f"""# Compression-aware training (28)

The digits, four 3x3 convolutions of which the last three are factored, {EPOCHS} epochs, {len(runs.seeds)} seeds, mean
and 95 % interval; nothing is fine-tuned. The whole network has {convolutions(0).parameters:,} parameters.
A stronger lam, 0.01, silenced whole layers and left all networks at chance, alone and with tau 0.05.

{runs.table(columns)}

{claims_table(claims)}
"""
    values = {"runs": runs.told(), "claims": claims}
    publish("compression_aware_training", values, text, measured(values))


if __name__ == "__main__":
    main()
