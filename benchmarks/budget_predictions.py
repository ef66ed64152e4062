"""Predicted against measured time: what a budget's menu says of a choice before it is made, and what it then takes.

Four networks: ResNet-20 and ResNet-56 with their published weights, a MobileNet (half width) and a plain network of
six convolutions, both with weights as drawn, since time does not hang on them. For each a menu is made in 32 bits and
one in 8, batch size 1, one thread; from it sets of candidates are chosen that should take certain shares of the dense
network's time, and each is built, measured whole beside the dense network, and held against the prediction. Nothing is
corrected by what was measured before, and nothing is trained.

Finished networks are kept in `.cache/benchmarks/budget_predictions`; the timing cache lies there too, so that no time
of another day gets in. `--only` does one network in one precision, `--smoke` a small one and keeps nothing; `--beside
WORDS` keeps the published rows, which are another machine's, and puts these below them under that name.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from _common import CACHE, ROOT, Ledger, cifar10, publish, table
from cifar_resnets import published
from karui.architectures.mobilenet import build_mobilenet
from karui.errors import SurgeryError
from karui.measuring import onnx_form, this_machine
from karui.model import Classification, Model
from karui.recipes.budget.cache import TimingCache
from karui.recipes.budget.choice import choose
from karui.recipes.budget.deployments import NARROW, Forms
from karui.recipes.budget.front import Form
from karui.recipes.budget.menu import Menu, menu
from karui.recipes.budget.tables import EXPECTED
from karui.recipes.budget.timing import Stopwatch
from karui.technique import Bench

SHARES = (0.85, 0.7, 0.55, 0.4)
"""Times to aim at, as shares of the dense network in the same precision."""
APART = 0.15
"""How far predicted and measured time may be apart."""
PRECISIONS = ("fp32", "int8")


def plain() -> Model:
    """Six convolutions of 32 to 128 channels, without shortcuts."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    inputs = 3
    for outputs, pooled in ((32, False), (32, True), (64, False), (64, True), (128, False), (128, False)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pooled else []
        inputs = outputs
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))
    return Model(net.eval(), example=(torch.zeros(1, 3, 32, 32),), task=Classification())


def mobilenet() -> Model:
    """A MobileNet of half width for pictures of 32 pixels."""
    torch.manual_seed(0)
    net = build_mobilenet(10, width=0.5, input_size=32)
    return Model(net.eval(), example=(torch.zeros(1, 3, 32, 32),), task=Classification())


NETWORKS: Mapping[str, Callable[[], Model]] = {
    "plain": plain,
    "mobilenet": mobilenet,
    "resnet20": lambda: published("resnet20"),
    "resnet56": lambda: published("resnet56"),
}


def predictions(dense: Model, bench: Bench, folder: Path, precision: str, shares: tuple[float, ...]) -> dict[str, Any]:
    """Every share that was aimed at, as the menu predicted it and as it was measured."""
    watch = Stopwatch(cache=TimingCache.of_this_machine(folder), progress=True)
    plain = onnx_form(dense)
    forms = Forms(dense=dense, bench=bench, watch=watch)
    told = NARROW if precision == "int8" else "fp32 in onnxruntime"
    like = Form(name=precision, told=told, time=1.0, bytes=1.0)
    whole = forms.file(dense, like)
    seconds = watch.whole(dense, plain).value * watch.ratio(dense, whole, plain).value
    layers = Stopwatch(cache=watch.cache, progress=True, narrow=precision == "int8")
    offers = menu(dense, bench, layers, file=whole, seconds=seconds)
    found = []
    for share in shares:
        chosen, light = _made(offers, (share - 1) * seconds)
        if light is None:
            found.append({"aimed": share, "predicted": None})
            continue
        predicted, settled = (1 + offers.problem({}).total(chosen, q) / seconds for q in (EXPECTED, "time"))
        measured = watch.ratio(dense, forms.file(light, like), whole)
        told_times = {"predicted": predicted, "settled": settled, "measured": measured.value, "error": measured.error}
        kinds = [offer.candidate.text for offer in offers.taken(chosen).values()]
        found.append({"aimed": share, **told_times, "places": len(kinds), "left out": kinds.count("left out")})
        print(found[-1], flush=True)
    candidates = sum(map(len, offers.offers.values()))
    return {"seconds": seconds, "candidates": candidates, "slower": offers.slower, "choices": found}


def _made(offers: Menu, limit: float) -> tuple[dict[str, int], Model | None]:
    """The choice of least harm within a limit on time, and the network; none where the menu has no such choice."""
    while True:
        chosen = choose(offers.problem({"time": limit}))
        if chosen is None:
            return {}, None
        try:
            return chosen, offers.carry_out(chosen)
        except SurgeryError:
            continue  # the menu has struck off what was refused


def off(choice: Mapping[str, float]) -> float:
    """How far a prediction is from what was measured, as a share of that."""
    return choice["predicted"] / choice["measured"] - 1


def reached(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All choices that a menu had."""
    return [{"of": name, **c} for name, told in parts.items() for c in told["choices"] if c["predicted"] is not None]


HEAD = """# Predicted and measured time of what a budget chooses

Batch size 1, one thread, processor time, ONNX Runtime. A menu's prediction for the least harmful choice at each time,
and what that network takes, both as shares of the dense network in the same precision. Weights of the MobileNet and of
the plain network are as drawn. Measured times carry two standard errors."""


BESIDE = """On a machine that is shared, while one to three other programs ran on its two cores: its speed changed by up
to two times from one minute to the next. Layers are timed as shares here, in turns with what they would replace and in
the company of their network's others; the rows above are older, and come from seconds of each layer by itself. What is
measured is off, too: the MobileNet in 8 bits that was foreseen at 0.535 was measured at 0.463, and one at 0.532, by the
same times of layers and some minutes later, at 0.516."""


def rows_of(parts: Mapping[str, Any]) -> str:
    """The table of one machine, and how many predictions hold."""
    rows = [
        [
            name,
            f"{choice['aimed']:.2f}",
            *(
                ("the menu cannot", "", "", "")
                if choice["predicted"] is None
                else (
                    f"{choice['predicted']:.3f}",
                    f"{choice['measured']:.3f} ± {2 * choice['error']:.3f}",
                    f"{off(choice):+.1%}",
                    f"{choice['places']} ({choice['left out']} left out)",
                )
            ),
        ]
        for name, told in parts.items()
        for choice in told["choices"]
    ]
    found = reached(parts)
    within = sum(abs(off(choice)) <= APART for choice in found)
    apart = [abs(off(choice)) for choice in found]
    told = (
        f"{within} of {len(found)} predictions are within {APART:.0%} of what was measured; the median one is off by "
        f"{np.median(apart):.1%}, the worst by {max(apart):.1%}."
    )
    head = ["network", "aimed at", "predicted", "measured", "off by", "places changed"]
    return f"{table(head, rows)}\n\n{told}"


def keep(parts: Mapping[str, Any], beside: str) -> None:
    """Publish the rows of this machine, alone or below another's."""
    if not beside:
        publish("budget_predictions", {"apart": APART, "parts": parts}, f"{HEAD}\n\n{rows_of(parts)}")
        return
    before = json.loads((ROOT / "results" / "budget_predictions.json").read_text(encoding="utf-8"))
    values = {**before, "beside": {beside: {"machine": str(this_machine()), "parts": parts}}}
    text = [HEAD, rows_of(before["parts"]), f"Machine: {before['machine']}.", f"## {beside}", BESIDE, rows_of(parts)]
    publish("budget_predictions", values, "\n\n".join(text))


def main() -> None:
    options = argparse.ArgumentParser(description="Predicted against measured time under a budget")
    options.add_argument("--smoke", action="store_true", help="one small network; keeps nothing")
    options.add_argument("--only", choices=NETWORKS, help="one network")
    options.add_argument("--precision", choices=PRECISIONS, help="one precision")
    options.add_argument("--beside", default="", metavar="WORDS", help="name of rows below another machine's")
    asked = options.parse_args()
    torch.set_num_threads(1)
    if asked.smoke:
        noise = TensorDataset(torch.randn(64, 3, 32, 32), torch.zeros(64, dtype=torch.long))
        with tempfile.TemporaryDirectory() as scratch:
            told = predictions(plain(), Bench(train=noise), Path(scratch), "fp32", (0.7,))
        print(rows_of({"plain, fp32": told}))
        return
    data = cifar10(1000)
    bench = Bench(train=data.train, validation=data.validation, progress=True)
    folder = CACHE / "budget_predictions"
    for name in [asked.only] if asked.only else NETWORKS:
        ledger = Ledger(folder / f"{name}.json")
        for precision in [asked.precision] if asked.precision else PRECISIONS:
            ledger.once(
                precision,
                lambda name=name, precision=precision: predictions(NETWORKS[name](), bench, folder, precision, SHARES),
            )
            kept = {each: Ledger(folder / f"{each}.json").parts for each in NETWORKS}
            parts = {f"{each}, {p}": told[p] for each, told in kept.items() for p in PRECISIONS if p in told}
            keep(parts, asked.beside)


if __name__ == "__main__":
    main()
