"""Kernels or responses: low-rank expansions (13) and asymmetric reconstruction (16).

On the digits, over three seeds: errors of responses and features, and accuracy without training. On ResNet-20 with
its published CIFAR-10 weights: accuracy on all 10,000 test pictures before and after the same fine-tuning,
multiply-adds, bytes, and time in ONNX Runtime at batch sizes 1 and 64 on one thread, dense and light in turns.

Finished parts are kept in `.cache/benchmarks/low_rank_from_data`, so that a run that was killed goes on. `--only` does
one of the two parts; `--smoke` does both on little and keeps nothing.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from _common import CACHE, Ledger, cifar10, claims_table, interval, publish, shown, table
from _over_seeds import convolutions
from cifar_resnets import Case, Session, make_bench, published
from karui.data import load_data
from karui.layers.factored import factor_conv
from karui.lowrank import AsymmetricNonlinear, LowRankExpansion
from karui.measuring import count
from karui.measuring.values import bytes_text
from karui.model import Model, replace_layers
from karui.model.responses import responses
from karui.numerics.svd import truncated_svd
from karui.technique import Bench, Technique
from karui.train import Adam, Training

LAYERS = ("convs.1", "convs.2", "convs.3")


def expansions() -> dict[str, Technique]:
    """Paper 13 at three times fewer multiply-adds a layer, on all training pictures."""
    made: dict[str, Technique] = {}
    for scheme in (1, 2):
        told: dict[str, Any] = {"scheme": scheme, "speedup": 3.0}
        made[f"[13] scheme {scheme}, kernels"] = LowRankExpansion(objective="filter", **told)
        made[f"[13] scheme {scheme}, responses"] = LowRankExpansion(joint=False, **told)
        made[f"[13] scheme {scheme}, responses, joint"] = LowRankExpansion(**told)
    return made


def reconstructions() -> dict[str, Technique]:
    """Paper 16 at a fifth of the ranks."""
    return {
        "[16] linear, symmetric": AsymmetricNonlinear(ratio=0.2, nonlinear=False, asymmetric=False),
        "[16] ReLU, symmetric": AsymmetricNonlinear(ratio=0.2, asymmetric=False),
        "[16] linear, asymmetric": AsymmetricNonlinear(ratio=0.2, nonlinear=False),
        "[16] ReLU, asymmetric": AsymmetricNonlinear(ratio=0.2),
    }


def by_filters(model: Model) -> Model:
    """The layers of paper 16 from the SVD of the filters alone."""
    made = {}
    for path in LAYERS:
        conv: Any = model.module.get_submodule(path)
        rank = math.ceil(0.2 * conv.out_channels)
        left, right = truncated_svd(conv.weight.detach().flatten(1), rank).factors()
        made[path] = factor_conv(conv, right.reshape(1, rank, *conv.weight.shape[1:]), outer=left[None])
    return replace_layers(model, made)


def one_seed(seed: int) -> dict[str, Any]:
    data = load_data("digits")
    bench = Bench(
        train=data.train,
        validation=data.validation,
        test=data.test,
        training=Training(epochs=12, batch_size=32, optimizer=Adam(lr=4e-3)),
        seed=seed,
    )
    dense = bench.fit(convolutions(seed, norm=False))
    steps = {**expansions(), **reconstructions()}
    lights = {"dense": dense, **{name: step.apply(dense, bench) for name, step in steps.items()}}
    lights["[16] filters by SVD"] = by_filters(dense)
    uniform = AsymmetricNonlinear(ratio=0.4).apply(dense, bench)
    lights["[16] equal shares, 0.4"] = uniform
    ratio = count(dense).macs / count(uniform).macs
    lights["[16] ranks by search, as many MACs"] = AsymmetricNonlinear(speedup=ratio).apply(dense, bench)
    x = torch.stack([data.test[i][0] for i in range(len(data.test))])
    return {name: judged(dense, light, bench, x) for name, light in lights.items()}


def judged(dense: Model, light: Model, bench: Bench, x: Tensor) -> dict[str, float]:
    """Accuracy, multiply-adds, error of the last map, and the worst response error of a layer on the dense inputs."""
    nets: list[Any] = [dense.module.eval(), light.module.eval()]
    with torch.no_grad():
        wanted, made = (net.features(x) for net in nets)
    errors = []
    for path in LAYERS:
        (one,) = responses(dense.module, dense.module, path, [(x,)])
        with torch.no_grad():
            errors.append(float((light.module.get_submodule(path)(one.given) - one.wanted).norm() / one.wanted.norm()))
    return {
        "accuracy": 100 * bench.evaluate(light, "test").value,
        "macs": float(count(light).macs),
        "features": float((made - wanted).norm() / wanted.norm()),
        "responses": max(errors),
    }


def cases(epochs: int) -> tuple[Case, ...]:
    """The compressions of ResNet-20 at two and four times fewer multiply-adds."""

    def case(name: str, make: Callable[[int], Technique]) -> Case:
        return Case(name=name, bare=make(0), whole=make(epochs))

    def expansion(name: str, **settings: Any) -> Case:
        return case(name, lambda passes: LowRankExpansion(epochs=passes, **settings))

    def reconstruction(name: str, **settings: Any) -> Case:
        return case(name, lambda passes: AsymmetricNonlinear(epochs=passes, **settings))

    return (
        reconstruction("[16] 2x", speedup=2.0),
        reconstruction("[16] 2x, linear, symmetric", speedup=2.0, nonlinear=False, asymmetric=False),
        reconstruction("[16] 2x, split over space too", speedup=2.0, spatial_split=True),
        reconstruction("[16] 4x, split over space too", speedup=4.0, spatial_split=True),
        expansion("[13] 2x, scheme 2, kernels", objective="filter"),
        expansion("[13] 2x, scheme 2, responses, joint"),
    )


def digits_part(ledger: Ledger, seeds: int) -> tuple[dict[str, Any], str, dict[str, bool]]:
    """The digits: values, table, claims."""
    runs = [ledger.once(f"seed {seed}", lambda seed=seed: one_seed(seed)) for seed in range(seeds)]
    names = list(runs[0])
    told = {n: {key: interval([run[n][key] for run in runs]) for key in runs[0][n]} for n in names}
    rows = [
        [
            name,
            f"{one['macs']['mean']:,.0f}",
            f"{one['responses']['mean']:.3f}",
            f"{one['features']['mean']:.3f}",
            shown(one["accuracy"]),
        ]
        for name, one in told.items()
    ]

    def always(less: str, more: str, key: str, share: float = 1.0) -> bool:
        return all(run[less][key] < share * run[more][key] for run in runs)

    def mean(name: str) -> float:
        return told[name]["accuracy"]["mean"]

    two = "[13] scheme 2, "
    claims = {
        "[13] fitting responses halves the worst layer's error, scheme 2, every seed": always(
            f"{two}responses", f"{two}kernels", "responses", 0.5
        ),
        "[13] accuracy: kernels < responses <= joint, scheme 2": mean(f"{two}kernels")
        < mean(f"{two}responses")
        <= mean(f"{two}responses, joint"),
        "[16] features: ReLU asymmetric < linear asymmetric < linear symmetric < filters, every seed": always(
            "[16] ReLU, asymmetric", "[16] linear, asymmetric", "features"
        )
        and always("[16] linear, asymmetric", "[16] linear, symmetric", "features")
        and always("[16] linear, symmetric", "[16] filters by SVD", "features"),
        "[16] accuracy: ReLU asymmetric at least a point above linear symmetric": mean("[16] ReLU, asymmetric")
        >= mean("[16] linear, symmetric") + 1,
        "[16] searched ranks have the smaller feature error at equal MACs": told["[16] ranks by search, as many MACs"][
            "features"
        ]["mean"]
        < told["[16] equal shares, 0.4"]["features"]["mean"],
        "[16] searched ranks are the more accurate at equal MACs": mean("[16] ranks by search, as many MACs")
        > mean("[16] equal shares, 0.4"),
    }
    head = ["", "multiply-adds", "worst response error", "error of the last map", "test accuracy, %"]
    return told, table(head, rows), claims


def cifar_part(data: Any, folder: Path, epochs: int) -> list[dict[str, Any]]:
    """ResNet-20: a row for each compression."""
    session = Session(
        network="resnet20",
        dense=published("resnet20"),
        data=data,
        bench=make_bench(data, folder),
        ledger=Ledger(folder / "resnet20.json"),
        folder=folder,
    )
    return [session.row(case) for case in cases(epochs)]


def cifar_table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["compression", "before", "after", "MACs", "parameters", "ONNX file", "batch 1", "batch 64"]
    lines = [
        [
            row["case"],
            *(f"{100 * row[part]['value']:.2f}" for part in ("before", "after")),
            f"{row['macs'][1] / 1e6:.1f} M",
            f"{row['parameters'][1] / 1e3:.0f} k",
            bytes_text(row["onnx file"][1]),
            *(row[f"time at batch {batch}"][2] for batch in (1, 64)),
        ]
        for row in rows
    ]
    return table(head, lines)


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of each technique."""
    lines: dict[str, list[str]] = {}
    slugs = {"[16]": "asymmetric_nonlinear", "[13]": "low_rank_expansion"}
    for row in told["cifar"]:
        macs = row["macs"][0] / row["macs"][1]
        scores = [f"{100 * row[part]['value']:.1f}" for part in ("dense", "before", "after")]
        lines.setdefault(slugs[row["case"][:4]], []).append(
            f"CIFAR-10 resnet20, {row['case'][5:]}: {macs:.1f} times fewer MACs, accuracy {scores[0]} to {scores[1]} % "
            f"without training, {scores[2]} % after two passes of it (one run); ONNX Runtime, one thread, batch 64 "
            f"{row['time at batch 64'][2]}"
        )
    for claim, shown_here in told["claims"].items():
        if not shown_here:
            lines.setdefault(slugs[claim[:4]], []).append(f"not shown: {claim[5:]}")
    return lines


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--smoke", action="store_true", help="one seed, a few pictures; keeps nothing")
    options.add_argument("--epochs", type=int, default=2, help="passes of fine-tuning on CIFAR-10")
    options.add_argument("--seeds", type=int, default=3, help="seeds on the digits")
    options.add_argument("--only", choices=("digits", "cifar"), help="one part; writes no results")
    asked = options.parse_args()
    torch.set_num_threads(1)
    data = cifar10()
    if asked.smoke:
        few = replace(data, train=Subset(data.train, range(256)), test=Subset(data.test, range(300)))
        with tempfile.TemporaryDirectory() as scratch:
            print(digits_part(Ledger(Path(scratch) / "digits.json"), 2)[1])
            print(cifar_table(cifar_part(few, Path(scratch), 1)))
        return
    folder = CACHE / "low_rank_from_data"
    if asked.only == "digits":
        print(digits_part(Ledger(folder / "digits.json"), asked.seeds)[1])
        return
    rows = cifar_part(data, folder, asked.epochs)
    if asked.only:
        print(cifar_table(rows))
        return
    told, digits, claims = digits_part(Ledger(folder / "digits.json"), asked.seeds)
    first = rows[0]
    start = f"{100 * first['dense']['value']:.2f} %, {first['macs'][0] / 1e6:.1f} M multiply-adds"
    text = f"""# Kernels or responses: papers 13 and 16

The built-in digits, four 3x3 convolutions of which three are compressed, no training afterwards; {asked.seeds} seeds,
mean and 95 % interval. Errors are relative, on the test pictures; responses are those of single layers on the dense
network's inputs.

{digits}

ResNet-20 with published weights on CIFAR-10, dense {start}, {first["parameters"][0] / 1e3:.0f} k parameters.
Before and after {asked.epochs} passes over {len(data.train):,} pictures, the same for all; one run each, so that
differences of a few tenths of a point mean nothing. Where a fit to responses has left little to repair, so short a
training takes away more than it gives. Time in ONNX Runtime, one thread, processor time, in turns with the dense
network.

{cifar_table(rows)}

{claims_table(claims)}
"""
    values = {"digits": told, "cifar": rows, "claims": claims}
    publish("low_rank_from_data", values, text, measured(values))


if __name__ == "__main__":
    main()
