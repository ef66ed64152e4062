"""Ways of factorising that need no training, on layers of ImageNet size: seconds, agreement, bytes and time.

SqueezeNet with its published weights (pruned and with shared values, decoded) is set for half of its multiply-adds, in
the ways that solve each layer directly, without labels or training; ResNet-56 is decomposed for the seconds alone.
Judged on pictures of ImageNet, one for each fourth class; most are probably of its training set, so that only changes
tell anything. Time in ONNX Runtime on one thread, processor time, dense and light in turns.

Finished parts are kept in `.cache/benchmarks/low_rank_closed_form`, so that a run that was killed goes on.
"""

from __future__ import annotations

import io
import time
import zipfile
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from _common import CACHE, Ledger, cifar10, data_folder, files, publish, shown_times, speeds, table, times
from _low_rank_ways import SHARES, SPEEDUPS, Way, macs_left, told
from cifar_resnets import published
from karui.lowrank import AsymmetricNonlinear, LowRankExpansion, LowRankRegularization, SvdRestructuring, Tucker2
from karui.measuring import Clock, count
from karui.measuring.engines import OnnxRuntime
from karui.measuring.inference import inference
from karui.measuring.values import bytes_text
from karui.model import Classification, Model
from karui.technique import Bench

MEANS = (104.0, 117.0, 123.0)
CALIBRATION = 100
POINTWISE = "[11] SVD of pointwise layers"
"""Half of the parameters that it acts on; ResNet-56 has no such layers, and its linear one is too small."""
SLUGS = {
    "[11]": "svd_restructuring",
    "[12]": "tucker2",
    "[13]": "low_rank_expansion",
    "[16]": "asymmetric_nonlinear",
    "[22]": "low_rank_regularization",
}


class Fire(nn.Module):
    """A narrow pointwise convolution, and one of 1x1 and one of 3x3 side by side on what it gives."""

    def __init__(self, channels: int, narrow: int, wide: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, narrow, 1)
        self.expand1x1 = nn.Conv2d(narrow, wide, 1)
        self.expand3x3 = nn.Conv2d(narrow, wide, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Twice `wide` maps."""
        x = torch.relu(self.squeeze(x))
        return torch.cat([torch.relu(self.expand1x1(x)), torch.relu(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """SqueezeNet v1.0 (Iandola et al. 2016), with the names of torchvision's."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()

        def pool() -> nn.Module:
            return nn.MaxPool2d(3, 2, ceil_mode=True)

        self.features = nn.Sequential(
            *(nn.Conv2d(3, 96, 7, 2), nn.ReLU(), pool()),
            *(Fire(96, 16, 64), Fire(128, 16, 64), Fire(128, 32, 128), pool()),
            *(Fire(256, 32, 128), Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), pool()),
            Fire(512, 64, 256),
        )
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(512, classes, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        return self.classifier(self.features(x)).flatten(1)


def squeezenet() -> Model:
    """With the weights of Han et al., decoded."""
    kept = np.load(data_folder() / "squeezenet_dc" / "squeezenet_v10_decoded.npz")
    net = SqueezeNet()
    net.load_state_dict({name: torch.from_numpy(kept[name]) for name in kept.files})
    return Model(net.eval(), example=(torch.zeros(1, 3, 224, 224),), task=Classification())


def pictures(first: int, step: int) -> TensorDataset:
    """Of the thousand classes every `step`th one's picture, blue first as the weights want it, and its class."""
    with zipfile.ZipFile(data_folder() / "imagenet_samples" / "imagenet_samples.zip") as kept:
        names = sorted(kept.namelist())[first::step]
        drawn = [np.asarray(Image.open(io.BytesIO(kept.read(name))).convert("RGB")) for name in names]
    x = torch.from_numpy(np.stack(drawn)).flip(3).float() - torch.tensor(MEANS)
    return TensorDataset(x.permute(0, 3, 1, 2).contiguous(), torch.arange(1000)[first::step])


def ways() -> tuple[Way, ...]:
    """The ways, each for the share of the network's multiply-adds that it can leave."""
    fewer: dict[str, Any] = {"of": "multiply-adds", "size": macs_left}
    return (
        Way(name=POINTWISE, of="parameters", make=lambda _: SvdRestructuring(budget=0.73, epochs=0)),
        Way(name="[12] Tucker-2", make=lambda k: Tucker2(ratio=k, pointwise=True, epochs=0), knobs=SHARES, **fewer),
        Way(name="[12] ranks by variational Bayes", of="multiply-adds", make=lambda _: Tucker2(epochs=0)),
        Way(
            name="[13] scheme 2, kernels",
            make=lambda k: LowRankExpansion(objective="filter", speedup=k),
            knobs=SPEEDUPS,
            **fewer,
        ),
        Way(
            name="[16] reconstruction",
            of="multiply-adds",
            make=lambda k: AsymmetricNonlinear(speedup=float(k), images=CALIBRATION),
        ),
        Way(
            name="[22] two convolutions", make=lambda k: LowRankRegularization(share=k, epochs=0), knobs=SHARES, **fewer
        ),
    )


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


def run(ledger: Ledger) -> dict[str, Any]:
    """All parts."""
    clock = Clock(batches=(1, 8), threads=(1,), engines=(OnnxRuntime(),), cpu_time=True, seconds=4)
    large, deep = squeezenet(), published("resnet56")
    test, few = pictures(0, 4), Bench(train=cifar10(2 * CALIBRATION).train)
    bench = Bench(train=pictures(2, 8), test=test)
    said = torch.tensor(ledger.once("answers", lambda: answers(large, test).tolist()))
    dense = {"parameters": large.parameters, "macs": count(large).macs}
    dense |= {
        "right": 100 * float((said == test.tensors[1]).float().mean()),
        **ledger.once("files", lambda: files(large)),
    }

    def part(way: Way) -> dict[str, Any]:
        light, facts = decomposed(way, large, bench)
        return {**facts, **judged(light, large, said, test, clock)}

    found: dict[str, Any] = {"dense": dense, "resnet56": {}, "squeezenet": {}}
    for way in (way for way in ways() if way.name != POINTWISE):
        key = f"resnet56, {way.name}"
        found["resnet56"][way.name] = ledger.once(key, lambda w=way: decomposed(w, deep, few)[1])
    for way in ways():
        found["squeezenet"][way.name] = ledger.once(f"squeezenet, {way.name}", lambda w=way: part(w))
    return found


def page(found: dict[str, Any]) -> str:
    """Both networks."""
    dense = found["dense"]
    first = ["dense", "", "", f"{dense['parameters']:,}", f"{dense['macs'] / 1e6:.0f}", *_files(dense)]
    first += [f"{dense['right']:.1f}", "100.0", "", ""]
    rows = [first]
    for name, row in found["squeezenet"].items():
        line = [name, row["settings"], f"{row['seconds']:.1f}", f"{row['parameters']:,}", f"{row['macs'] / 1e6:.0f}"]
        judged = [*_files(row), f"{row['right']:.1f}", f"{row['agreement']:.1f}", *shown_times(row["times"])]
        rows.append([*line, *judged])
    head = ["way", "settings", "seconds", "parameters", "million MACs", "weights file", "ONNX file", "top-1, %"]
    deep = [
        [name, f"{row['seconds']:.1f}", f"{row['parameters']:,}", f"{row['macs'] / 1e6:.1f}"]
        for name, row in found["resnet56"].items()
    ]
    return "\n\n".join(
        [
            "# Factorising without training: SqueezeNet, and seconds for ResNet-56",
            INTRODUCTION,
            "## SqueezeNet",
            table([*head, "same answer, %", "batch 1", "batch 8"], rows),
            "## ResNet-56 (0.85 million parameters, 125.5 million MACs)",
            table(["way", "seconds", "parameters", "million MACs"], deep),
        ]
    )


INTRODUCTION = f"""Each way is set for half of the multiply-adds, or as near as it comes (the counts tell; [11]
acts on pointwise layers alone, and halves their parameters), and nothing is trained. Seconds are processor time on one
thread for the whole network, everything included, without what it takes to find the setting. [16] looks at
{CALIBRATION} pictures for calibration, without labels; the others at weights alone. SqueezeNet's weights are those of
Han et al. (pruned, shared values), a third of them not zero, which its weights file makes use of; 250 pictures of
ImageNet, one for each fourth class, most of them probably from its training set, judge: top-1, and how often the answer
is the dense network's. Time is that of the dense network over the light one's in ONNX Runtime, one thread, processor
time, in turns, with its 95 % interval: above 1 is faster."""


def _files(row: dict[str, Any]) -> list[str]:
    return [bytes_text(row[file]) for file in ("weights file", "onnx file")]


def measured(told_of: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of each technique."""
    found: dict[str, list[str]] = {}
    for name, row in told_of["found"]["squeezenet"].items():
        deep, dense = told_of["found"]["resnet56"].get(name), told_of["found"]["dense"]
        also = f" (ResNet-56: {deep['seconds']:.1f} s)" if deep else ""
        found.setdefault(SLUGS[name[:4]], []).append(
            f"SqueezeNet{name[4:]}, {dense['macs'] / row['macs']:.1f}x fewer multiply-adds, nothing trained: "
            f"{row['seconds']:.1f} s to decompose{also}; top-1 on 250 pictures "
            f"{dense['right']:.1f} % dense, {row['right']:.1f} after; ONNX Runtime, one thread: {speeds(row['times'])}"
        )
    return found


def main() -> None:
    torch.set_num_threads(1)
    found = run(Ledger(CACHE / "low_rank_closed_form" / "parts.json"))
    publish("low_rank_closed_form", {"found": found}, page(found), measured({"found": found}))


if __name__ == "__main__":
    main()
