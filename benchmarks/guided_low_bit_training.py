"""Low-bit training (survey 38): the three schemes at equal epochs, few bits against 32, their bytes and their time.

On the digits, five seeds, from the same trained networks: 2 bits trained directly, in two steps, progressively,
guided, and by all three, with few epochs and with many; 4 and 8 bits directly and by all three. A guide costs a second
network: at 2 bits, direct training, alone and under soft targets of the dense network [30], is also given so many
passes that it costs about as much as guided training, with the CPU seconds of each. Then a ResNet-20 of 2 and of 4
bits: bytes of its files, and its time in ONNX Runtime beside the dense one.

Finished seeds are kept, so that a run that was killed goes on. `--smoke` does two seeds on a few digits and keeps
nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from _common import CACHE, Ledger, claims_table, interval, publish, shown, table, unseen
from karui.architectures.cifar_resnet import resnet20
from karui.artifact import save
from karui.data import Splits, load_data
from karui.data.splits import take
from karui.distill import GuidedLowBit, KnowledgeDistillation
from karui.measuring import Clock, OnnxRuntime, onnx_form, time_ratio
from karui.model import Classification, Model
from karui.technique import Bench
from karui.train import SGD, Cosine, Training

SEEDS, DENSE_EPOCHS, BUDGETS = 5, 15, (10, 40)
GUIDE = 1.0
SCHEMES: dict[str, dict[str, Any]] = {
    "direct": {"two_step": False, "through": (), "guide": 0.0},
    "two steps": {"two_step": True, "through": (), "guide": 0.0},
    "progressive": {"two_step": False, "through": (8, 4), "guide": 0.0},
    "guided": {"two_step": False, "through": (), "guide": GUIDE},
    "all three": {"two_step": True, "through": (8, 4), "guide": GUIDE},
}
SINGLE = ("two steps", "progressive", "guided")
RATE, SLOW = 0.02, 0.005
"""Of all arms; of soft targets too, whose gradients are up to their temperature times as large."""
LONGER = 3
"""How many times as many epochs cost as much as a guide: in each step two networks learn, and either is asked once more
for the other, which is 8 forward passes where one that learns takes 3. A teacher is asked once for each sample."""
DIRECT = f"direct, {LONGER} times as long"
SOFT = "direct under soft targets [30]"
SOFTER, SLOWER = f"{SOFT}, {LONGER} times as long", f"{SOFT}, {LONGER} times as long, a quarter of the rate"
AT_COST = {DIRECT: "labels alone", SOFTER: "soft targets [30]", SLOWER: "soft targets at a quarter of the rate"}


def network(seed: int) -> Model:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if inputs == 8 else []
    net = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return Model(net, example=(torch.zeros(2, 1, 8, 8),), task=Classification())


def bench_of(data: Splits, seed: int, epochs: int, rate: float = RATE) -> Bench:
    training = Training(epochs=epochs, optimizer=SGD(lr=rate), schedule=Cosine())
    return Bench(train=data.train, validation=data.validation, test=data.test, training=training, seed=seed)


def trained(data: Splits, seed: int) -> Model:
    """The full-precision network that all arms start from."""
    return bench_of(data, seed, DENSE_EPOCHS, 0.05).fit(network(seed))


def accuracy(model: Model, data: Splits) -> float:
    """On test data, in percent."""
    return 100 * bench_of(data, 0, 1).evaluate(model, "test").value


def one_seed(data: Splits, seed: int) -> dict[str, float]:
    """Test accuracy of each arm, in percent."""
    dense = trained(data, seed)
    told = {"dense": accuracy(dense, data)}

    def arm(name: str, bits: int, epochs: int, *, fitted: bool = True) -> None:
        step = GuidedLowBit(weight_bits=bits, activation_bits=bits, epochs=epochs, fitted=fitted, **SCHEMES[name])
        made = step.apply(dense, bench_of(data, seed, epochs))
        ends = "" if fitted else ", levels end at 1"
        told[f"{bits} bits, {epochs} epochs, {name}{ends}"] = accuracy(made, data)

    for epochs in BUDGETS:
        for name in SCHEMES:
            arm(name, 2, epochs)
    for bits in (4, 8):
        for name in ("direct", "all three"):
            arm(name, bits, BUDGETS[1])
    for name in ("direct", "all three"):
        arm(name, 2, BUDGETS[1], fitted=False)
    return told


def at_cost(data: Splits, seed: int) -> dict[str, dict[str, float]]:
    """At 2 bits, test accuracy and CPU seconds of guided training and of what may be had at its cost."""
    dense = trained(data, seed)

    def run(scheme: str, epochs: int, rate: float = RATE, *, soft: bool = False) -> Callable[[], Model]:
        def make() -> Model:
            bench = bench_of(data, seed, epochs, rate)
            under = KnowledgeDistillation(teacher=dense.copy()).influence(dense, bench) if soft else None
            step = GuidedLowBit(weight_bits=2, activation_bits=2, epochs=epochs, **SCHEMES[scheme])
            return step.apply(dense, bench if under is None else bench.under(under))

        return make

    told = {}
    for epochs in BUDGETS:
        arms = {
            "guided": run("guided", epochs),
            SOFT: run("direct", epochs, soft=True),
            DIRECT: run("direct", LONGER * epochs),
            SOFTER: run("direct", LONGER * epochs, soft=True),
            SLOWER: run("direct", LONGER * epochs, SLOW, soft=True),
        }
        for name, make in arms.items():
            began = time.process_time()
            made = make()
            seconds = time.process_time() - began
            told[f"{epochs} epochs, {name}"] = {"score": accuracy(made, data), "seconds": seconds}
    return told


def beside(runs: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Of each arm the accuracy and the mean CPU seconds; of guided training the points over the others, in pairs."""

    def scores(name: str) -> list[float]:
        return [run[name]["score"] for run in runs]

    return {
        "arms": {name: interval(scores(name)) for name in runs[0]},
        "seconds": {name: mean(run[name]["seconds"] for run in runs) for name in runs[0]},
        "points": {
            f"{epochs} epochs, {name}": interval(
                [a - b for a, b in zip(*(scores(f"{epochs} epochs, {arm}") for arm in ("guided", name)), strict=True)]
            )
            for epochs in BUDGETS
            for name in (SOFT, *AT_COST)
        },
    }


def weights(rounds: int = 15) -> dict[str, dict[str, Any]]:
    """Bytes and time of a ResNet-20; what it computes does not matter for either, so it is not trained."""
    torch.manual_seed(0)
    data = load_data("digits")
    dense = Model(resnet20(in_channels=1).eval(), example=(torch.rand(2, 1, 32, 32),), task=Classification())
    upscaled = [(nn.functional.interpolate(x[None], size=32)[0], y) for x, y in (data.train[i] for i in range(300))]
    bench = Bench(train=upscaled, validation=upscaled[:20])
    nets = {"dense": dense}
    for bits in (2, 4):
        nets[f"{bits} bits"] = GuidedLowBit(weight_bits=bits, activation_bits=bits, epochs=0).apply(dense, bench)
    clock = Clock(batches=(1, 64), threads=(1,), engines=(OnnxRuntime(),), cpu_time=True, rounds=rounds)
    found = clock.time(nets)
    told = {}
    for name, net in nets.items():
        with tempfile.TemporaryDirectory() as scratch:
            held = save(net, Path(scratch) / "net", onnx=False).weights_bytes
        times = {
            f"batch {a.batch}": time_ratio(a, b).value for a, b in zip(found.of("dense"), found.of(name), strict=True)
        }
        told[name] = {"weights file": held, "ONNX file": len(onnx_form(net).data), **times}
    return told


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    runs, held, long = told["runs"], told["files"], BUDGETS[1]
    lines = [
        f"digits, {told['seeds']} seeds, {long} epochs in all, 2 bits: "
        + ", ".join(f"{name} {shown(runs[f'2 bits, {long} epochs, {name}'])}" for name in SCHEMES)
        + f" % (dense {shown(runs['dense'])})",
        "4 bits: "
        + ", ".join(f"{name} {shown(runs[f'4 bits, {long} epochs, {name}'])}" for name in ("direct", "all three"))
        + " %",
    ]
    for name in ("2 bits", "4 bits"):
        one, dense = held[name], held["dense"]
        lines.append(
            f"ResNet-20, {name}: weights file {dense['weights file'] / one['weights file']:.1f} times smaller, ONNX "
            f"file {dense['ONNX file'] / one['ONNX file']:.1f}; in ONNX Runtime, one thread, {one['batch 1']:.2f} "
            f"times as fast as dense at batch 1, {one['batch 64']:.2f} at batch 64"
        )
    gain, short = told["gains"][f"{long} epochs, guided"], told["runs"][f"2 bits, {BUDGETS[0]} epochs, guided"]
    lines.append(
        f"2 bits, guided over direct in as many epochs: {shown(gain)} points, {_verdict(gain)}; a guide costs a second "
        f"network, so at no more cost: guided for {BUDGETS[0]} epochs {shown(short)} % beside direct for {long}"
    )
    lines += [_compared(told["at cost"], epochs) for epochs in BUDGETS]
    return {"guided_low_bit_training": lines + unseen(told["claims"])}


def _compared(told: dict[str, Any], epochs: int) -> str:
    """Guided training against each arm that is as dear, with what that costs."""
    parts = []
    for arm, name in AT_COST.items():
        over = told["points"][f"{epochs} epochs, {arm}"]
        cost = told["seconds"][f"{epochs} epochs, {arm}"] / told["seconds"][f"{epochs} epochs, guided"]
        parts.append(f"{name} {shown(over)} points where that costs {cost:.2f} of it ({_verdict(over)})")
    return f"2 bits, guided for {epochs} epochs over direct training of {LONGER * epochs}: {'; '.join(parts)}"


def _verdict(gain: dict[str, Any]) -> str:
    return "beyond chance" if gain["low"] > 0 or gain["high"] < 0 else "within chance"


def claims_of(
    runs: dict[str, Any], gains: dict[str, Any], held: dict[str, Any], points: dict[str, Any]
) -> dict[str, bool]:
    """What the paper says, and what is expected of the files."""
    claims = {
        f"2 bits, {epochs} epochs: {name} better than direct, beyond chance": gains[f"{epochs} epochs, {name}"]["low"]
        > 0
        for epochs in BUDGETS
        for name in SINGLE
    }
    claims |= {
        f"2 bits, {epochs} epochs: all three a point better than direct": gains[f"{epochs} epochs, all three"]["mean"]
        >= 1
        for epochs in BUDGETS
    }
    claims |= {
        f"2 bits, {epochs} epochs: guided better than {name} at its cost, beyond chance": points[
            f"{epochs} epochs, {arm}"
        ]["low"]
        > 0
        for epochs in BUDGETS
        for arm, name in AT_COST.items()
    }
    dense, long = runs["dense"]["mean"], BUDGETS[1]
    for name in ("direct", "all three"):
        claims[f"4 bits, {name}: within half a point of dense"] = (
            runs[f"4 bits, {long} epochs, {name}"]["mean"] >= dense - 0.5
        )
    eight = [runs[f"8 bits, {long} epochs, {name}"]["mean"] for name in ("direct", "all three")]
    claims["8 bits, control: all equal, within half a point"] = max(*eight, dense) - min(*eight, dense) <= 0.5
    claims["ResNet-20 of 2 bits: weights file ten times smaller"] = (
        held["dense"]["weights file"] >= 10 * held["2 bits"]["weights file"]
    )
    claims["few bits are faster in ONNX Runtime"] = held["2 bits"]["batch 1"] > 1 and held["2 bits"]["batch 64"] > 1
    return claims


def collected(ledger: Ledger, data: Splits, seeds: int, rounds: int) -> dict[str, Any]:
    """All that is measured, each part once."""
    held = ledger.once("files", lambda: weights(rounds))
    found = [ledger.once(f"seed {seed}", lambda seed=seed: one_seed(data, seed)) for seed in range(seeds)]
    equal = beside(
        [ledger.once(f"at cost, seed {seed}", lambda seed=seed: at_cost(data, seed)) for seed in range(seeds)]
    )
    runs = {name: interval([seed[name] for seed in found]) for name in found[0]}

    def gain(epochs: int, name: str) -> dict[str, Any]:
        arms = (f"2 bits, {epochs} epochs, {name}", f"2 bits, {epochs} epochs, direct")
        return interval([seed[arms[0]] - seed[arms[1]] for seed in found])

    gains = {
        f"{epochs} epochs, {name}": gain(epochs, name) for epochs in BUDGETS for name in SCHEMES if name != "direct"
    }
    claims = claims_of(runs, gains, held, equal["points"])
    return {"seeds": seeds, "runs": runs, "gains": gains, "at cost": equal, "files": held, "claims": claims}


def page(values: dict[str, Any]) -> str:
    """The results for people."""
    files = [
        [name, f"{one['weights file']:,}", f"{one['ONNX file']:,}", f"{one['batch 1']:.2f}", f"{one['batch 64']:.2f}"]
        for name, one in values["files"].items()
    ]
    head = ["ResNet-20", "weights file, bytes", "ONNX file, bytes", "times as fast, batch 1", "batch 64"]
    equal = values["at cost"]
    arms = [[name, shown(one), f"{equal['seconds'][name]:.1f}"] for name, one in equal["arms"].items()]
    return f"""# Low-bit training (38)

The digits, three 3x3 convolutions and a linear layer, {values["seeds"]} seeds, mean and 95 % interval. All arms start
from the same network, trained for {DENSE_EPOCHS} epochs, and have the same epochs in all; a guide (weight {GUIDE:g})
costs a second network on top. The first and the last layer have 8 bits.

{table(["", "test accuracy, %"], [[name, shown(one)] for name, one in values["runs"].items()])}

Points over direct training at 2 bits, in pairs:

{table(["", "points"], [[name, shown(one)] for name, one in values["gains"].items()])}

At 2 bits, what a guide costs may be spent otherwise. In each step both networks learn, and either is asked once more
for the other: 8 forward passes, a backward pass counted as two, where direct training has 3. So direct training has
{LONGER} times the epochs; under soft targets [30] the dense network, where all arms start, is asked once for each digit
on top. CPU seconds are those of a whole training:

{table(["2 bits", "test accuracy, %", "CPU seconds"], arms)}

Points of guided training over these, in pairs:

{table(["", "points"], [[name, shown(one)] for name, one in equal["points"].items()])}

Bytes and time beside the dense network, ONNX Runtime, one thread, in turns:

{table(head, files)}

{claims_table(values["claims"])}
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--smoke", action="store_true", help="two seeds, a few digits; keeps nothing")
    torch.set_num_threads(1)
    data = load_data("digits")
    if options.parse_args().smoke:
        few = replace(data, train=take(data.train, torch.arange(64)))
        with tempfile.TemporaryDirectory() as scratch:
            values = collected(Ledger(Path(scratch) / "parts.json"), few, 2, 5)
        print(page(values), *measured(values)["guided_low_bit_training"], sep="\n")
        return
    values = collected(Ledger(CACHE / "guided_low_bit_training.json"), data, SEEDS, 15)
    publish("guided_low_bit_training", values, page(values), measured(values))


if __name__ == "__main__":
    main()
