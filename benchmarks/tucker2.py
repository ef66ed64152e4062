"""Tucker-2 with VBMF ranks (survey 12): accuracy on the digits over ten seeds, and the time of single layers.

The networks of other people, at full size, are in `cifar_resnets`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from _common import CACHE, Ledger, claims_table, interval, publish, shown, table, unseen
from _over_seeds import convolutions
from karui.data import load_data
from karui.lowrank import Tucker2
from karui.measuring import Clock, count, time_ratio
from karui.measuring.engines import OnnxRuntime
from karui.model import Model
from karui.technique import Bench
from karui.train import Adam, Training

SEEDS, EPOCHS, TUNING, RATE = 10, 12, 5, 1e-2
LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))


def size(model: Model, step: Tucker2) -> int:
    return model.parameters - sum(c.parameters[0] - c.parameters[1] for c in step.choose(model) if c.replaced)


def one_seed(seed: int) -> dict[str, Any]:
    data = load_data("digits")
    training = Training(epochs=EPOCHS, batch_size=32, optimizer=Adam(lr=2e-2))
    bench = Bench(train=data.train, validation=data.validation, test=data.test, training=training, seed=seed)
    dense = bench.fit(convolutions(seed))
    bare = Tucker2(epochs=0).apply(dense, bench)
    shares = [step / 100 for step in range(10, 60)]
    ratio = min(shares, key=lambda share: abs(size(dense, Tucker2(ratio=share, epochs=0)) - bare.parameters))
    models = {
        "dense": dense,
        "before": bare,
        "after": Tucker2(epochs=TUNING, learning_rate=RATE).apply(dense, bench),
        "uniform": Tucker2(ratio=ratio, epochs=TUNING, learning_rate=RATE).apply(dense, bench),
    }
    told = {
        name: {"accuracy": 100 * bench.evaluate(model, "test").value, **_counts(model)}
        for name, model in models.items()
    }
    return {**told, "ranks": {c.path: [c.ranks, c.full] for c in Tucker2().choose(dense) if c.replaced}}


def _counts(model: Model) -> dict[str, int]:
    told = count(model)
    return {"parameters": told.parameters, "macs": told.macs}


def layer_times(channels: int, pixels: int) -> dict[str, Any]:
    """A 3x3 layer at a quarter of both ranks, in turns with the dense one, in ONNX Runtime on one thread."""
    net = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 3, padding=1))
    dense = Model(net, example=(torch.randn(1, channels, pixels, pixels),))
    light = Tucker2(ratio=0.25, epochs=0).apply(dense, Bench())
    alone = [Model(model.module[1], example=dense.example) for model in (dense, light)]
    clock = Clock(batches=(1,), threads=(1,), engines=(OnnxRuntime(),), cpu_time=True)
    found = clock.time(dict(zip(("dense", "light"), alone, strict=True)))
    (heavy,), (lean,) = found.of("dense"), found.of("light")
    ratio = time_ratio(heavy, lean)
    return {"macs": count(alone[0]).macs / count(alone[1]).macs, "time": ratio.verdict}


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    runs = told["runs"]
    score = {name: shown(run["accuracy"]) for name, run in runs.items()}
    macs = [runs[name]["macs"]["mean"] / 1e3 for name in ("dense", "after")]
    times = [f"{name} {layer['time']}" for name, layer in told["layers"].items()]
    lines = [
        (
            f"digits, four 3x3 convolutions, 10 seeds: accuracy {score['dense']} % dense, {score['before']} "
            f"decomposed, {score['after']} fine-tuned, {score['uniform']} with uniform ranks; thousand MACs "
            f"{macs[0]:.0f} to {macs[1]:.0f}"
        ),
        (
            "one 3x3 layer (channels x pixels a side) at a quarter of both ranks, ONNX Runtime, batch 1, one thread: "
            f"{'; '.join(times)}"
        ),
    ]
    return {"tucker2": lines + unseen(told["claims"])}


def main() -> None:
    torch.set_num_threads(1)
    ledger = Ledger(CACHE / "tucker2.json")
    seeds = [ledger.once(f"seed {seed}", lambda seed=seed: one_seed(seed)) for seed in range(SEEDS)]
    layers = {
        f"{channels} x {pixels}": ledger.once(f"layer {channels}", lambda c=channels, p=pixels: layer_times(c, p))
        for channels, pixels in LAYERS
    }
    found = {
        name: {key: interval([float(told[name][key]) for told in seeds]) for key in ("accuracy", "parameters", "macs")}
        for name in ("dense", "before", "after", "uniform")
    }
    score = {name: told["accuracy"] for name, told in found.items()}
    claims = {
        "accuracy falls at once": score["before"]["high"] < score["dense"]["low"],
        f"{TUNING} epochs bring it within 1 point of dense": score["after"]["mean"] >= score["dense"]["mean"] - 1,
        "uniform ranks at as many parameters are not better": score["uniform"]["mean"] <= score["after"]["mean"],
    }
    names = {"dense": "dense", "before": "decomposed", "after": "fine-tuned", "uniform": "uniform ranks, fine-tuned"}
    rows = [
        [names[name], f"{told['parameters']['mean']:,.0f}", f"{told['macs']['mean']:,.0f}", shown(told["accuracy"])]
        for name, told in found.items()
    ]
    parts = [
        "# Tucker-2 with VBMF ranks (12)",
        f"The built-in digits, four 3x3 convolutions, {SEEDS} seeds, mean and 95 % interval.",
        table(["", "parameters", "multiply-adds", "test accuracy, %"], rows),
        (
            "One 3x3 layer at a quarter of both ranks (channels x pixels a side), ONNX Runtime, batch 1, one thread "
            "(processor time), in turns with the dense layer:"
        ),
        table(
            ["layer", "multiply-adds", "time"], [[k, f"{v['macs']:.1f} x fewer", v["time"]] for k, v in layers.items()]
        ),
        claims_table(claims),
    ]
    values = {"runs": found, "ranks": [told["ranks"] for told in seeds], "layers": layers, "claims": claims}
    publish("tucker2", values, "\n\n".join(parts), measured(values))


if __name__ == "__main__":
    main()
