"""The layers of the low-rank chapter that have kernels of their own, against goals: surveys 19, 25, 26 and 29.

Product quantisation by tables, mixtures of a dictionary that are looked up, convolutions without some of their columns,
and the output layer that previews its logits, each in turns with the best dense engine: torch as it is, torch with the
channels last (convolutions), ONNX Runtime. One thread, processor time, with the numba kernels where that is installed.

A goal is what a good implementation of the same loops reaches on a busy machine. It is kept for the shapes that are
named; looked-up mixtures have none but to be faster than dense.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import group_brain_damage
import lcnn
import product_quantization
import svd_softmax
from _common import CACHE, Ledger, claims_table, publish, table, unseen
from karui.numerics.kernels import has_numba


def columns() -> dict[str, Any]:
    """A convolution with a fifth of its columns."""
    told = group_brain_damage.timed(256, 14, 0.2)
    return {
        "ratio": told["gathered, torch: ratio"],
        "verdict": told["gathered, torch: verdict"],
        "best": told["best dense"],
    }


def mixtures(channels: int, side: int, size: int, live: float) -> dict[str, Any]:
    """A convolution whose filters mix a dictionary."""
    return {
        key: value
        for key, value in lcnn.timed(channels, side, size, live).items()
        if key in ("ratio", "verdict", "best")
    }


def tables(width: int, batch: int) -> dict[str, Any]:
    """A linear layer in 16 codewords of eight inputs."""
    told = product_quantization.timed(width, 16, 8, batch)
    return {key: told[key] for key in ("ratio", "verdict", "best")}


def previewed() -> dict[str, Any]:
    """An output layer of 50,000 words and width 512, window 64, 1 % in full view."""
    return svd_softmax.raced(50_000, 64, 0.01)


GOALS: dict[str, tuple[str, float, Callable[[], dict[str, Any]]]] = {
    "1024 x 1024, 16 codewords of 8, batch 64": ("product_quantization", 2.1, lambda: tables(1024, 64)),
    "4096 x 4096, 16 codewords of 8, batch 1": ("product_quantization", 2.3, lambda: tables(4096, 1)),
    "50,000 words, window 64, 1 % in full view, batch 1": ("svd_softmax", 3.5, previewed),
    "256 channels, 14x14, a fifth of the columns": ("group_brain_damage", 2.5, columns),
    "256 channels, 14x14, dictionary of 30, 10 % live": ("lcnn", 1.0, lambda: mixtures(256, 14, 30, 0.1)),
    "64 channels, 56x56, dictionary of 30, 10 % live": ("lcnn", 1.0, lambda: mixtures(64, 56, 30, 0.1)),
}
"""By layer: the technique, times faster than the best dense engine it should be, and how it is timed."""


def measured(told: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of the four."""
    lines: dict[str, list[str]] = {}
    for name, one in told["layers"].items():
        lines.setdefault(one["technique"], []).append(
            f"{name}, one thread, {told['kernel']}, against the best dense engine ({one['best']}): {one['verdict']}; "
            f"goal {one['goal']:g}"
        )
    missed = {slug: {c: held for c, held in told["claims"].items() if c.startswith(f"{slug},")} for slug in lines}
    return {slug: own + unseen(missed[slug]) for slug, own in lines.items()}


def main() -> None:
    torch.set_num_threads(1)
    ledger = Ledger(CACHE / "low_rank_kernels.json")
    layers = {
        name: {**ledger.once(name, timed), "technique": technique, "goal": goal}
        for name, (technique, goal, timed) in GOALS.items()
    }
    claims = {
        f"{one['technique']}, {name}: {one['goal']:g} times faster": one["ratio"] >= one["goal"]
        for name, one in layers.items()
    }
    rows = [[one["technique"], name, one["best"], one["verdict"], f"{one['goal']:g}"] for name, one in layers.items()]
    kernel = "with the numba kernels" if has_numba() else "without numba"
    text = f"""# Kernels of the low-rank chapter

Single layers, {kernel}, one thread, processor time, in turns with the dense layer in torch (convolutions also with
the channels last) and in ONNX Runtime; against the fastest of them.

{table(["technique", "layer", "best dense", "time", "goal"], rows)}

{claims_table(claims)}
"""
    values = {"kernel": kernel, "layers": layers, "claims": claims}
    publish("low_rank_kernels", values, text, measured(values))


if __name__ == "__main__":
    main()
