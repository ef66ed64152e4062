"""The layers of one network: what a cut, another layer or none in a place changes of its time and bytes.

A layer's time in the network is its share of the whole, as the recorder tells it there; what takes its place is timed
beside the layer. Cells are remembered, as many candidates share them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from karui.measuring import OnnxForm
from karui.model import Analysis, Group, Model
from karui.recipes.budget.blocks import LAYERS, Block, Shape, blocks_of, resized
from karui.recipes.budget.cache import Measured, added, times
from karui.recipes.budget.exchange import exchanged, told_layer
from karui.recipes.budget.timing import companions

if TYPE_CHECKING:
    from karui.recipes.budget.timing import Pair, Stopwatch
    from karui.technique import Candidate


@dataclass(frozen=True)
class Cell:
    """One layer at some widths, as a new layer, or left out: how its seconds change, and its bytes."""

    change: Measured
    bytes: float
    gone: bool = False


Widths = tuple[str, tuple[tuple[int, int], ...]]
"""A layer's path, and how many indices its weight loses by dimension."""


@dataclass(frozen=True)
class _Waiting:
    """A new layer that is not timed yet: the name of its time, and its bytes."""

    name: str
    bytes: float


class Cells:
    """What candidates change, layer by layer.

    Args:
        model: what they are offered for.
        analysis: its coupled groups; None where it has none.
        watch: times what is not known yet.
        file: the model in the form that blocks are timed in; None for the one in 32 bits.
        seconds: what that takes; None where that is not known.
    """

    def __init__(
        self,
        model: Model,
        analysis: Analysis | None,
        watch: Stopwatch,
        file: OnnxForm | None = None,
        seconds: float | None = None,
    ) -> None:
        self.model, self.analysis = model, analysis
        self.graph = blocks_of(model, watch.batch)
        every = [block for found in self.graph.blocks.values() for block in found]
        self.watch = replace(watch, company=companions(every))
        self.file = self.graph.form if file is None else file
        self._seconds = seconds
        modules = dict(model.module.named_modules())
        self.layers = {p: modules[p] for p in self.graph.blocks if p in modules and type(modules[p]) in LAYERS}
        self.norms = {path for path, layer in modules.items() if isinstance(layer, _BatchNorm)}
        self.known: dict[Widths, Cell] = {}
        self.exchanged: dict[int, dict[str, Cell]] = {}
        self.replaced: dict[int, set[str]] = {}
        self._waiting: dict[int, dict[str, _Waiting]] = {}
        self._pairs: dict[tuple[str, str], Pair] = {}

    @cached_property
    def whole(self) -> float:
        """Seconds of the network."""
        return self.watch.whole(self.model, self.file).value if self._seconds is None else self._seconds

    @cached_property
    def seconds(self) -> dict[str, tuple[Measured, ...]]:
        """What each block takes in the network, by the path of its layer."""
        blocks = [block for found in self.graph.blocks.values() for block in found]
        shares = self.watch.shares(self.model, self.file, blocks)
        left = iter(shares)
        return {path: tuple(times(next(left), self.whole) for _ in found) for path, found in self.graph.blocks.items()}

    def _changed(self, path: str, shares: Sequence[Measured]) -> Measured:
        """How the seconds of a layer change where its blocks take these shares of what they took."""
        pairs = zip(shares, self.seconds[path], strict=True)
        return added([Measured((share.value - 1) * old.value, share.error * old.value) for share, old in pairs])

    def layerwise(self, candidate: Candidate) -> bool:
        """Whether it is timed layer by layer, and not by carrying it out."""
        return id(candidate) in self.exchanged if candidate.layers is not None else not self.blind(candidate)

    def comparable(self, candidate: Candidate) -> bool:
        """Whether each of its layers has another in its place, which it can be timed against."""
        return self.layerwise(candidate) and not any(c.gone for c in self.exchanged.get(id(candidate), {}).values())

    def paths(self, candidate: Candidate) -> list[str]:
        """The layers whose time it changes."""
        return list(self.lost(candidate) if candidate.layers is None else self.exchanged[id(candidate)])

    def of(self, candidate: Candidate) -> dict[str, Cell]:
        """What becomes of each of these layers."""
        if candidate.layers is not None:
            return self.exchanged[id(candidate)]
        return {path: self.at(path, dims) for path, dims in self.lost(candidate).items()}

    def lost(self, candidate: Candidate) -> dict[str, dict[int, int]]:
        """How many indices each layer's weight loses to a cut, by dimension."""
        lost: dict[str, dict[int, int]] = {}
        for group, count in self._groups(candidate):
            for member in group.members:
                path, _, leaf = member.tensor.rpartition(".")
                if leaf == "weight" and path in self.layers:
                    dims = lost.setdefault(path, {})
                    dims[member.dim] = dims.get(member.dim, 0) + count * member.indices.shape[1]
        return lost

    def blind(self, candidate: Candidate) -> bool:
        """Whether a cut touches weights whose time cannot be had layer by layer."""
        for group, _ in self._groups(candidate):
            for member in group.members:
                path, _, leaf = member.tensor.rpartition(".")
                if path not in self.norms and not (path in self.layers and leaf in ("weight", "bias")):
                    return True
        return any(
            resized(block, self.layers[path], dims) is None
            for path, dims in self.lost(candidate).items()
            for block in self.graph.blocks[path]
        )

    def _groups(self, candidate: Candidate) -> list[tuple[Group, int]]:
        assert self.analysis is not None  # noqa: S101  (who cuts has groups)
        return [(self.analysis[name], len(units)) for name, units in candidate.cut.items()]

    def time(self, wanted: Sequence[tuple[str, Mapping[int, int]]]) -> None:
        """Time layers at widths that are not known yet, all in one go."""
        fresh: dict[Widths, list[Pair]] = {}
        for path, dims in wanted:
            key, whole = _widths(path, dims), self.graph.blocks[path]
            if not dims or key in self.known or key in fresh:
                continue
            made = [(resized(block, self.layers[path], dims), block) for block in whole]
            pairs = [(new.key, new, block) for new, block in made if new is not None]
            if len(pairs) < len(whole):
                self.known[key] = NEVER
            else:
                fresh[key] = pairs
        self.watch.measure([pair for pairs in fresh.values() for pair in pairs])
        for key, pairs in fresh.items():
            change = self._changed(key[0], [self.watch.change(name, old) for name, _, old in pairs])
            self.known[key] = Cell(change, pairs[0][1].bytes)

    def at(self, path: str, dims: Mapping[int, int]) -> Cell:
        """A layer that loses so much, of what was timed; `NEVER` for all else."""
        if not dims:
            return Cell(Measured(0.0), self.graph.blocks[path][0].bytes)
        return self.known.get(_widths(path, dims), NEVER)

    def prepare(self, candidate: Candidate) -> None:
        """Make new layers in the place of old ones ready to be timed; only blocks without weights are kept of them."""
        if candidate.layers is None:
            return
        found: dict[str, _Waiting] = {}
        made = candidate.layers()
        # What is left out has no width: its place may be as wide as a cut leaves it.
        self.replaced[id(candidate)] = {path for path, layer in made.items() if type(layer) is not nn.Identity}
        for path, layer in made.items():
            if inside := self._left_out(path, layer):
                self.exchanged.setdefault(id(candidate), {}).update(inside)
                continue
            if path not in self.graph.blocks or not isinstance(layer, nn.Module):
                self.exchanged.pop(id(candidate), None)
                return
            found[path] = self._new_layer(path, layer)
        self.exchanged.setdefault(id(candidate), {})
        self._waiting[id(candidate)] = found

    def exchange(self) -> None:
        """Time all new layers that are ready."""
        self.watch.measure(list(self._pairs.values()))
        for number, layers in self._waiting.items():
            for path, new in layers.items():
                shares = [self.watch.change(new.name, block) for block in self.graph.blocks[path]]
                self.exchanged[number][path] = Cell(self._changed(path, shares), new.bytes)
        self._pairs, self._waiting = {}, {}

    def _left_out(self, path: str, layer: nn.Module) -> dict[str, Cell]:
        """The layers of a part that gives its place to nothing; none where something else takes it."""
        if type(layer) is not nn.Identity or path in self.graph.blocks:
            return {}
        return {
            inner: Cell(times(added(self.seconds[inner]), -1.0), 0.0, gone=True)
            for inner in self.graph.blocks
            if inner.startswith(f"{path}.")
        }

    def _new_layer(self, path: str, layer: nn.Module) -> _Waiting:
        """A layer where another stands. It is exported only where its time is not known on this machine."""
        for name, make, block in self._made(path, layer):
            if (name, block.key) not in self._pairs and (pair := self.watch.pair(name, make, block)) is not None:
                self._pairs[name, block.key] = pair
        old = sum(p.numel() for p in self.model.module.get_submodule(path).parameters())
        weights = sum(p.numel() * p.element_size() for p in layer.parameters()) - 4 * old
        return _Waiting(told_layer(layer), self.graph.blocks[path][0].bytes + weights)

    def _made(self, path: str, layer: nn.Module) -> list[tuple[str, Callable[[], Block], Block]]:
        """A layer in the place of each block of another: a name that tells its time, how to make it, and the block."""
        told = told_layer(layer)

        def maker(block: Block) -> Callable[[], Block]:
            return lambda: exchanged(block, layer, _single(block, self.watch.batch), self.watch.batch)

        return [(told, maker(block), block) for block in self.graph.blocks[path]]

    def look_closer(self, candidate: Candidate) -> None:
        """Time the layers of a candidate head to head with those that they replace; what is found goes for good."""
        if candidate.layers is not None:
            for path, layer in candidate.layers().items():
                shares = [self.watch.against(*made) for made in self._made(path, layer)]
                cell = self.exchanged[id(candidate)][path]
                self.exchanged[id(candidate)][path] = replace(cell, change=self._changed(path, shares))
            return
        for path, dims in self.lost(candidate).items():
            if dims:
                shares = []
                for block in self.graph.blocks[path]:
                    new = resized(block, self.layers[path], dims)
                    assert new is not None  # noqa: S101  (a candidate with such a block is timed whole)
                    shares.append(self.watch.against(new.key, lambda made=new: made, block))
                self.known[_widths(path, dims)] = replace(self.at(path, dims), change=self._changed(path, shares))


NEVER = Cell(Measured(math.inf), math.inf)
"""A layer that cannot be."""


def _widths(path: str, dims: Mapping[int, int]) -> Widths:
    return path, tuple(sorted(dims.items()))


def _single(block: Block, batch: int) -> Shape:
    """The shape of the layer's input for one sample."""
    given, _ = block.inputs[block.nodes[0].input[0]]
    return (given[0] // batch, *given[1:])
