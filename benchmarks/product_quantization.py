"""Product quantisation (survey 19): what correction is worth, bytes, and the time of single layers by tables.

On the digits, ten seeds: a perceptron whose two hidden layers are quantised to codewords of eight inputs, by k-means
alone, and corrected for responses on the original network's inputs or on those that the quantised layers give.
Times are of single linear layers with random weights, one thread, processor time, in turns with the dense layer in
torch and in ONNX Runtime; the kernel needs numba, and without it plain torch is timed.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
from torch import nn

from _common import CACHE, Ledger, claims_table, interval, publish, shown, table, unseen
from _layers import against, race
from karui.data import load_data
from karui.layers.product_quantized import quantized_layer
from karui.lowrank import ProductQuantization
from karui.measuring import Torch
from karui.model import Classification, Model
from karui.numerics.kernels import has_numba
from karui.numerics.product_codes import ProductCode
from karui.technique import Bench
from karui.train import Adam, Cosine, Training

SEEDS = 10
SHAPES = ((1024, 16, 8, 1), (1024, 16, 8, 64), (4096, 16, 8, 1), (4096, 16, 8, 64), (1024, 256, 8, 64))
"""Width, codewords, inputs of a codeword, batch."""


def perceptron() -> nn.Module:
    layers = nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    return nn.Sequential(nn.Flatten(), *layers)


def one_seed(seed: int) -> dict[str, Any]:
    data = load_data("digits")
    training = Training(epochs=12, batch_size=32, optimizer=Adam(lr=2e-3), schedule=Cosine())
    bench = Bench(train=data.train, validation=data.validation, test=data.test, training=training, seed=seed)
    torch.manual_seed(seed)
    x = torch.stack([data.test[i][0] for i in range(len(data.test))])
    dense = bench.fit(Model(perceptron(), example=(x[:2],), task=Classification()))
    own: Any = {"sub_dim": 8, "codewords": 8, "images": 1080, "skip": ("5",)}
    lights = {
        "dense": dense,
        "k-means": ProductQuantization(correct=False, **own).apply(dense, bench),
        "corrected on clean inputs": ProductQuantization(chained=False, **own).apply(dense, bench),
        "corrected, layers chained": ProductQuantization(**own).apply(dense, bench),
    }
    nets: dict[str, Any] = {name: light.module.eval() for name, light in lights.items()}
    with torch.no_grad():
        seen = {name: net[:4](x) for name, net in nets.items()}
    wanted = seen["dense"]
    told: dict[str, Any] = {
        name: {
            "accuracy": 100 * bench.evaluate(light, "test").value,
            "error": float((seen[name] - wanted).norm() / wanted.norm()),
        }
        for name, light in lights.items()
    }
    bits = sum(sum(nets["corrected, layers chained"][place].bits().values()) for place in (1, 3))
    return {**told, "compression": 32 * sum(p.numel() for n in (1, 3) for p in nets["dense"][n].parameters()) / bits}


def timed(width: int, words: int, size: int, batch: int) -> dict[str, Any]:
    """A linear layer against the faster of torch and ONNX Runtime."""
    torch.manual_seed(0)
    dense = nn.Linear(width, width)
    books = torch.randn(width // size, words, size).double()
    code = ProductCode(books, torch.randint(words, (width, width // size, 1)))
    layer = quantized_layer(dense, [code], lookup=True)
    best, times = race(dense, {"by tables": (Torch(), layer)}, torch.randn(1, width), batch)
    ratio = against(times, best, "by tables")
    return {"best": best, "ratio": ratio.value, "verdict": ratio.verdict, **{n: str(t) for n, t in times.items()}}


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    runs = told["runs"]
    scores = "; ".join(f"{name} {shown(one['accuracy'])} %" for name, one in runs.items())
    times = "; ".join(f"{name}: {one['verdict']}" for name, one in told["times"].items())
    lines = [
        f"digits, perceptron, {told['seeds']} seeds, two layers {told['compression']:.1f} times smaller: {scores}",
        f"linear layers by tables, one thread, against the best dense one: {times}",
    ]
    return {"product_quantization": lines + unseen(told["claims"])}


def main() -> None:
    torch.set_num_threads(1)
    ledger = Ledger(CACHE / "product_quantization.json")
    seeds = [ledger.once(f"seed {seed}", lambda seed=seed: one_seed(seed)) for seed in range(SEEDS)]
    times = {
        f"{width} x {width}, {words} codewords of {size}, batch {batch}": ledger.once(
            f"time {width} {words} {size} {batch}",
            lambda w=width, k=words, s=size, b=batch: timed(w, k, s, b),
        )
        for width, words, size, batch in SHAPES
    }
    names = [name for name in seeds[0] if name != "compression"]
    runs = {n: {key: interval([seed[n][key] for seed in seeds]) for key in ("accuracy", "error")} for n in names}
    compression = mean(seed["compression"] for seed in seeds)
    chained, clean, means = "corrected, layers chained", "corrected on clean inputs", "k-means"
    claims = {
        "correction halves the error of responses, every seed": all(
            seed[chained]["error"] <= 0.5 * seed[means]["error"] for seed in seeds
        ),
        "correction gains 3 points of accuracy": runs[chained]["accuracy"]["mean"]
        >= runs[means]["accuracy"]["mean"] + 3,
        "chained inputs beat clean ones, every seed": all(
            seed[chained]["error"] < seed[clean]["error"] for seed in seeds
        ),
        "ten times smaller": compression >= 10,
        "faster than the best dense layer at 16 codewords, every shape": all(
            "x faster" in one["verdict"] for name, one in times.items() if " 16 codewords" in name
        ),
    }
    kernel = "with the numba kernel" if has_numba() else "in plain torch (numba is not installed)"
    lines = [[n, shown(runs[n]["accuracy"]), f"{runs[n]['error']['mean']:.3f}"] for n in names]
    rows = [
        [n, one["dense, torch"], one["dense, ONNX Runtime"], one["by tables"], one["verdict"]]
        for n, one in times.items()
    ]
    text = f"""# Product quantisation (19)

The digits, a perceptron 64-256-256-10, both hidden layers in codewords of eight inputs, eight of them a subspace, that
is {compression:.1f} times smaller; {SEEDS} seeds, mean and 95 % interval, no training. The error is that of the
second layer's responses on the test pictures.

{table(["", "test accuracy, %", "error of responses"], lines)}

A linear layer by tables, {kernel}, one thread, processor time, beside the dense layer; the
verdict is against the faster of the two dense ones.

{table(["layer", "dense, torch", "dense, ONNX Runtime", "by tables", ""], rows)}

{claims_table(claims)}
"""
    values = {"seeds": SEEDS, "runs": runs, "compression": compression, "times": times, "claims": claims}
    publish("product_quantization", values, text, measured(values))


if __name__ == "__main__":
    main()
