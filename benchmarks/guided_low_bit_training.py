"""Low-bit training (survey 38): the three schemes at equal epochs, few bits against 32, their bytes and their time.

On the digits, five seeds, from the same trained networks: 2 bits trained directly, in two steps, progressively,
guided, and by all three, with few epochs and with many; 4 and 8 bits directly and by all three. Then a ResNet-20 of 2
and of 4 bits: bytes of its files, and its time in ONNX Runtime beside the dense one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from _common import CACHE, Ledger, claims_table, interval, publish, shown, table, unseen
from karui.architectures.cifar_resnet import resnet20
from karui.artifact import save
from karui.data import load_data
from karui.distill import GuidedLowBit
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


def network(seed: int) -> Model:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if inputs == 8 else []
    net = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return Model(net, example=(torch.zeros(2, 1, 8, 8),), task=Classification())


def one_seed(seed: int) -> dict[str, float]:
    """Test accuracy of each arm, in percent."""
    data = load_data("digits")

    def bench(epochs: int, lr: float) -> Bench:
        training = Training(epochs=epochs, optimizer=SGD(lr=lr), schedule=Cosine())
        return Bench(train=data.train, validation=data.validation, test=data.test, training=training, seed=seed)

    dense = bench(DENSE_EPOCHS, 0.05).fit(network(seed))
    judge = bench(1, 0.02)
    told = {"dense": 100 * judge.evaluate(dense, "test").value}

    def arm(name: str, bits: int, epochs: int, *, fitted: bool = True) -> None:
        step = GuidedLowBit(weight_bits=bits, activation_bits=bits, epochs=epochs, fitted=fitted, **SCHEMES[name])
        made = step.apply(dense, bench(epochs, 0.02))
        ends = "" if fitted else ", levels end at 1"
        told[f"{bits} bits, {epochs} epochs, {name}{ends}"] = 100 * judge.evaluate(made, "test").value

    for epochs in BUDGETS:
        for name in SCHEMES:
            arm(name, 2, epochs)
    for bits in (4, 8):
        for name in ("direct", "all three"):
            arm(name, bits, BUDGETS[1])
    for name in ("direct", "all three"):
        arm(name, 2, BUDGETS[1], fitted=False)
    return told


def weights() -> dict[str, dict[str, Any]]:
    """Bytes and time of a ResNet-20; what it computes does not matter for either, so it is not trained."""
    torch.manual_seed(0)
    data = load_data("digits")
    dense = Model(resnet20(in_channels=1).eval(), example=(torch.rand(2, 1, 32, 32),), task=Classification())
    upscaled = [(nn.functional.interpolate(x[None], size=32)[0], y) for x, y in (data.train[i] for i in range(300))]
    bench = Bench(train=upscaled, validation=upscaled[:20])
    nets = {"dense": dense}
    for bits in (2, 4):
        nets[f"{bits} bits"] = GuidedLowBit(weight_bits=bits, activation_bits=bits, epochs=0).apply(dense, bench)
    clock = Clock(batches=(1, 64), threads=(1,), engines=(OnnxRuntime(),), cpu_time=True, rounds=15)
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
    lines.append(
        "not compared with [30] at equal cost: a student of full precision is no peer of one of few bits, and few bits "
        "under soft targets were not measured; the guide is no teacher that was trained before, it trains along"
    )
    return {"guided_low_bit_training": lines + unseen(told["claims"])}


def _verdict(gain: dict[str, Any]) -> str:
    return "beyond chance" if gain["low"] > 0 or gain["high"] < 0 else "within chance"


def claims_of(runs: dict[str, Any], gains: dict[str, Any], held: dict[str, Any]) -> dict[str, bool]:
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


def main() -> None:
    torch.set_num_threads(1)
    ledger = Ledger(CACHE / "guided_low_bit_training.json")
    held = ledger.once("files", weights)
    seeds = [ledger.once(f"seed {seed}", lambda seed=seed: one_seed(seed)) for seed in range(SEEDS)]
    runs = {name: interval([seed[name] for seed in seeds]) for name in seeds[0]}

    def gain(epochs: int, name: str) -> dict[str, Any]:
        arms = (f"2 bits, {epochs} epochs, {name}", f"2 bits, {epochs} epochs, direct")
        return interval([seed[arms[0]] - seed[arms[1]] for seed in seeds])

    gains = {
        f"{epochs} epochs, {name}": gain(epochs, name) for epochs in BUDGETS for name in SCHEMES if name != "direct"
    }
    claims = claims_of(runs, gains, held)
    files = [
        [name, f"{one['weights file']:,}", f"{one['ONNX file']:,}", f"{one['batch 1']:.2f}", f"{one['batch 64']:.2f}"]
        for name, one in held.items()
    ]
    head = ["ResNet-20", "weights file, bytes", "ONNX file, bytes", "times as fast, batch 1", "batch 64"]
    text = f"""# Low-bit training (38)

The digits, three 3x3 convolutions and a linear layer, {SEEDS} seeds, mean and 95 % interval. All arms start from the
same network, trained for {DENSE_EPOCHS} epochs, and have the same epochs in all; a guide (weight {GUIDE:g}) costs a
second network on top. The first and the last layer have 8 bits.

{table(["", "test accuracy, %"], [[name, shown(one)] for name, one in runs.items()])}

Points over direct training at 2 bits, in pairs:

{table(["", "points"], [[name, shown(one)] for name, one in gains.items()])}

Bytes and time beside the dense network, ONNX Runtime, one thread, in turns:

{table(head, files)}

{claims_table(claims)}
"""
    values = {"seeds": SEEDS, "runs": runs, "gains": gains, "files": held, "claims": claims}
    publish("guided_low_bit_training", values, text, measured(values))


if __name__ == "__main__":
    main()
