"""SIC layers, projections on a torus, spatial bottlenecks (survey 20): one macro network, stages of equal width."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from _from_scratch import compare, lines, mean_of
from karui.layers.sic import SicConv
from karui.lowrank import SicLayers, SpatialBottleneck, Topological
from karui.model import Classification, Model
from karui.technique import Bench

WIDTHS, EPOCHS = (32, 64), 5
BETWEEN = ("0", "9")  # the layers between stages stay standard ones, as in the paper
NAMES = {
    "sic": SicLayers(epochs=0),
    "sic, no residual": SicLayers(epochs=0, residual=False),
    "torus, box 4x4": Topological(epochs=0, window=(4, 4)),
    "bottleneck, one of two": SpatialBottleneck(epochs=0, skip=("3", "12")),
}


def dense(seed: int) -> Model:
    """A stem that halves the map, then two stages of two 5x5 convolutions of one width, a 3x3 one between them."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = _block(3, WIDTHS[0], 3, 2)
    for number, width in enumerate(WIDTHS):
        layers += _block(WIDTHS[0], width, 3, 2) if number else []
        for _ in range(2):
            layers += _block(width, width, 5, 1)
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], 10))
    return Model(net.eval(), example=(torch.zeros(1, 3, 32, 32),), task=Classification())


def _block(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def converted(seed: int, name: str) -> Model:
    step = NAMES[name]
    return replace(step, skip=(*BETWEEN, *step.skip)).apply(dense(seed), Bench(seed=seed))


def grouped(seed: int) -> Model:
    """The same SIC layers with grouped projections of as many weights as those on the torus: 16 for each output."""
    model = converted(seed, "sic")
    layers = list(model.module.children())
    for number, layer in enumerate(layers):
        if isinstance(layer, nn.Sequential):
            settings = [part.settings() for part in layer.children() if isinstance(part, SicConv)]
            layers[number] = nn.Sequential(*(SicConv(**{**s, "groups": s["in_channels"] // 16}) for s in settings))
    return Model(nn.Sequential(*layers).eval(), example=model.example, task=model.task)


def claims(rows: dict[str, Any]) -> dict[str, bool]:
    whole, torus = rows["dense"], mean_of(rows, "torus, box 4x4")
    return {
        "two SIC layers within 1 point of dense": mean_of(rows, "sic") > mean_of(rows, "dense") - 1,
        "at a quarter of its multiply-adds or less": rows["sic"]["macs"] <= whole["macs"] / 4,
        "SIC with residual sums better than without": mean_of(rows, "sic") > mean_of(rows, "sic, no residual"),
        "torus no worse than groups of as many weights": torus >= mean_of(rows, "groups of 16"),
        "bottleneck within 1.5 points": mean_of(rows, "bottleneck, one of two") > mean_of(rows, "dense") - 1.5,
    }


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of each of the three."""

    def of(names: list[str], word: str) -> list[str]:
        missed = {claim: held for claim, held in told["claims"].items() if word in claim}
        return lines({**told, "claims": missed}, names)

    return {
        "sic_layer": of(["sic", "sic, no residual"], "SIC"),
        "topological_conv": of(["torus, box 4x4", "groups of 16"], "torus"),
        "spatial_bottleneck": of(["bottleneck, one of two"], "bottleneck"),
    }


def main() -> None:
    nets = {"dense": dense, **{name: lambda seed, name=name: converted(seed, name) for name in NAMES}}
    compare(
        "efficient_layers",
        "SIC, torus, spatial bottleneck (20)",
        {**nets, "groups of 16": grouped},
        claims,
        measured=measured,
        epochs=EPOCHS,
    )


if __name__ == "__main__":
    main()
