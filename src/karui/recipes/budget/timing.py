"""The time of blocks and of whole models in the engine, measured once per machine.

Blocks are run each in a session of its own, in turns, with the engine's own recorder on: it tells the time of the
operator without the changes of layout around it, which a layer inside a network does not pay. The cache is one file for
each machine; a key holds operators, shapes, batch, threads and the engine's version. A reference block is measured with
every lot, and times are kept as if it had always been as fast as in the first: what a machine does meanwhile drops out.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from karui.artifact.files import write_file
from karui.measuring import Engine, OnnxRuntime, Ratio, Timing, this_machine, time_ratio
from karui.measuring.bar import bar
from karui.measuring.engines import onnx_session
from karui.measuring.inference import batch_of
from karui.measuring.rounds import interleaved
from karui.model import Model
from karui.recipes.budget.blocks import Block, structure

CACHE = "KARUI_CACHE"
"""Environment variable: the folder of the timing cache."""
ROUNDS, CALLS, LOT = 9, 4, 24
"""Rounds of a lot, calls of each block in a round, blocks of a lot."""
TURNS = 101
"""Rounds in which whole files are timed against one another."""
REFERENCE = "reference"
FREE = 1.05
"""How much slower a wider convolution may be measured and still count as free."""


def cache_folder() -> Path:
    """The folder of the timing cache: `$KARUI_CACHE`, else karui's folder among the user's caches."""
    if given := os.environ.get(CACHE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "karui"


@dataclass
class TimingCache:
    """Measured seconds by key, in one file for each machine; written after every lot.

    Settings:
        file: where; None keeps nothing.
    """

    file: Path | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_this_machine(cls, folder: Path | None = None) -> TimingCache:
        """The cache of this processor and system."""
        machine = this_machine(())
        mark = hashlib.sha256(f"{machine.processor}|{machine.threads}|{machine.system}".encode()).hexdigest()[:12]
        file = (folder or cache_folder()) / f"timings-{mark}.json"
        return cls(file, _held(file))

    def put(self, found: Mapping[str, float]) -> None:
        """Keep new times; what another process has measured meanwhile stays, and goes before the same times of ours."""
        self.seconds.update(found)
        if self.file is not None and found:
            self.seconds.update(_held(self.file))
            write_file(self.file, (json.dumps(self.seconds, indent=0, sort_keys=True) + "\n").encode())


def _held(file: Path) -> dict[str, float]:
    """The times in a file; none where there is no such file, or it is damaged."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): float(v) for k, v in held.items()} if isinstance(held, dict) else {}


@dataclass(frozen=True, kw_only=True)
class Stopwatch:
    """Times blocks and models in ONNX Runtime.

    Settings:
        batch, threads: how they are run.
        cache: what is known already.
        progress: whether a bar is shown.
    """

    batch: int = 1
    threads: int = 1
    cache: TimingCache = field(default_factory=TimingCache)
    progress: bool = False

    def blocks(self, blocks: Sequence[Block]) -> list[float]:
        """Seconds of each block."""
        keys = [f"{block.key} | {self._where}" for block in blocks]
        unknown = {key: block for key, block in zip(keys, blocks, strict=True) if key not in self.cache.seconds}
        lots = [list(unknown.items())[start : start + LOT] for start in range(0, len(unknown), LOT)]
        with bar("time of layers", len(lots), self.progress and bool(lots)) as step:
            for lot in lots:
                self._measure(dict(lot))
                step()
        return [self.cache.seconds[key] for key in keys]

    def named(self, name: str, make: Callable[[], Block]) -> float:
        """Seconds of a block that is made only where the time under this name is not known."""
        key = f"{name} | {self._where}"
        if key not in self.cache.seconds:
            self.cache.put({key: self.blocks([make()])[0]})
        return self.cache.seconds[key]

    def multiple(self) -> int:
        """The widths that the engine rewards: the largest step up to which rounding a width up costs nothing."""
        widths = range(33, 65)
        seconds = dict(zip(widths, self.blocks([_convolution(32, width) for width in widths]), strict=True))
        for step in (16, 8, 4, 2):
            if all(seconds[-(-width // step) * step] <= FREE * seconds[width] for width in widths):
                return step
        return 1

    def ratio(self, dense: Model, light: bytes, other: bytes, engine: Engine | None = None) -> float:
        """How long a file takes as a share of another in ONNX Runtime, timed in turns.

        Args:
            dense: the model whose example is run.
            light: the file that is judged.
            other: the file that it is judged against.
            engine: what runs the judged file; ONNX Runtime where it is not given.
        """
        engine, home = engine or OnnxRuntime(), OnnxRuntime()
        if light == other and engine.name == home.name:
            return 1.0
        key = f"{structure(light)} in {engine.name} {engine.version()} / {structure(other)} | {self._where}"
        if key not in self.cache.seconds:
            found = self._samples(dense, {"light": (engine, light), "other": (home, other)})
            # Round by round: what slows the machine for a while slows both.
            self.cache.put({key: float(np.median(np.array(found["light"]) / np.array(found["other"])))})
        return self.cache.seconds[key]

    def whole(self, dense: Model, data: bytes) -> float:
        """Seconds of a whole file in ONNX Runtime, on the scale of the blocks; `dense` gives the inputs.

        It is timed in turns with the reference, whose time as a block is known: a machine that is busy meanwhile would
        otherwise make a network as slow as it has never been beside its layers.
        """
        key = f"{structure(data)} | {self._where}"
        if key not in self.cache.seconds:
            known = self.blocks([_reference()])[0]
            engine, inputs = OnnxRuntime(), batch_of(dense.example, self.batch)
            blocks = {"reference": _reference(), "call": _nothing()}
            calls = {name: _bound(engine, block.data(), self.threads, block.arrays()) for name, block in blocks.items()}
            calls["whole"] = _bound(engine, data, self.threads, inputs)
            taken = {name: np.array(found) for name, found in self._in_turns(calls).items()}
            # What a call costs by itself is part of a network's time, and no part of a block's.
            shares = taken["whole"] / np.maximum(taken["reference"] - taken["call"], 1e-9)
            self.cache.put({key: known * float(np.median(shares))})
        return self.cache.seconds[key]

    def side_by_side(self, dense: Model, data: bytes, forms: Mapping[str, tuple[Engine, bytes]]) -> dict[str, Ratio]:
        """Dense over light for every form, all of them timed in one run and not taken from the cache."""
        samples = self._samples(dense, {"": (OnnxRuntime(), data), **forms})
        times = {name: self._timing(name, taken) for name, taken in samples.items()}
        return {name: time_ratio(times[""], times[name]) for name in forms}

    def _timing(self, name: str, taken: Sequence[float]) -> Timing:
        low, middle, high = np.quantile(taken, (0.25, 0.5, 0.75)).tolist()
        return Timing(
            contestant=name, engine="", threads=self.threads, batch=self.batch,
            median=middle, low=low, high=high, samples=tuple(taken),
        )  # fmt: skip

    def _samples(self, dense: Model, files: Mapping[str, tuple[Engine, bytes]]) -> dict[str, list[float]]:
        inputs = batch_of(dense.example, self.batch)
        return self._in_turns(
            {name: _bound(engine, data, self.threads, inputs) for name, (engine, data) in files.items()}
        )

    def _in_turns(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
        for call in calls.values():
            call()
            call()
        return interleaved(calls, TURNS, 20.0, cpu_time=self.threads == 1)

    @property
    def _where(self) -> str:
        return f"batch {self.batch}, threads {self.threads}, onnxruntime {OnnxRuntime().version()}"

    def _measure(self, lot: dict[str, Block]) -> None:
        """Time a lot of blocks in turns, beside the reference."""
        found = profiled({**lot, REFERENCE: _reference()}, self.threads)
        reference = f"{REFERENCE} | {self._where}"
        now = found.pop(REFERENCE)
        if reference not in self.cache.seconds:
            self.cache.put({reference: now})
        drift = self.cache.seconds[reference] / now
        self.cache.put({key: seconds * drift for key, seconds in found.items()})


def profiled(blocks: Mapping[str, Block], threads: int) -> dict[str, float]:
    """Seconds of each block, without changes of layout: the engine's recorder, median over rounds in turns."""
    with tempfile.TemporaryDirectory(prefix="karui-") as folder:
        prefix = Path(folder)
        sessions = {
            name: onnx_session(block.data(), threads, profile=str(prefix / str(number)))
            for number, (name, block) in enumerate(blocks.items())
        }
        feeds = {name: block.feed() for name, block in blocks.items()}
        for number in range(ROUNDS + 1):
            for name in sessions if number % 2 == 0 else reversed(sessions):
                for _ in range(CALLS):
                    sessions[name].run(None, feeds[name])
        return {name: _recorded(session.end_profiling()) for name, session in sessions.items()}


LAYOUT = ("ReorderInput", "ReorderOutput", "Transpose")


def _recorded(file: str) -> float:
    """Seconds of one call from a record of many: for each operator the median over rounds, without the first round."""
    events = json.loads(Path(file).read_text(encoding="utf-8"))
    taken: dict[str, list[float]] = {}
    for event in events:
        kernel = event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        if kernel and event["args"].get("op_name") not in LAYOUT:
            taken.setdefault(event["name"], []).append(event["dur"] * 1e-6)
    return sum(_typical(durations) for durations in taken.values())


def _typical(durations: Sequence[float]) -> float:
    """The mean of each round's calls (the recorder counts whole microseconds), and the median of those."""
    rounds = np.array(durations[CALLS:])
    rounds = rounds[: len(rounds) // CALLS * CALLS].reshape(-1, CALLS)
    return median(rounds.mean(axis=1).tolist())


def _bound(engine: Engine, data: bytes, threads: int, inputs: tuple[Any, ...]) -> Callable[[], Any]:
    """One call of a file."""
    run = engine.prepare(data, threads)
    return lambda: run(inputs)


def _nothing() -> Block:
    """What costs no more than a call."""
    import onnx
    from onnx import helper

    node = helper.make_node("Identity", ["x"], ["y"])
    return Block((node,), {}, {"x": ((1, 8), onnx.TensorProto.FLOAT)}, "y", 18)


def _reference() -> Block:
    """A convolution of middling size, timed with every lot."""
    return _convolution(32, 32)


def _convolution(inputs: int, outputs: int) -> Block:
    import onnx
    from onnx import helper

    weight = np.full((outputs, inputs, 3, 3), 0.01, dtype=np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    return Block((node,), {"w": weight}, {"x": ((1, inputs, 16, 16), onnx.TensorProto.FLOAT)}, "y", 18)
