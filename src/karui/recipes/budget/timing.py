"""The time of blocks and of whole models in the engine, measured once per machine.

Every time is kept with its uncertainty, so that nobody takes the clock's noise for a saving or a cost; where two are
too near to be told apart, they are timed head to head. A key of the cache holds operators, shapes, batch, threads and
the engine's version. A reference block is measured with every lot, and times are kept as if it had always been as fast
as in the first: what a machine does meanwhile drops out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from karui.deployment import Deployment
from karui.measuring import Engine, OnnxForm, OnnxRuntime, Timing
from karui.measuring.bar import bar
from karui.measuring.filed import Filed
from karui.measuring.inference import batch_of, tensors_of
from karui.measuring.rounds import interleaved
from karui.model import Model
from karui.recipes.budget.blocks import Block, structure
from karui.recipes.budget.cache import SURE, Measured, TimingCache, typical
from karui.recipes.budget.narrow import narrowed
from karui.recipes.budget.recorder import Timed, head_to_head, profiled

LOT = 24
"""Blocks that are timed in turns."""
TURNS = 51
"""Rounds in which whole files are timed against one another, and
AGAIN, NEAR: how often they are at most, until the uncertainty is below this share."""
AGAIN, NEAR = 3, 0.02
REFERENCE = "reference"
FREE = 0.5
"""What wider convolutions may take longer, as a share of what their width alone would cost, and still count as free."""


Form = OnnxForm | Deployment
"""A whole file; its bytes are read where they are needed, and held by nobody."""


def _inputs(dense: Model) -> str:
    """Sizes and kinds of a sample: the same operators take longer on larger pictures and longer sequences."""
    return " ".join(f"{list(x.shape[1:])} {str(x.dtype).removeprefix('torch.')}" for x in tensors_of(dense.example))


@dataclass(frozen=True, kw_only=True)
class Stopwatch:
    """Times blocks and models in ONNX Runtime.

    Settings:
        batch, threads: how they are run.
        cache: what is known already.
        progress: whether a bar is shown.
        narrow: whether blocks are timed in 8 bits; whole files are what they are.
        structures: of whole files, by digest: to tell one, the file must be in memory.
    """

    batch: int = 1
    threads: int = 1
    cache: TimingCache = field(default_factory=TimingCache)
    progress: bool = False
    narrow: bool = False
    structures: dict[str, str] = field(default_factory=dict)

    def blocks(self, blocks: Sequence[Block]) -> list[Measured]:
        """Seconds of each block."""
        keys = [self._key(self._told(block.key)) for block in blocks]
        unknown = {key: block for key, block in zip(keys, blocks, strict=True) if key not in self.cache.found}
        lots = [list(unknown.items())[start : start + LOT] for start in range(0, len(unknown), LOT)]
        with bar("time of layers", len(lots), self.progress and bool(lots)) as step:
            for lot in lots:
                self._measure(dict(lot))
                step()
        return [self.cache.found[key] for key in keys]

    def named(self, name: str, make: Callable[[], Block]) -> Measured:
        """Seconds of a block that is made only where the time under this name is not known."""
        return self._once(self._told(name), lambda: self.blocks([make()])[0])

    def against(self, name: str, make: Callable[[], Block], old: Block) -> Measured:
        """A block's time as a share of another's, timed head to head; it is made only where that is not known."""
        told = self._told(f"{name} / {old.key}")
        return self._once(told, lambda: head_to_head(self._form(make()), self._form(old), self.threads))

    def _told(self, name: str) -> str:
        return f"{name} in 8 bits" if self.narrow else name

    def _form(self, block: Block) -> Timed:
        return narrowed(block) if self.narrow else block

    def multiple(self) -> int:
        """The widths that the engine rewards: the largest step up to which rounding a width up costs nothing."""
        widths = range(33, 65)
        seconds = dict(zip(widths, self.blocks([_convolution(32, width) for width in widths]), strict=True))

        def free(step: int) -> bool:
            # Within a step, wider ones take no longer: many widths together, as one says little on a noisy clock.
            low, high = (
                [width for width in widths if ((width - 1) % step >= step // 2) is upper] for upper in (False, True)
            )
            slower = sum(seconds[w].value for w in high) / sum(seconds[w].value for w in low) - 1
            return slower <= FREE * (sum(high) / sum(low) - 1)

        return next((step for step in (16, 8, 4, 2) if free(step)), 1)

    def ratio(self, dense: Model, light: Form, other: Form, engine: Engine | None = None) -> Measured:
        """How long a file takes as a share of another in ONNX Runtime, timed in turns.

        Args:
            dense: the model whose example is run.
            light: the file that is judged.
            other: the file that it is judged against.
            engine: what runs the judged file; ONNX Runtime where it is not given.
        """
        engine, home = engine or OnnxRuntime(), OnnxRuntime()
        if engine.name == home.name and Filed.digest(light) == Filed.digest(other):
            return Measured(1.0)
        name = f"{self._structure(light)} in {engine.name} {engine.version()} / {self._structure(other)}"

        def race() -> np.ndarray:
            found = self._samples(dense, {"light": (engine, light), "other": (home, other)})
            # Round by round: what slows the machine for a while slows both.
            return np.array(found["light"]) / np.array(found["other"])

        return self._once(f"{name} of {_inputs(dense)}", lambda: _until_near(race))

    def whole(self, dense: Model, file: Form) -> Measured:
        """Seconds of a whole file in ONNX Runtime, on the scale of the blocks; `dense` gives the inputs.

        It is timed in turns with the reference, whose time as a block is known: a machine that is busy meanwhile would
        otherwise make a network as slow as it has never been beside its layers.
        """

        def measure() -> Measured:
            known = replace(self, narrow=False).blocks([_reference()])[0].value
            share = _until_near(lambda: self._beside_reference(dense, file))
            return Measured(known * share.value, known * share.error)

        return self._once(f"{self._structure(file)} of {_inputs(dense)}", measure)

    def _beside_reference(self, dense: Model, file: Form) -> np.ndarray:
        """A whole file's time as a share of the reference's, round by round."""
        engine, inputs = OnnxRuntime(), batch_of(dense.example, self.batch)
        blocks = {"reference": _reference(), "call": _nothing()}
        calls = {name: _bound(engine, block.data(), self.threads, block.arrays()) for name, block in blocks.items()}
        calls["whole"] = _bound(engine, file, self.threads, inputs)
        taken = {name: np.array(found) for name, found in self._in_turns(calls).items()}
        # What a call costs by itself is part of a network's time, and no part of a block's.
        return taken["whole"] / np.maximum(taken["reference"] - taken["call"], 1e-9)

    def side_by_side(
        self, dense: Model, file: Form, forms: Mapping[str, tuple[Engine, Form]]
    ) -> dict[str, tuple[Timing, Timing]]:
        """Times of the dense file and of every form, each form in turns with the dense one and not taken from the
        cache. The dense file itself is raced against nobody: its two times are one.

        Two at a time: an engine holds a network of its own for every file that it runs.
        """
        home, times = OnnxRuntime(), {}
        for name, (engine, form) in forms.items():
            itself = engine.name == home.name and Filed.digest(form) == Filed.digest(file)
            files = {"dense": (home, file), **({} if itself else {"light": (engine, form)})}
            taken = self._samples(dense, files)
            times[name] = (
                self._timing("dense", home, taken["dense"]),
                self._timing("light", engine, taken["dense" if itself else "light"]),
            )
        return times

    def _timing(self, name: str, engine: Engine, taken: Sequence[float]) -> Timing:
        low, middle, high = np.quantile(taken, (0.25, 0.5, 0.75)).tolist()
        return Timing(
            contestant=name, engine=engine.name, threads=self.threads, batch=self.batch,
            median=middle, low=low, high=high, samples=tuple(taken),
        )  # fmt: skip

    def _structure(self, file: Form) -> str:
        """The digest of a file that files of equal time have in common."""
        told = Filed.digest(file)
        if told not in self.structures:
            self.structures[told] = structure(file.data)
        return self.structures[told]

    def _samples(self, dense: Model, files: Mapping[str, tuple[Engine, Form]]) -> dict[str, list[float]]:
        inputs = batch_of(dense.example, self.batch)
        return self._in_turns(
            {name: _bound(engine, file, self.threads, inputs) for name, (engine, file) in files.items()}
        )

    def _in_turns(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
        for call in calls.values():
            call()
            call()
        return interleaved(calls, TURNS, 20.0, cpu_time=self.threads == 1)

    def _key(self, name: str) -> str:
        return f"{name} | batch {self.batch}, threads {self.threads}, onnxruntime {OnnxRuntime().version()}"

    def _once(self, name: str, measure: Callable[[], Measured]) -> Measured:
        """What the cache holds under a name; measured where it holds nothing."""
        key = self._key(name)
        if key not in self.cache.found:
            self.cache.put({key: measure()})
        return self.cache.found[key]

    def _measure(self, lot: dict[str, Block]) -> None:
        """Time a lot of blocks in turns, beside the reference."""
        found = profiled(
            {**{key: self._form(block) for key, block in lot.items()}, REFERENCE: _reference()}, self.threads
        )
        now = found.pop(REFERENCE)
        drift = self._once(REFERENCE, lambda: now).value / now.value
        unsure = now.error / now.value  # of the reference is unsure of every block that is held against it
        self.cache.put(
            {
                key: Measured(each.value * drift, drift * math.hypot(each.error, unsure * each.value))
                for key, each in found.items()
            }
        )


def _until_near(race: Callable[[], np.ndarray]) -> Measured:
    """The median of ratios, in sessions that are made anew until it is known well enough."""
    samples = race()
    for _ in range(AGAIN - 1):
        if SURE * typical(samples).error <= NEAR * typical(samples).value:
            break
        samples = np.concatenate([samples, race()])
    return typical(samples)


def _bound(engine: Engine, data: Form | bytes, threads: int, inputs: tuple[Any, ...]) -> Callable[[], Any]:
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
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    return Block((node,), {"w": weight}, {"x": ((1, inputs, 16, 16), onnx.TensorProto.FLOAT)}, "y", 18)
