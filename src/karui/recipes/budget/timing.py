"""The time of blocks and of whole models in the engine, measured once per machine.

A block is never timed by itself: one at other widths, or a new layer, is timed in turns with the block that it would
replace; what that takes is its share of its network, as the recorder tells it there. Only shares are kept, so that what
a machine does meanwhile drops out. Each is kept with its uncertainty, so that nobody takes the clock's noise for a
saving or a cost; where two blocks are too near to be told apart, they are timed head to head. A key of the cache holds
operators, shapes, batch, threads and the engine's version.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from karui.deployment import Deployment
from karui.measuring import Engine, OnnxForm, OnnxRuntime, Timing
from karui.measuring.bar import bar
from karui.measuring.engines import onnx_session
from karui.measuring.filed import Filed
from karui.measuring.hollow import Hollow
from karui.measuring.inference import batch_of, tensors_of
from karui.measuring.rounds import interleaved
from karui.model import Model
from karui.recipes.budget.blocks import Block, structure
from karui.recipes.budget.cache import SURE, Measured, TimingCache, added, times, typical
from karui.recipes.budget.narrow import narrowed
from karui.recipes.budget.recorder import Timed, head_to_head, network, profiled

LOT, ROOM = 24, 32 * 2**20
"""How many are timed in turns at most, and the bytes of weights that those may have which are more than one."""
LOOKS = 3
"""How often the layers of a network are timed in it, in sessions made anew."""
TURNS = 51
"""Rounds in which whole files are timed against one another, and
AGAIN, NEAR: how often they are at most, until the uncertainty is below this share."""
AGAIN, NEAR = 3, 0.02
WHOLE = "whole"
TICK = 1e-9
"""Seconds that a clock of processor time counts in: a short call may take none by it."""
FREE = 0.5
"""What wider convolutions may take longer, as a share of what their width alone would cost, and still count as free."""


Pair = tuple[str, Block, Block]
"""A name, a block, and the block of a network that it would replace."""
Form = OnnxForm | Deployment
"""A whole file; its bytes are read where they are needed, and held by nobody."""


def _inputs(dense: Model) -> str:
    """Sizes and kinds of a sample: the same operators take longer on larger pictures and longer sequences."""
    return " ".join(f"{list(x.shape[1:])} {str(x.dtype).removeprefix('torch.')}" for x in tensors_of(dense.example))


@dataclass(frozen=True, eq=False)
class _Whole:
    """A network, as the recorder takes it."""

    file: Form
    inputs: tuple[Any, ...]

    def data(self) -> Form:
        """The file."""
        return self.file

    def feed(self) -> dict[str, np.ndarray]:
        """Its inputs by name."""
        names = [put.name for put in Hollow(self.file).proto.graph.input]
        return dict(zip(names, (t.numpy() for t in tensors_of(self.inputs)), strict=True))


@dataclass(frozen=True, kw_only=True)
class Stopwatch:
    """Times blocks and models in ONNX Runtime.

    Settings:
        batch, threads: how they are run.
        cache: what is known already.
        progress: whether a bar is shown.
        narrow: whether blocks are timed in 8 bits; whole files are what they are.
        company: blocks that are run in turns with those that are timed. A layer that is called again and again has its
            weights in a near cache, and in a network it has not: many thin operators seem a fifth faster so.
        structures: of whole files, by digest.
    """

    batch: int = 1
    threads: int = 1
    cache: TimingCache = field(default_factory=TimingCache)
    progress: bool = False
    narrow: bool = False
    company: tuple[Block, ...] = ()
    structures: dict[str, str] = field(default_factory=dict)
    _forms: dict[str, Timed] = field(default_factory=dict)

    def pair(self, name: str, make: Callable[[], Block], old: Block) -> Pair | None:
        """A block beside the one that it would replace; None where how long it takes is known under this name.

        It is made only then, and opened once: the engine may refuse what a technique offers.
        """
        if self._key(self._beside(name, old)) in self.cache.found:
            return None
        block = make()
        onnx_session(self._form(block).data(), self.threads)
        return name, block, old

    def measure(self, pairs: Sequence[Pair]) -> None:
        """Time pairs, of which `change` tells from then on."""
        unknown = {self._key(self._beside(name, old)): (new, old) for name, new, old in pairs}
        # Those with one block to be replaced lie together: it is timed once for a lot.
        ordered = sorted(unknown.items(), key=lambda each: each[1][1].key)
        lots = _lots({key: pair for key, pair in ordered if key not in self.cache.found})
        with bar("time of layers", len(lots), self.progress and bool(lots)) as step:
            for lot in lots:
                self._measure(lot)
                step()

    def change(self, name: str, old: Block) -> Measured:
        """How long a block takes as a share of the one that it would replace; it has been measured."""
        return self.cache.found[self._key(self._beside(name, old))]

    def against(self, name: str, make: Callable[[], Block], old: Block) -> Measured:
        """As `change`, by a closer look: head to head, in sessions that are made anew a few times."""

        def race() -> Measured:
            return head_to_head(self._form(make()), self._form(old), self.threads, self._company({old.key}))

        return self._once(f"{self._beside(name, old)}, head to head", race)

    def shares(self, model: Model, file: Form, blocks: Sequence[Block]) -> list[Measured]:
        """The time of each block within a network as a share of the network's.

        Args:
            model: whose example is run.
            file: the network, in the precision that blocks are timed in.
            blocks: of its layers.
        """
        # The same blocks stand at several places of a network: each has a time of its own there.
        within = f"in {self._structure(file)} of {_inputs(model)}"
        keys = [self._key(self._told(f"{block.nodes[0].name} {block.key} {within}")) for block in blocks]
        if any(key not in self.cache.found for key in keys):
            self.cache.put(dict(zip(keys, self._in_network(model, file, blocks), strict=True)))
        return [self.cache.found[key] for key in keys]

    def _in_network(self, model: Model, file: Form, blocks: Sequence[Block]) -> list[Measured]:
        whole = _Whole(file, batch_of(model.example, self.batch))
        sittings = [network(whole, self.threads) for _ in range(LOOKS)]
        told = [[sitting.share(block.names) for sitting in sittings] for block in blocks]
        seen = {k: [share for share in each if share is not None] for k, each in enumerate(told)}
        found = {k: _middle(shares) for k, shares in seen.items() if len(shares) == LOOKS}
        missing = [k for k in range(len(blocks)) if k not in found]
        if not missing:
            return list(found.values())
        # Of what the engine has given another name only the time alone is known: against the largest of the others.
        largest = max(found, key=lambda k: found[k].value, default=missing[0])
        self.measure([(blocks[k].key, blocks[k], blocks[largest]) for k in missing])
        alone = [self.change(blocks[k].key, blocks[largest]) for k in missing]
        unit = found[largest] if found else Measured(1 / added(alone).value)
        found |= {k: times(unit, each.value) for k, each in zip(missing, alone, strict=True)}
        return [found[k] for k in range(len(blocks))]

    def _beside(self, name: str, old: Block) -> str:
        return self._told(f"{name} / {old.key}")

    def _told(self, name: str) -> str:
        return f"{name} in 8 bits" if self.narrow else name

    def _form(self, block: Block) -> Timed:
        return narrowed(block) if self.narrow else block

    def multiple(self) -> int:
        """The widths that the engine rewards: the largest step up to which rounding a width up costs nothing."""
        widths = range(33, 65)
        old = _convolution(32, 32)
        wider = {width: _convolution(32, width) for width in widths}
        self.measure([(block.key, block, old) for block in wider.values()])
        seconds = {width: self.change(block.key, old) for width, block in wider.items()}

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
            return np.array(found["light"]) / np.maximum(found["other"], TICK)

        return self._once(f"{name} of {_inputs(dense)}", lambda: _until_near(race))

    def whole(self, dense: Model, file: Form) -> Measured:
        """Seconds of a whole file in ONNX Runtime; `dense` gives the inputs."""
        name = f"{self._structure(file)} of {_inputs(dense)}"
        return self._once(name, lambda: typical(self._samples(dense, {WHOLE: (OnnxRuntime(), file)})[WHOLE]))

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
            self.structures[told] = structure(file)
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

    def _measure(self, lot: Mapping[str, tuple[Block, Block]]) -> None:
        """Time pairs in turns, each block once, in company."""
        told = {key: (new.key, old.key) for key, (new, old) in lot.items()}
        every = {block.key: self._form(block) for pair in lot.values() for block in pair}
        found = profiled({**self._company(every), **every}, self.threads)
        self.cache.put({key: found[new].beside(found[old]) for key, (new, old) in told.items()})

    def _company(self, there: Container[str]) -> dict[str, Timed]:
        """Blocks of the network that are not there yet."""
        wanted = {self._told(block.key): block for block in self.company if block.key not in there}
        for told, block in wanted.items():
            if told not in self._forms:  # one in 8 bits takes a while to make
                self._forms[told] = self._form(block)
        return {block.key: self._forms[told] for told, block in wanted.items()}


def companions(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """Different blocks of a network, as many as have room together."""
    found: dict[str, Block] = {}
    held = 0
    for block in blocks:
        if block.key not in found and len(found) < LOT and held + block.bytes <= ROOM:
            found[block.key] = block
            held += block.bytes
    return tuple(found.values())


def _lots(pairs: Mapping[str, tuple[Block, Block]]) -> list[dict[str, tuple[Block, Block]]]:
    """Pairs in lots of at most so many, of which the first blocks have room together; one is a lot in any case."""
    lots: list[dict[str, tuple[Block, Block]]] = []
    held = 0
    for key, pair in pairs.items():
        held += pair[0].bytes
        if not lots or len(lots[-1]) == LOT or held > ROOM:
            lots.append({})
            held = pair[0].bytes
        lots[-1][key] = pair
    return lots


def _middle(sittings: Sequence[Measured]) -> Measured:
    """The median of sittings; they differ among one another by more than each tells of itself."""
    values = [each.value for each in sittings]
    apart = float(np.std(values, ddof=1))
    own = float(np.median([each.error for each in sittings]))
    return Measured(float(np.median(values)), max(own, apart) / math.sqrt(len(sittings)))


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


def _convolution(inputs: int, outputs: int) -> Block:
    import onnx
    from onnx import helper

    weight = np.full((outputs, inputs, 3, 3), 0.01, dtype=np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    return Block((node,), {"w": weight}, {"x": ((1, inputs, 16, 16), onnx.TensorProto.FLOAT)}, "y", 18)
