"""What the training loop costs over a bare PyTorch loop that does the same updates, on the digits CNN.

Both train the same network on the same data with the same optimizer, interleaved, in one process and one thread. The
ratio of times is taken within each round, so that a slow spell of the machine falls on both.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from karui.data import load_data
from karui.measuring.machine import this_machine
from karui.model import Classification, Model
from karui.train import SGD, Constant, Training, fit

EPOCHS, BATCH, ROUNDS = 5, 64, 12
RESULT = Path(__file__).parents[1] / "results" / "train_overhead.json"


def convolutional() -> nn.Module:
    """The 16-32-32 network of the tests."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveMaxPool2d(1)),
        *(nn.Flatten(), nn.Linear(32, 10)),
    )


def perceptron() -> nn.Module:
    """A network so small that a step is mostly overhead: the worst case."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def bare(net: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """The plainest loop that does the same updates."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    net.train()
    for _ in range(EPOCHS):
        for index in torch.randperm(len(inputs)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs[index]), targets[index]).backward()
            optimizer.step()


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(make: Callable[[], nn.Module]) -> dict[str, float]:
    """Median times of both loops, and the ratio with its spread over the rounds."""
    train = load_data("digits").train
    inputs, targets = train.tensors
    model = Model(make(), example=(inputs[:1],), task=Classification())
    training = Training(epochs=EPOCHS, batch_size=BATCH, optimizer=SGD(), schedule=Constant(), decay_all=True)
    loops = {
        "karui": lambda: fit(model, train, training=training),
        "bare": lambda: bare(model.copy().module, inputs, targets),
    }
    for work in loops.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(ROUNDS):
        for name in list(loops)[:: 1 if number % 2 else -1]:
            times[name].append(seconds(loops[name]))
    ratios = sorted(ours / plain for ours, plain in zip(times["karui"], times["bare"], strict=True))
    return {
        "karui_seconds": statistics.median(times["karui"]),
        "bare_seconds": statistics.median(times["bare"]),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[ROUNDS // 4],
        "ratio_high": ratios[-1 - ROUNDS // 4],
    }


def main() -> None:
    torch.set_num_threads(1)
    steps = EPOCHS * -(-len(load_data("digits").train) // BATCH)
    results = {make.__name__: compare(make) for make in (convolutional, perceptron)}
    for name, found in results.items():
        extra = 1e6 * (found["karui_seconds"] - found["bare_seconds"]) / steps
        print(
            f"{name}: {found['ratio']:.2f} times the bare loop (quartiles {found['ratio_low']:.2f} to "
            f"{found['ratio_high']:.2f}), {extra:.0f} microseconds more a step of "
            f"{1e3 * found['bare_seconds'] / steps:.2f} ms"
        )
    RESULT.parent.mkdir(exist_ok=True)
    here = dataclasses.asdict(this_machine(("lightning-fabric",)))
    about = {
        "epochs": EPOCHS,
        "batch": BATCH,
        "rounds": ROUNDS,
        "steps": steps,
        "machine": here,
    }
    RESULT.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
