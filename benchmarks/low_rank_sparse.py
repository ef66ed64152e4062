"""Low rank plus sparse (survey 24): a planted sum, trained layers, and a whole network eight times smaller.

A perceptron of three hidden layers of 128 units on the digits, three seeds, no labels but for retraining. A sum of a
matrix of rank 6 and 2 % large entries is fitted on the network's hidden activations at an eighth of its numbers; so are
the weights of its second and third hidden layer, for responses and for the weights themselves; last, the whole network,
beside the SVD of its weights and magnitude pruning at as many numbers. An entry of the sparse part counts one and a
half numbers, for its index, in the network; in the planted sum, as in the paper, one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from _common import claims_table, publish, unseen
from _over_seeds import Run, digits_bench, over_seeds, percent, right, sentence, small
from karui.architectures.perceptron import perceptron
from karui.layers.factored import FactoredLinear
from karui.lowrank import LowRankAndSparse
from karui.lowrank.low_rank_sparse import ENTRY
from karui.model import Classification, Model, replace_layers
from karui.model.responses import responses
from karui.numerics.bilateral import keep_largest, low_rank_sparse
from karui.numerics.regression import Moments
from karui.numerics.svd import truncated_svd
from karui.technique import Bench

UNITS, SHARE, TUNING = 128, 1 / 8, (2, 6)
LAYERS = {"second hidden layer": 1, "third hidden layer": 2}
PLANTED = {"mix": (6, 512), "low rank only": (8, 0), "sparse only": (0, 2048)}
"""By kind, the rank and the entries of an eighth of the numbers of a matrix of 128 by 128."""
TRAINED = {"mix": (4, 682), "low rank only": (8, 0), "sparse only": (0, 1365)}
"""The same where an entry counts one and a half."""


def linear_layers(model: Model) -> list[tuple[str, nn.Linear]]:
    return [(path, one) for path, one in model.module.named_modules() if isinstance(one, nn.Linear)]


def given_to(model: Model, path: str, data: Any) -> Tensor:
    """What a layer is given."""
    x = torch.stack([data[i][0] for i in range(len(data))])
    (one,) = responses(model.module, model.module, path, [(x,)])
    return one.given.double()


def fits(weight: Tensor, x: Tensor, held: Tensor, sizes: dict[str, tuple[int, int]]) -> Iterator[tuple[str, float]]:
    """Relative errors of held-out responses, fitted to responses and to weights, at each kind's sizes."""
    moments, eye = Moments.of(x, x @ weight.T), torch.eye(weight.shape[1]).double()
    wanted = held @ weight.T
    for kind, (rank, entries) in sizes.items():
        for name, yx, xx, yy in (
            ("", moments.yx, moments.xx, float(moments.yy.trace())),
            (", fitted to weights", weight, eye, float(weight.square().sum())),
        ):
            made = held @ low_rank_sparse(yx, xx, yy, rank, entries).matrix().T
            yield f"{kind}{name}", float((made - wanted).norm() / wanted.norm())


def one_seed(seed: int) -> Run:
    bench = digits_bench(seed, 10, lr=2e-3)
    torch.manual_seed(seed)
    net = perceptron((64, UNITS, UNITS, UNITS, 10))
    model = bench.fit(Model(net.eval(), example=(torch.zeros(2, 1, 8, 8),), task=Classification()))
    layers = linear_layers(model)
    told: Run = {}
    path = layers[2][0]
    planted = torch.randn(UNITS, 6).double() @ torch.randn(6, UNITS).double() / 6**0.5
    planted.view(-1)[torch.randperm(UNITS**2)[:328]] += 4 * torch.randn(328).double()
    x, held = (given_to(model, path, data) for data in (bench.train, bench.test))
    for name, error in fits(planted, x, held, PLANTED):
        told.setdefault(name, {})["planted"] = error
    for layer, number in LAYERS.items():
        path, linear = layers[number]
        x, held = (given_to(model, path, data) for data in (bench.train, bench.test))
        for name, error in fits(linear.weight.detach().double(), x, held, TRAINED):
            told.setdefault(name, {})[layer] = error
    for name, light in networks(model, bench).items():
        told[name] = {"accuracy": right(bench, light)}
    return told


def networks(model: Model, bench: Bench) -> dict[str, Model]:
    """The whole network eight times smaller, in several ways."""
    svd, pruned = {}, model.copy()
    for path, layer in linear_layers(model):
        weight = layer.weight.detach()
        rank = max(1, int(SHARE * weight.numel() / sum(weight.shape)))
        svd[path] = FactoredLinear(weight.shape[1], rank, weight.shape[0], bias=True)
        with torch.no_grad():
            left, right_ = truncated_svd(weight, rank).factors()
            svd[path][0].weight.copy_(right_)
            svd[path][1].weight.copy_(left)
            svd[path][1].bias.copy_(layer.bias)
            kept = keep_largest(weight, int(SHARE * weight.numel() / ENTRY))
            pruned.module.get_submodule(path).weight.copy_(kept)  # pyright: ignore[reportCallIssue]
    whole: dict[str, Any] = {"budget": SHARE, "images": 1000}
    tuned = {
        f"the sum, {epochs} epochs": LowRankAndSparse(**whole, epochs=epochs, learning_rate=2e-3) for epochs in TUNING
    }
    return {
        "dense": model,
        "the sum": LowRankAndSparse(**whole).apply(model, bench),
        "the sum, each layer on the dense network's inputs": LowRankAndSparse(**whole, asymmetric=False).apply(
            model, bench
        ),
        "SVD of the weights": replace_layers(model, svd),
        "magnitude pruning": pruned,
        **{name: step.apply(model, bench) for name, step in tuned.items()},
    }


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    runs = told["runs"]
    ways = [way for way in runs if "accuracy" in runs[way]]
    blind = "mix, fitted to weights"
    lines = [
        (
            "digits, a perceptron eight times smaller, 3 seeds, accuracy in % (retrained where epochs are told): "
            f"{sentence(runs, 'accuracy', percent, ways)}"
        ),
        f"a planted sum, relative error of held-out responses: {sentence(runs, 'planted', small, list(PLANTED))}",
        *(f"{layer}, an eighth of the numbers: {sentence(runs, layer, small, [*TRAINED, blind])}" for layer in LAYERS),
    ]
    return {"low_rank_sparse": lines + unseen(told["claims"])}


def main() -> None:
    runs = over_seeds("low_rank_sparse", one_seed)
    told = runs.told()
    plain, own, svd, pruned = (
        "the sum", "the sum, each layer on the dense network's inputs", "SVD of the weights", "magnitude pruning",
    )  # fmt: skip
    claims = {
        "planted sum: the mix beats low rank only and sparse only, every seed": all(
            runs.always("mix", other, "planted") for other in ("low rank only", "sparse only")
        ),
        "trained layers: fitted to data, a quarter below fitted to weights, every seed": all(
            runs.always("mix", "mix, fitted to weights", layer, 0.75) for layer in LAYERS
        ),
        "trained layers: the mix at half of the error of sparse only, every seed": all(
            runs.always("mix", "sparse only", layer, 0.5) for layer in LAYERS
        ),
        "whole network: ahead of pruning and of the SVD of the weights before retraining": runs.mean(plain)
        > max(runs.mean(svd), runs.mean(pruned)),
        "within 1 point of dense after two epochs": runs.mean("the sum, 2 epochs") >= runs.mean("dense") - 1,
        "within 1 point of dense after six epochs (looked at beside the two of the paper)": runs.mean(
            "the sum, 6 epochs"
        )
        >= runs.mean("dense") - 1,
        "fitting on the compressed network's inputs is no worse": runs.mean(plain) >= runs.mean(own),
    }
    columns = {
        "planted": ("planted sum", small),
        **{layer: (layer, small) for layer in LAYERS},
        "accuracy": ("test accuracy, %", percent),
    }
    text = f"""# Low rank plus sparse (24)

The digits, a perceptron of three hidden layers of {UNITS} units, {len(runs.seeds)} seeds, mean and 95 % interval.
Relative errors of held-out responses of single layers at an eighth of their numbers, then accuracy of the whole network
at as many, without retraining but where epochs are told.

{runs.table(columns)}

{claims_table(claims)}
"""
    values = {"runs": told, "claims": claims}
    publish("low_rank_sparse", values, text, measured(values))


if __name__ == "__main__":
    main()
