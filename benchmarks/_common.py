"""What the benchmarks share: real pictures, parts that outlive a killed run, means with intervals, and results kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from torch.nn import functional
from torch.utils.data import Subset, TensorDataset

from karui.artifact import save
from karui.data import Splits, hold_out, load_data, tensors_of
from karui.measuring import Clock, Ratio, time_ratio
from karui.measuring.machine import this_machine
from karui.model import Model

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "benchmarks"


def run_installed(command: Sequence[str]) -> None:
    """A process, without its output, that may keep its bytecode: as of a package that pip has compiled."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=settings)


def data_folder() -> Path:
    """The folder of real data; the benchmark ends with a word about it where there is none."""
    folder = Path(os.environ.get("KARUI_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "README.md").is_file():
        print(f"skipped: no real data at {folder}; set KARUI_DATA to its folder")
        sys.exit(0)
    return folder


def cifar10(train: int | None = None, seed: int = 0) -> Splits:
    """CIFAR-10, normalised; of the training pictures the first `train` (every class alike), or all 13,500."""
    splits = load_data(f"cifar10:{data_folder() / 'cifar10'}", seed=seed)
    return splits if train is None else replace(splits, train=Subset(splits.train, range(train)))


def half_sized_cifar10(train: int | None, test: int) -> Splits:
    """CIFAR-10 at 16 pixels, each the mean of four, with the first so many pictures to train and to test."""
    whole = cifar10(train)

    def halved(part: Any, number: int | None) -> TensorDataset:
        x, y = (tensor[:number] for tensor in tensors_of(part) or ())
        return TensorDataset(functional.avg_pool2d(x, 2), y)

    return replace(
        whole,
        train=halved(whole.train, None),
        validation=halved(whole.validation, None),
        test=halved(whole.test, test),
    )


def mnist(train: int = 27_000, seed: int = 0) -> Splits:
    """MNIST: the first `train` pictures of 27,000, 3,000 to validate, 3,000 to test."""
    arrays = np.load(data_folder() / "mnist" / "mnist.npz")

    def part(name: str) -> TensorDataset:
        pictures = torch.from_numpy(arrays[f"{name}_x"]).float().div(255).reshape(-1, 1, 28, 28)
        return TensorDataset(pictures, torch.from_numpy(arrays[f"{name}_y"].astype(np.int64)))

    rest, held = hold_out(part("train"), 0.1, seed)
    classes = tuple(str(digit) for digit in range(10))
    return Splits(train=Subset(rest, range(train)), validation=held, test=part("test"), classes=classes, name="mnist")


class Ledger:
    """Finished parts of a benchmark, kept in a JSON file, so that a run that was killed goes on.

    Delete the file to measure anew.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.parts: dict[str, Any] = json.loads(self.file.read_text("utf-8")) if self.file.is_file() else {}

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """The part called `key`: JSON values, as kept, or made now."""
        if key not in self.parts:
            self.keep(key, make())
            print(f"{key}: {json.dumps(self.parts[key])[:200]}", flush=True)
        return self.parts[key]

    def keep(self, key: str, value: Any) -> None:
        """Put JSON values in the place of the part called `key`."""
        self.parts[key] = value
        self.file.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.file.with_suffix(".new")
        fresh.write_text(json.dumps(self.parts, indent=1), "utf-8")
        fresh.replace(self.file)


def files(model: Model) -> dict[str, int | None]:
    """Bytes of the weights and of the ONNX file of a model, as it is saved."""
    with tempfile.TemporaryDirectory() as scratch:
        saved = save(model, Path(scratch) / "model")
    return {"weights file": saved.weights_bytes, "onnx file": saved.onnx_bytes}


def times(clock: Clock, dense: Model, light: Model) -> dict[str, dict[str, Any]]:
    """For each batch size, how many times faster the light model is, with its interval, and the seconds of both."""
    found = clock.time({"dense": dense, "light": light})
    return {
        f"batch {heavy.batch}": {
            "ratio": (ratio := time_ratio(heavy, lean)).value,
            "low": ratio.low,
            "high": ratio.high,
            "seconds": [heavy.median, lean.median],
        }
        for heavy, lean in zip(found.of("dense"), found.of("light"), strict=True)
    }


def shown_times(of: dict[str, dict[str, Any]]) -> list[str]:
    """The same for a table."""
    return [f"{one['ratio']:.2f} [{one['low']:.2f}, {one['high']:.2f}]" for one in of.values()]


def speeds(times: dict[str, dict[str, float]]) -> str:
    """Ratios of time in words, each with its interval; what is slower is called slower."""
    found = {
        name: Ratio(quantity="time", value=one["ratio"], low=one["low"], high=one["high"])
        for name, one in times.items()
    }
    return ", ".join(f"{name} {ratio.verdict}" for name, ratio in found.items())


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean of the seeds and its 95 % interval (Student's)."""
    center = mean(values)
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return {"mean": center, "low": center - half, "high": center + half, "values": list(values)}


def by_name(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Of what each seed found, by name, the intervals."""
    return {name: interval([run[name] for run in runs]) for name in runs[0]}


def apart(runs: Sequence[dict[str, float]], one: str, other: str) -> dict[str, Any]:
    """The difference of two arms, seed by seed."""
    return interval([run[one] - run[other] for run in runs])


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


def unseen(claims: dict[str, bool]) -> list[str]:
    """A line for each claim that was not seen, for `measured`."""
    return [f"not shown: {claim}" for claim, held in claims.items() if not held]


def of_networks(name: str, fresh: dict[str, Any]) -> dict[str, Any]:
    """By network, what was measured now, and of the others what the results hold; each says on which machine.

    Args:
        name: the benchmark; its results have such a dictionary under "networks".
        fresh: what this machine has measured.
    """
    file = ROOT / "results" / f"{name}.json"
    told = json.loads(file.read_text("utf-8")) if file.is_file() else {"networks": {}}
    kept = {network: {"machine": told["machine"], **values} for network, values in told["networks"].items()}
    machine = str(this_machine())
    here = {network: {"machine": machine, **values} for network, values in fresh.items()}
    return kept | here


def where(network: dict[str, Any]) -> list[str]:
    """A paragraph on the machine of a network's results, where it is not this one."""
    return [] if network["machine"] == str(this_machine()) else [f"Measured on: {network['machine']}."]


def publish(name: str, values: dict[str, Any], text: str, measured: dict[str, list[str]] | None = None) -> None:
    """Keep the results in `results/NAME.json` and `results/NAME.md`, with the machine they were taken on.

    Args:
        name: the benchmark.
        values: what was measured.
        text: the same for people, as Markdown.
        measured: by slug, the few lines that `karui show` and the catalogue tell of each technique. A benchmark has
            them of a function `measured(values)`, so that they can be worded anew without measuring again.
    """
    machine = this_machine()
    folder = ROOT / "results"
    folder.mkdir(exist_ok=True)
    told = {"machine": str(machine), **values} | ({"measured": measured} if measured else {})
    (folder / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    (folder / f"{name}.md").write_text(f"{text.strip()}\n\nMachine: {machine}.\n", "utf-8")
    print(text)
