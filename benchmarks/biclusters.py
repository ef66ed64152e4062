"""Linear structure (survey 18): colours of a first layer, and biclusters of inner layers, on CIFAR-10.

Three convolutions of 5x5, three seeds. The first layer's 32 filters see six colours, and the layers above are trained
again. Kernels of the other two are approximated at equal weights: in biclusters, as one whole, and in random groups of
equal size; and at equal ranks in the metric of the weights and in that of the responses, judged by responses to test
pictures.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from _common import cifar10, claims_table, publish, unseen
from _from_scratch import vgg
from _over_seeds import Run, bench_of, over_seeds, percent, relative, right, sentence, small, whole
from karui.layers.biclustered import pairs_kernel
from karui.lowrank import BiclusteredCp, BiclusteredSvd, Monochromatic
from karui.measuring import count
from karui.model import Model
from karui.model.responses import responses
from karui.numerics.biclusters import Grid, grid_of, outer_products, two_svds
from karui.technique import Bench

PICTURES, TEST, EPOCHS, TUNING, DRAWS = 2500, 3000, 4, 2, 4
LAYERS = {"4": "32x32x5x5", "8": "48x32x5x5"}
"""The inner convolutions, by path."""


def one_seed(seed: int) -> Run:
    data = cifar10(PICTURES, seed)
    data = replace(data, test=Subset(data.test, range(TEST)))
    bench = bench_of(data, seed, EPOCHS, lr=4e-3, batch=64)
    dense = bench.fit(vgg(seed, (32, 32, 48), kernel=5, pools=(0, 1)))
    own = {"epochs": TUNING, "learning_rate": 1e-3}
    lights = {
        "dense": dense,
        "six colours": Monochromatic(colours=6, restarts=20).apply(dense, bench),
        "six colours, trained above": Monochromatic(colours=6, restarts=20, **own).apply(dense, bench),
        "outer products, 2x": BiclusteredCp(in_groups=4).apply(dense, bench),
        "two SVDs, 2x": BiclusteredSvd(ratio_in=0.65, ratio_out=0.65).apply(dense, bench),
    }
    told: Run = {
        name: {"accuracy": right(bench, light), "macs": count(light).macs, "parameters": light.parameters}
        for name, light in lights.items()
    }
    x = torch.stack([data.test[i][0] for i in range(200)])
    for path in LAYERS:
        kernel = dense.module.get_submodule(path).weight.detach().double().flatten(2)
        for name, error in grouped_errors(kernel, seed).items():
            told.setdefault(name, {})[f"error {path}"] = error
        for name, error in metric_errors(dense, bench, path, x).items():
            told.setdefault(name, {})[f"error {path}"] = error
    return told


def grouped_errors(kernel: Tensor, seed: int) -> dict[str, float]:
    """Relative errors at equal weights, by outer products in 4 x 2 groups and by two SVDs in 2 x 2."""
    filters, channels, taps = kernel.shape
    found, generator = {}, torch.Generator().manual_seed(seed)
    for name, groups, fit, spent, alone in (
        ("outer products", (4, 2), lambda b: outer_products(b, 4), 8 * 4 * (channels // 4 + taps + filters // 2), 1),
        ("two SVDs", (2, 2), lambda b: two_svds(b, 6, 6), 2 * 6 * (channels + filters) + 4 * taps * 36, 2),
    ):
        ranks = range(1, 33)
        size = {k: k * (channels + filters) + taps * k**alone for k in ranks}
        rank = min((k for k in ranks if size[k] >= spent), default=32)  # no fewer weights than the groups have
        plain = outer_products if alone == 1 else lambda b, k: two_svds(b, k, k)
        one = Grid(torch.arange(filters)[None], torch.arange(channels)[None])
        grid = grid_of(kernel, *groups, seed=seed)
        found[f"{name}, clustered"] = relative(pairs_kernel(*fit(grid.blocks(kernel))), grid.sorted(kernel))
        found[f"{name}, one group"] = relative(pairs_kernel(*plain(one.blocks(kernel), rank)), kernel)
        chance = []
        for _ in range(DRAWS):
            rows, columns = (torch.randperm(size, generator=generator) for size in (filters, channels))
            drawn = Grid(rows.reshape(groups[1], -1), columns.reshape(groups[0], -1))
            chance.append(relative(pairs_kernel(*fit(drawn.blocks(kernel))), drawn.sorted(kernel)))
        found[f"{name}, random groups"] = mean(chance)
    return found


def metric_errors(dense: Model, bench: Bench, path: str, x: Tensor) -> dict[str, float]:
    """Relative errors of the responses to held-out pictures, fitted to weights and to responses."""
    (one,) = responses(dense.module, dense.module, path, [(x,)])
    found = {}
    for name, metric in (("weights", "l2"), ("responses", "datacov")):
        for form, step in (
            ("outer products", BiclusteredCp(in_groups=4, metric=metric, images=300, ranks=((path, 4),))),
            ("two SVDs", BiclusteredSvd(metric=metric, images=300, ranks=((path, 6, 6),))),
        ):
            light = step.apply(dense, bench)
            with torch.no_grad():
                found[f"{form}, metric of {name}"] = relative(light.module.get_submodule(path)(one.given), one.wanted)
    return found


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of the three."""
    runs, where = told["runs"], f"CIFAR-10, {PICTURES:,} pictures, 3 seeds"
    forms = {"biclustered_cp": "outer products", "biclustered_svd": "two SVDs"}

    def missed(word: str) -> list[str]:
        return unseen({claim: held for claim, held in told["claims"].items() if word in claim})

    lines = {
        "monochromatic": [
            (
                f"{where}, first layer of 32 filters of 5x5, accuracy in %: "
                f"{sentence(runs, 'accuracy', percent, ('dense', 'six colours', 'six colours, trained above'))}"
            ),
            *missed("colours"),
        ]
    }
    for slug, form in forms.items():
        grids = [f"{form}, {groups}" for groups in ("clustered", "one group", "random groups")]
        metrics = [f"{form}, metric of {name}" for name in ("weights", "responses")]
        lines[slug] = [
            (
                f"{where}, whole network, accuracy in % without training: "
                f"{sentence(runs, 'accuracy', percent, ('dense', f'{form}, 2x'))}"
            ),
            *(
                f"{shape} kernel, relative error at equal weights: {sentence(runs, f'error {path}', small, grids)}; "
                f"error of held-out responses: {sentence(runs, f'error {path}', small, metrics)}"
                for path, shape in LAYERS.items()
            ),
            *missed(form),
        ]
    return lines


def main() -> None:
    runs = over_seeds("biclusters", one_seed)
    told = runs.told()
    errors = [f"error {path}" for path in LAYERS]
    claims = {
        "six colours: within 1 point of dense after training above": runs.mean("six colours, trained above")
        >= runs.mean("dense") - 1
    }
    for form in ("outer products", "two SVDs"):
        for other in ("one group", "random groups"):
            claims[f"{form}: clustered below {other} at equal weights, every seed and layer"] = all(
                runs.always(f"{form}, clustered", f"{form}, {other}", error) for error in errors
            )
        claims[f"{form}: lower held-out response error in the metric of the responses, every seed and layer"] = all(
            runs.always(f"{form}, metric of responses", f"{form}, metric of weights", error) for error in errors
        )
    columns = {
        "accuracy": ("test accuracy, %", percent),
        "macs": ("multiply-adds", whole),
        "parameters": ("parameters", whole),
        **{f"error {path}": (f"error, {shape}", small) for path, shape in LAYERS.items()},
    }
    text = f"""# Colours and biclusters (18)

CIFAR-10, {PICTURES:,} training pictures, {EPOCHS} epochs, three convolutions of 5x5 with batch normalisation; judged on
{TEST:,} test pictures; {len(runs.seeds)} seeds, mean and 95 % interval. Six colours are trained above for {TUNING}
epochs; the whole networks in biclusters are not trained. Errors are relative: of kernels at equal weights (outer
products in 4 x 2 groups, 4 each; two SVDs in 2 x 2, ranks 6 and 6; random groups: the mean of {DRAWS} draws), and
for the two metrics of responses to held-out pictures.

{runs.table(columns)}

{claims_table(claims)}
"""
    values = {"runs": told, "claims": claims}
    publish("biclusters", values, text, measured(values))


if __name__ == "__main__":
    main()
