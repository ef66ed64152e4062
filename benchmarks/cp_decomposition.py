"""CP by non-linear least squares (survey 17): its solvers, what fine-tuning repairs, and TensorLy's on public kernels.

On the digits, three seeds: the error of trained kernels by greedy deflation, alternating and non-linear least squares;
then every convolution but the first (or one of them) at four times fewer multiply-adds, bare and after two passes of
fine-tuning, beside random factors trained as long.

On kernels of ResNet-20 and ResNet-56 (CIFAR-10) and of the decoded SqueezeNet (ImageNet), at the rank of four times
fewer multiply-adds: the error at which TensorLy's `parafac` (alternating least squares) ends, that of karui's, and the
processor time that each takes to TensorLy's error, in turns. Both start from singular vectors.
"""

from __future__ import annotations

import time
import warnings
from contextlib import suppress
from statistics import median
from typing import Any

import numpy as np
import torch
from tensorly.decomposition import parafac
from torch import Tensor, nn

from _common import CACHE, Ledger, claims_table, data_folder, publish, table, unseen
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
from karui.lowrank import CpDecomposition
from karui.measuring import count
from karui.numerics.cp_fit import Solver, cp

PLACES = {"32x16, rank 8": ("convs.1", 8), "32x16, rank 16": ("convs.1", 16), "48x32, rank 16": ("convs.2", 16)}
SOLVERS: tuple[Solver, ...] = ("greedy", "als", "nls")
PUBLIC = {
    "resnet20": ("cifar10_resnets/resnet20.npz", "conv", 1),
    "resnet56": ("cifar10_resnets/resnet56.npz", "conv", 3),
    "squeezenet": ("squeezenet_dc/squeezenet_v10_decoded.npz", "expand3x3", 1),
}
"""By network, its weights, what names of the kernels hold, and the step from one that is taken to the next."""
SWEEPS, ROUNDS = 100, 3


def one_seed(seed: int) -> Run:
    bench = digits_bench(seed, 12, lr=2e-2)
    dense = bench.fit(convolutions(seed))
    told: Run = {"dense": {"accuracy": right(bench, dense), "macs": count(dense).macs}}
    for solver in SOLVERS:
        told[solver] = {}
        for place, (path, rank) in PLACES.items():
            kernel = dense.module.get_submodule(path).weight.detach()
            told[solver][place] = cp(kernel, rank, solver=solver, restarts=2, sweeps=300).error
    tuning = digits_bench(seed, 2, lr=3e-3)
    bare = CpDecomposition(skip=("convs.0",), epochs=0).apply(dense, bench)
    one = CpDecomposition(skip=("convs.0", "convs.1", "convs.3"), epochs=0).apply(dense, bench)
    (note,) = (step for step in bare.lineage if "factored" in getattr(step, "settings", {}))
    told["three layers, bare"] = {"error": min(entry["error"] for entry in note.settings["factored"])}  # pyright: ignore[reportAttributeAccessIssue]
    lights = {
        "three layers, bare": bare,
        "three layers, fine-tuned": tuning.fit(bare),
        "three layers, random factors": tuning.fit(with_random_factors(bare)),
        "one layer, bare": one,
        "one layer, fine-tuned": tuning.fit(one),
        "one layer, random factors": tuning.fit(with_random_factors(one)),
    }
    for name, light in lights.items():
        told.setdefault(name, {}).update(accuracy=right(bench, light), macs=count(light).macs)
    return told


def public_kernels() -> dict[str, Tensor]:
    """3x3 kernels of published networks, by network and layer; without the first convolutions."""
    found = {}
    for network, (file, word, step) in PUBLIC.items():
        weights = np.load(data_folder() / file)
        names = [name for name in weights.files if word in name and weights[name].shape[2:] == (3, 3)]
        for name in names[::step]:
            if weights[name].shape[1] > 3:
                found[f"{network} {name.removesuffix('.weight')}"] = torch.from_numpy(weights[name]).double()
    return found


def quarter_rank(kernel: Tensor) -> int:
    """The rank whose chain does a quarter of the multiply-adds."""
    conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1)
    return max(1, int(kernel.numel() / 4 / chain_cost(axis_stages(conv, 1), (1, 1))[1]))


class _ReachedError(Exception):
    """Stops a fit that only the time to an error is wanted of."""


def raced(kernel: Tensor) -> dict[str, float]:
    """Errors at the end, and the median seconds of processor time that each takes to TensorLy's error."""
    rank, array = quarter_rank(kernel), kernel.numpy()
    start = time.process_time()
    found = cp(kernel, rank, restarts=0, sweeps=SWEEPS)
    told = {"rank": rank, "karui": found.error, "whole": time.process_time() - start}
    theirs, ours = [], []
    for _ in range(ROUNDS):
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of modes that are smaller than the rank
            options: Any = {"n_iter_max": SWEEPS, "tol": 1e-8, "init": "svd", "random_state": 0, "return_errors": True}
            _, errors = parafac(array, rank, **options)
        theirs.append(time.process_time() - start)
        goal = float(errors[-1])

        def watch(_solver: str, _step: int, error: float, goal: float = goal) -> None:
            if error <= goal:
                raise _ReachedError

        start = time.process_time()
        with suppress(_ReachedError):
            cp(kernel, rank, restarts=0, sweeps=SWEEPS, watch=watch)
        ours.append(time.process_time() - start)
        told["TensorLy"] = goal
    return {**told, "TensorLy, s": median(theirs), "karui, s": median(ours)}


def raced_table(layers: dict[str, dict[str, float]]) -> str:
    """Layers of a network and shape together."""
    rows = []
    for network in PUBLIC:
        mine = [one for name, one in layers.items() if name.startswith(network)]
        for shape in dict.fromkeys(one["shape"] for one in mine):
            alike = [one for one in mine if one["shape"] == shape]
            gains = [one["TensorLy"] - one["karui"] for one in alike]
            times = sorted(one["TensorLy, s"] / one["karui, s"] for one in alike)
            rows.append(
                [
                    network,
                    str(shape),
                    str(len(alike)),
                    f"{alike[0]['rank']:.0f}",
                    f"{np.mean([one['TensorLy'] for one in alike]):.4f}",
                    f"{np.mean([one['karui'] for one in alike]):.4f}",
                    f"{min(gains):.5f} to {max(gains):.5f}",
                    f"{median(times):.1f} ({times[0]:.1f} to {times[-1]:.1f})",
                    f"{np.mean([one['TensorLy, s'] for one in alike]):.2f}",
                    f"{np.mean([one['whole'] for one in alike]):.2f}",
                ]
            )
    head = ["network", "kernel", "layers", "rank", "error, TensorLy", "error, karui", "lower by"]
    head += ["times faster to TensorLy's error: median (range)", "TensorLy, s", "karui to its own end, s"]
    return table(head, rows)


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    runs, layers = told["runs"], told["layers"]
    ways = [way for way in runs if "layer" in way]
    speed = sorted(one["TensorLy, s"] / one["karui, s"] for one in layers.values())
    lines = [
        (
            f"digits, four 3x3 convolutions, 3 seeds, four times fewer MACs, accuracy in %: dense "
            f"{percent(runs['dense']['accuracy'])}; {sentence(runs, 'accuracy', percent, ways)}"
        ),
        *(f"error of trained kernels, {place}: {sentence(runs, place, small, SOLVERS)}" for place in PLACES),
        (
            f"{len(layers)} kernels of ResNet-20, ResNet-56 and SqueezeNet at four times fewer MACs, beside TensorLy's "
            f"parafac: error lower in {sum(one['karui'] <= one['TensorLy'] for one in layers.values())} of them; "
            f"{median(speed):.1f} times faster to its error ({speed[0]:.1f} to {speed[-1]:.1f})"
        ),
    ]
    return {"cp_decomposition": lines + unseen(told["claims"])}


def main() -> None:
    runs = over_seeds("cp_decomposition", one_seed)
    told = runs.told()
    ledger = Ledger(CACHE / "cp_decomposition.json")
    layers: dict[str, dict[str, Any]] = {}
    for name, kernel in public_kernels().items():
        one = ledger.once(name, lambda kernel=kernel: raced(kernel))
        layers[name] = {**one, "shape": "x".join(map(str, kernel.shape))}
    dense = runs.mean("dense")
    eighth, *sixteenth = PLACES

    def below(place: str) -> float:
        return 1 - runs.mean("als", place) / runs.mean("greedy", place)

    claims = {
        "alternating least squares 3 % below deflation at rank 8": below(eighth) >= 0.03,
        "and 6 % at rank 16": min(map(below, sixteenth)) >= 0.06,
        "non-linear least squares never above alternating, nor that above deflation": all(
            run["nls"][place] <= run["als"][place] <= run["greedy"][place] for run in runs.seeds for place in PLACES
        ),
        "one layer at four times fewer multiply-adds: within 1 point after fine-tuning": runs.mean(
            "one layer, fine-tuned"
        )
        >= dense - 1,
        "three layers: within 1 point after fine-tuning": runs.mean("three layers, fine-tuned") >= dense - 1,
        "random factors trained as long are worse, one layer and three": all(
            runs.mean(f"{part}, random factors") < runs.mean(f"{part}, fine-tuned")
            for part in ("one layer", "three layers")
        ),
        "a large error (over a quarter in every layer) is repaired by fine-tuning": all(
            run["three layers, bare"]["error"] > 0.25 for run in runs.seeds
        )
        and runs.mean("three layers, fine-tuned") > runs.mean("three layers, bare") + 1,
        "no less accurate than TensorLy's parafac on every public kernel": all(
            one["karui"] <= one["TensorLy"] for one in layers.values()
        ),
        "and not slower to its error": all(one["karui, s"] <= one["TensorLy, s"] for one in layers.values()),
    }
    solvers = [[solver, *(small(told[solver][place]) for place in PLACES)] for solver in SOLVERS]
    nets = [[way, whole(one["macs"]), percent(one["accuracy"])] for way, one in told.items() if "accuracy" in one]
    text = f"""# CP by non-linear least squares (17)

The digits, four 3x3 convolutions with batch normalisation trained for 12 epochs, {len(runs.seeds)} seeds, mean and 95 %
interval. Relative errors of trained kernels (filters x channels), from three starts:

{table(["solver", *PLACES], solvers)}

At four times fewer multiply-adds a layer, the first convolution left; two passes of fine-tuning at a rate of 0.003:

{table(["", "multiply-adds", "test accuracy, %"], nets)}

Public kernels at the rank of four times fewer multiply-adds, one start from singular vectors. TensorLy's `parafac` in
numpy, double precision, {SWEEPS} sweeps or until an improvement below 1e-8; karui's as many sweeps, then non-linear
least squares; of ResNet-56 every third kernel. Processor time of one thread, medians of {ROUNDS} in turns.

{raced_table(layers)}

{claims_table(claims)}
"""
    publish("cp_decomposition", values := {"runs": told, "layers": layers, "claims": claims}, text, measured(values))


if __name__ == "__main__":
    main()
