"""What the benchmarks share: real pictures, parts that outlive a killed run, means with intervals, and results kept."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import t as student
from torch import Tensor
from torch.nn import functional
from torch.utils.data import TensorDataset

from karui.data import Splits, hold_out
from karui.measuring.machine import this_machine

ROOT = Path(__file__).resolve().parents[1]
CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def data_folder() -> Path:
    """The folder of real data; the benchmark ends with a word about it where there is none."""
    folder = Path(os.environ.get("KARUI_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "README.md").is_file():
        print(f"skipped: no real data at {folder}; set KARUI_DATA to its folder")
        sys.exit(0)
    return folder


def cifar10(train: int = 15_000, seed: int = 0) -> Splits:
    """CIFAR-10: `train` pictures (a tenth of them held out) in the classes' proportion, and the whole test set."""
    folder = data_folder() / "cifar10"
    labels = np.load(folder / "labels.npz")

    def part(name: str, sheets: int) -> TensorDataset:
        pixels = np.concatenate([_sheet(folder / f"{name}_{number:02d}.webp") for number in range(sheets)])
        pictures = torch.from_numpy(pixels).float().div(255)
        center, spread = (torch.tensor(values).reshape(3, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD))
        targets = torch.from_numpy(labels[f"{name}_y"][: len(pictures)].astype(np.int64))
        return TensorDataset((pictures - center) / spread, targets)

    everything = part("train", -(-train // 1000))
    return _splits(TensorDataset(*(tensor[:train] for tensor in everything.tensors)), part("test", 10), seed, "cifar10")


def _sheet(file: Path) -> np.ndarray:
    with Image.open(file) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    return pixels.reshape(20, 32, 50, 32, 3).transpose(0, 2, 4, 1, 3).reshape(1000, 3, 32, 32)


def mnist(train: int = 30_000, seed: int = 0) -> Splits:
    """MNIST: the first `train` pictures (a tenth of them held out) and 3,000 to test."""
    arrays = np.load(data_folder() / "mnist" / "mnist.npz")

    def part(name: str, number: int) -> TensorDataset:
        pictures = torch.from_numpy(arrays[f"{name}_x"][:number]).float().div(255).reshape(-1, 1, 28, 28)
        return TensorDataset(pictures, torch.from_numpy(arrays[f"{name}_y"][:number].astype(np.int64)))

    return _splits(part("train", train), part("test", 3000), seed, "mnist")


def _splits(train: TensorDataset, test: TensorDataset, seed: int, name: str) -> Splits:
    rest, held = hold_out(train, 0.1, seed)
    classes = CIFAR_CLASSES if name == "cifar10" else tuple(str(digit) for digit in range(10))
    return Splits(train=rest, validation=held, test=test, classes=classes, name=name)


def crop_and_flip(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """The usual augmentation of CIFAR: a random crop of the picture padded by 4 pixels, mirrored half of the time."""
    number, _, height, width = pictures.shape
    padded = functional.pad(pictures, (4, 4, 4, 4))
    down, across = (torch.randint(9, (number, 1), generator=generator) for _ in range(2))
    columns = across + torch.arange(width)
    mirrored = torch.rand(number, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    rows = down + torch.arange(height)
    return padded[torch.arange(number)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Ledger:
    """Finished parts of a benchmark, kept in `.cache/benchmarks/NAME.json`, so that a run that was killed goes on.

    Delete the file to measure anew.
    """

    def __init__(self, name: str) -> None:
        self.file = ROOT / ".cache" / "benchmarks" / f"{name}.json"
        self.parts: dict[str, Any] = json.loads(self.file.read_text("utf-8")) if self.file.is_file() else {}

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """The part called `key`: JSON values, as kept, or made now."""
        if key not in self.parts:
            self.parts[key] = make()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            fresh = self.file.with_suffix(".new")
            fresh.write_text(json.dumps(self.parts, indent=1), "utf-8")
            fresh.replace(self.file)
            print(f"{key}: {json.dumps(self.parts[key])[:200]}", flush=True)
        return self.parts[key]


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean of the seeds and its 95 % interval (Student's)."""
    center = mean(values)
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return {"mean": center, "low": center - half, "high": center + half, "values": list(values)}


def shown(told: dict[str, Any]) -> str:
    """An interval for a table."""
    return f"{told['mean']:.2f} [{told['low']:.2f}, {told['high']:.2f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def runs_table(runs: Sequence[dict[str, Any]]) -> str:
    """Networks with their counts and the interval of their accuracy."""
    rows = [
        [run["network"], f"{run['parameters']:,}", f"{run['macs'] / 1e6:.2f}", shown(run["accuracy"])] for run in runs
    ]
    return table(["network", "parameters", "million MACs", "test accuracy, % [95 %]"], rows)


def claims_table(claims: dict[str, bool]) -> str:
    """What the paper claims, and whether it was seen here."""
    return table(["claim", "shown here"], [[claim, "yes" if held else "no"] for claim, held in claims.items()])


def publish(name: str, values: dict[str, Any], text: str) -> None:
    """Keep the results in `results/NAME.json` and `results/NAME.md`, with the machine they were taken on."""
    machine = this_machine()
    folder = ROOT / "results"
    folder.mkdir(exist_ok=True)
    told = {"machine": str(machine), **values}
    (folder / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    (folder / f"{name}.md").write_text(f"{text.strip()}\n\nMachine: {machine}.\n", "utf-8")
    print(text)
