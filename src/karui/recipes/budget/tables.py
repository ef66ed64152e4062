"""What candidates cost, alone and together: each layer timed at every width that its neighbours' settings give it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from karui.measuring import onnx_form
from karui.measuring.bar import bar
from karui.model import Analysis, Group, Model, remove_units, replace_layers
from karui.recipes.budget.apart import exclusions, one_at_most, reached
from karui.recipes.budget.blocks import LAYERS, Block, Shape, blocks_of, resized
from karui.recipes.budget.cache import SURE, Measured, added, less, times
from karui.recipes.budget.choice import Table
from karui.recipes.budget.exchange import exchanged, told_layer
from karui.recipes.budget.refusals import Refusals

if TYPE_CHECKING:
    from karui.recipes.budget.timing import Stopwatch
    from karui.technique import Candidate

CELLS = 256
"""Combinations of neighbours' settings that are timed for a layer; beyond, each place is timed by itself."""


EXPECTED = "expected time"
"""Quantity of a table: seconds as they were measured. A choice goes by "time", where what the clock cannot tell apart
is nothing; to foretell what it takes, small savings in many places are added up, though each drowns in the noise."""
DOUBT = 5.0
"""A candidate that looks slower by fewer standard errors is timed head to head with what it replaces, and so is one
whose time is within the noise of that."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a candidate alone changes: seconds and bytes of the whole model."""

    seconds: Measured
    bytes: float

    @property
    def slower(self) -> bool:
        """Whether it is slower than what it replaces, beyond what the clock cannot tell."""
        return self.seconds.value > 0 and self.seconds.clear

    @property
    def doubtful(self) -> bool:
        """Whether it is neither clearly faster nor so much slower that a closer look is needless."""
        return -SURE * self.seconds.error < self.seconds.value <= DOUBT * self.seconds.error


@dataclass(frozen=True)
class _Cell:
    """One layer at some widths, as a new layer, or left out: how its seconds change, and its bytes."""

    change: Measured
    bytes: float
    gone: bool = False


Widths = tuple[str, tuple[tuple[int, int], ...]]
"""A layer's path, and how many indices its weight loses by dimension."""


class Coster:
    """Costs of candidates for one model.

    Args:
        model: what they are offered for.
        analysis: its coupled groups; None where it has none.
        watch: times what is not known yet.
        seconds: what the whole model takes, in the form that blocks are timed in; None where that is not known.
        refusals: learns which candidates cannot be measured.
    """

    def __init__(
        self,
        model: Model,
        analysis: Analysis | None,
        watch: Stopwatch,
        seconds: float | None = None,
        refusals: Refusals | None = None,
    ) -> None:
        self.model, self.analysis, self.watch, self.seconds = model, analysis, watch, seconds
        self.refusals = Refusals() if refusals is None else refusals
        self.graph = blocks_of(model, watch.batch)
        modules = dict(model.module.named_modules())
        self.layers = {p: modules[p] for p in self.graph.blocks if p in modules and type(modules[p]) in LAYERS}
        self.norms = {path for path, layer in modules.items() if isinstance(layer, _BatchNorm)}
        self.cells: dict[Widths, _Cell] = {}
        self.exchanged: dict[int, dict[str, _Cell]] = {}
        self.replaced: dict[int, set[str]] = {}
        self.singles: dict[int, Cost] = {}

    def alone(self, candidates: Sequence[Candidate]) -> list[Cost]:
        """What each candidate changes by itself; head to head with what it replaces, where that is in doubt.

        Of those that can be measured, in their order; `refusals` tells which are left.
        """
        wanted: list[tuple[str, dict[int, int]]] = [(path, {}) for path in self.layers]
        for candidate in candidates:
            with self.refusals.trying(candidate):
                wanted += self._wanted(candidate)
        self._time_cells(wanted)
        for candidate in self.refusals.left(candidates):
            with self.refusals.trying(candidate):
                self._time_layers(candidate)
                self.singles[id(candidate)] = self._alone(candidate)
        doubtful = [c for c in self.refusals.left(candidates) if self.singles[id(c)].doubtful and self._comparable(c)]
        with bar("head to head", len(doubtful), self.watch.progress and bool(doubtful)) as step:
            for candidate in doubtful:
                with self.refusals.trying(candidate):
                    self._look_closer(candidate)
                    self.singles[id(candidate)] = self._alone(candidate)
                step()
        return [self.singles[id(candidate)] for candidate in self.refusals.left(candidates)]

    @cached_property
    def fit(self) -> float:
        """What a block takes in the network as a share of what it takes alone: below 1 where all blocks together would
        take longer than the network that they make up, as on a machine that is busy with something else.
        """
        if self.seconds is None:
            return 1.0
        alone = added(self.watch.blocks([block for blocks in self.graph.blocks.values() for block in blocks]))
        return min(1.0, self.seconds / alone.value) if alone.value > 0 else 1.0

    def _wanted(self, candidate: Candidate) -> list[tuple[str, dict[int, int]]]:
        """The layers whose time it changes, and how many indices they lose."""
        return list(self._lost(candidate).items()) if candidate.cut and not self._blind(candidate) else []

    def _alone(self, candidate: Candidate) -> Cost:
        if candidate.cut and not self._blind(candidate):
            lost = self._lost(candidate)
            pairs = [(path, self._cell(path, dims)) for path, dims in lost.items()]
        elif candidate.layers is not None and id(candidate) in self.exchanged:
            pairs = list(self.exchanged[id(candidate)].items())
        else:
            return self._whole(candidate)
        return Cost(
            seconds=times(added([new.change for _, new in pairs]), self.fit),
            bytes=sum(new.bytes - self._cell(path, {}).bytes for path, new in pairs),
        )

    def _look_closer(self, candidate: Candidate) -> None:
        """Time the layers of a candidate head to head with those that they replace; what is found goes for good."""
        if candidate.layers is not None:
            for path, layer in candidate.layers().items():
                changes = [
                    self._faced(name, make, block)
                    for (name, make), block in zip(self._made(path, layer), self.graph.blocks[path], strict=True)
                ]
                self.exchanged[id(candidate)][path] = replace(
                    self.exchanged[id(candidate)][path], change=added(changes)
                )
            return
        for path, dims in self._lost(candidate).items():
            if dims:
                changes = []
                for block in self.graph.blocks[path]:
                    new = resized(block, self.layers[path], dims)
                    assert new is not None  # noqa: S101  (a candidate with such a block is timed whole)
                    changes.append(self._faced(new.key, lambda made=new: made, block))
                self.cells[_widths(path, dims)] = replace(self._cell(path, dims), change=added(changes))

    def _faced(self, name: str, make: Callable[[], Block], block: Block) -> Measured:
        """How the seconds of a block change, by a share that was measured head to head."""
        share, [old] = self.watch.against(name, make, block), self.watch.blocks([block])
        return Measured((share.value - 1) * old.value, share.error * old.value)

    def _whole(self, candidate: Candidate) -> Cost:
        """By carrying it out: for what acts on layers that cannot be resized by themselves, as recurrent ones."""
        if candidate.cut:
            light = remove_units(self.model, candidate.cut, analysis=self.analysis, prove=False)
        else:
            assert candidate.layers is not None  # noqa: S101  (one of the two is there)
            light = replace_layers(self.model, candidate.layers())
        form = onnx_form(light)
        dense = self.watch.whole(self.model, self.graph.form)
        ratio = self.watch.ratio(self.model, form, self.graph.form)
        change = Measured((ratio.value - 1) * dense.value, ratio.error * dense.value)
        return Cost(seconds=change, bytes=form.bytes - self.graph.form.bytes)

    def _groups(self, candidate: Candidate) -> list[tuple[Group, int]]:
        assert self.analysis is not None  # noqa: S101  (who cuts has groups)
        return [(self.analysis[name], len(units)) for name, units in candidate.cut.items()]

    def _lost(self, candidate: Candidate) -> dict[str, dict[int, int]]:
        """How many indices each layer's weight loses, by dimension."""
        lost: dict[str, dict[int, int]] = {}
        for group, count in self._groups(candidate):
            for member in group.members:
                path, _, leaf = member.tensor.rpartition(".")
                if leaf == "weight" and path in self.layers:
                    dims = lost.setdefault(path, {})
                    dims[member.dim] = dims.get(member.dim, 0) + count * member.indices.shape[1]
        return lost

    def _blind(self, candidate: Candidate) -> bool:
        """Whether it touches weights whose time cannot be had layer by layer."""
        for group, _ in self._groups(candidate):
            for member in group.members:
                path, _, leaf = member.tensor.rpartition(".")
                if path not in self.norms and not (path in self.layers and leaf in ("weight", "bias")):
                    return True
        return any(
            resized(block, self.layers[path], dims) is None
            for path, dims in self._lost(candidate).items()
            for block in self.graph.blocks[path]
        )

    def _time_cells(self, wanted: Sequence[tuple[str, Mapping[int, int]]]) -> None:
        """Time layers at widths that are not known yet, all in one go."""
        fresh: dict[Widths, list[Block]] = {}
        for path, dims in wanted:
            key = _widths(path, dims)
            if key not in self.cells and key not in fresh:
                here = self.graph.blocks[path]
                made = [resized(block, self.layers[path], dims) for block in here] if dims else here
                fresh[key] = [block for block in made if block is not None]
        found = iter(self.watch.blocks([block for blocks in fresh.values() for block in blocks]))
        for key, blocks in fresh.items():
            new, whole = [next(found) for _ in blocks], self.graph.blocks[key[0]]
            if len(blocks) < len(whole):
                self.cells[key] = NEVER
                continue
            pairs = [less(a, b) for a, b in zip(new, self.watch.blocks(whole), strict=True)]
            self.cells[key] = _Cell(added(pairs) if key[1] else Measured(0.0), blocks[0].bytes if blocks else 0)

    def _cell(self, path: str, dims: Mapping[int, int]) -> _Cell:
        key = _widths(path, dims)
        if not dims and key not in self.cells:  # of a kind that is never resized: it was not timed, and need not be
            return _Cell(Measured(0.0), self.graph.blocks[path][0].bytes)
        return self.cells[key]

    def _time_layers(self, candidate: Candidate) -> None:
        """Time new layers in the place of old ones; each is made, timed and dropped."""
        if candidate.layers is None:
            return
        found = {}
        made = candidate.layers()
        # What is left out has no width: its place may be as wide as a cut leaves it.
        self.replaced[id(candidate)] = {path for path, layer in made.items() if type(layer) is not nn.Identity}
        for path, layer in made.items():
            if inside := self._left_out(path, layer):
                found |= inside
                continue
            if path not in self.graph.blocks or not isinstance(layer, nn.Module):
                break
            found[path] = self._new_layer(path, layer)
        else:
            self.exchanged[id(candidate)] = found

    def _left_out(self, path: str, layer: nn.Module) -> dict[str, _Cell]:
        """The layers of a part that gives its place to nothing; none where something else takes it."""
        if type(layer) is not nn.Identity or path in self.graph.blocks:
            return {}
        return {
            inner: _Cell(less(Measured(0.0), added(self.watch.blocks(blocks))), 0.0, gone=True)
            for inner, blocks in self.graph.blocks.items()
            if inner.startswith(f"{path}.")
        }

    def _new_layer(self, path: str, layer: nn.Module) -> _Cell:
        """A layer's cost where another stands. It is exported only where its time is not known on this machine."""
        pairs = [
            less(self.watch.named(name, make), self.watch.blocks([block])[0])
            for (name, make), block in zip(self._made(path, layer), self.graph.blocks[path], strict=True)
        ]
        old = sum(p.numel() for p in self.model.module.get_submodule(path).parameters())
        weights = sum(p.numel() * p.element_size() for p in layer.parameters()) - 4 * old
        return _Cell(added(pairs), self.graph.blocks[path][0].bytes + weights)

    def _made(self, path: str, layer: nn.Module) -> list[tuple[str, Callable[[], Block]]]:
        """A layer in the place of each block of another: a name that tells its time, and how to make it."""
        told = told_layer(layer)

        def maker(block: Block) -> Callable[[], Block]:
            return lambda: exchanged(block, layer, _single(block, self.watch.batch), self.watch.batch)

        return [(f"{told} for {block.key}", maker(block)) for block in self.graph.blocks[path]]

    def tables(self, menu: Mapping[str, Sequence[Candidate]]) -> tuple[Table, ...]:
        """How time and bytes depend on all places: exact for each layer together with its neighbours."""
        touching: dict[str, list[str]] = {}
        own: list[Table] = []
        for place, candidates in menu.items():
            exact = [c for c in candidates if self._layerwise(c)]
            if len(exact) < len(candidates):
                own.append(self._single_table(place, candidates))
                continue
            for path in dict.fromkeys(path for c in candidates for path in self._paths(c)):
                touching.setdefault(path, []).append(place)
        self._time_cells([w for path, places in touching.items() for w in self._combinations(path, places, menu)])
        for path, places in touching.items():
            own += self._layer_tables(path, places, menu)
        return (*own, *self._apart(menu))

    def _apart(self, menu: Mapping[str, Sequence[Candidate]]) -> list[Table]:
        """Which of the places that have a table of their own do not go with others."""
        whole = {place for place, candidates in menu.items() if not all(map(self._layerwise, candidates))}
        reach = {place: reached(candidates, self.replaced, self.analysis) for place, candidates in menu.items()}
        return [one_at_most(pair, menu, ("time", "bytes", EXPECTED)) for pair in exclusions(menu, whole, reach)]

    def _layerwise(self, candidate: Candidate) -> bool:
        return id(candidate) in self.exchanged if candidate.layers is not None else not self._blind(candidate)

    def _comparable(self, candidate: Candidate) -> bool:
        """Whether each of its layers has another in its place, which it can be timed against."""
        return self._layerwise(candidate) and not any(c.gone for c in self.exchanged.get(id(candidate), {}).values())

    def _paths(self, candidate: Candidate) -> list[str]:
        return list(self.exchanged[id(candidate)]) if candidate.layers is not None else list(self._lost(candidate))

    def _single_table(self, place: str, candidates: Sequence[Candidate]) -> Table:
        costs = [self.singles[id(c)] for c in candidates]
        amounts = {
            "time": [0.0, *(c.seconds.settled for c in costs)],
            "bytes": [0.0, *(c.bytes for c in costs)],
            EXPECTED: [0.0, *(c.seconds.value for c in costs)],
        }
        return Table((place,), {name: np.array(values) for name, values in amounts.items()})

    def _settings(self, path: str, place: str, menu: Mapping[str, Sequence[Candidate]]) -> list[dict[int, int] | _Cell]:
        """What each setting of a place does to a layer: widths that it loses, or another layer."""
        found: list[dict[int, int] | _Cell] = [{}]
        for candidate in menu[place]:
            if candidate.layers is not None:
                found.append(self.exchanged[id(candidate)].get(path, {}))
            else:
                found.append(self._lost(candidate).get(path, {}))
        return found

    def _combinations(
        self, path: str, places: Sequence[str], menu: Mapping[str, Sequence[Candidate]]
    ) -> list[tuple[str, dict[int, int]]]:
        cut = [place for place in places if menu[place][0].cut]
        if math.prod(len(menu[place]) + 1 for place in cut) > CELLS:
            return []
        sides = [self._settings(path, place, menu) for place in cut]
        return [(path, _joined(cell)) for cell in product(*sides)]

    def _layer_tables(self, path: str, places: Sequence[str], menu: Mapping[str, Sequence[Candidate]]) -> list[Table]:
        cut = [place for place in places if menu[place][0].cut]
        many = math.prod(len(menu[place]) + 1 for place in cut) > CELLS
        new = [place for place in places if place not in cut]
        if many:
            groups = [[place] for place in cut]
            pairs = [self._table(path, [*new, place], menu, exclusive=True) for [place] in groups for _ in new]
            return [*(self._table(path, group, menu) for group in groups), *pairs, *self._new_only(path, new, menu)]
        return [self._table(path, list(places), menu)]

    def _new_only(self, path: str, new: Sequence[str], menu: Mapping[str, Sequence[Candidate]]) -> list[Table]:
        return [self._table(path, list(new), menu)] if new else []

    def _table(
        self, path: str, places: list[str], menu: Mapping[str, Sequence[Candidate]], *, exclusive: bool = False
    ) -> Table:
        """A layer's changes over the settings of some places; with `exclusive`, only which of them go together."""
        sides = [self._settings(path, place, menu) for place in places]
        shape = tuple(map(len, sides))
        amounts = {quantity: np.zeros(shape) for quantity in ("time", "bytes", EXPECTED)}
        whole = self._cell(path, {})
        for index in np.ndindex(*shape):
            found = self._together([side[k] for side, k in zip(sides, index, strict=True)], path, apart=exclusive)
            if found is None:
                for held in amounts.values():
                    held[index] = math.inf
            elif not exclusive:
                change = times(found.change, self.fit)
                amounts["time"][index], amounts[EXPECTED][index] = change.settled, change.value
                amounts["bytes"][index] = found.bytes - whole.bytes
        return Table(tuple(places), amounts)

    def _together(self, parts: Sequence[dict[int, int] | _Cell], path: str, *, apart: bool) -> _Cell | None:
        """The layer under all these settings; None where they exclude each other: a new layer is not resized.

        With `apart`, cuts and new layers have tables of their own, which would count what is left out twice.
        """
        new = [part for part in parts if isinstance(part, _Cell)]
        cuts = [part for part in parts if isinstance(part, dict) and part]
        if new:  # what is left out has no width, and may be as wide as it likes
            return new[0] if len(new) == 1 and (not cuts or (new[0].gone and not apart)) else None
        return self.cells.get(_widths(path, _joined(cuts)), NEVER)


NEVER = _Cell(Measured(math.inf), math.inf)
"""A layer that cannot be."""


def _widths(path: str, dims: Mapping[int, int]) -> Widths:
    return path, tuple(sorted(dims.items()))


def _joined(parts: Sequence[Mapping[int, int] | _Cell]) -> dict[int, int]:
    """Widths lost to several places together."""
    lost: dict[int, int] = {}
    for part in parts:
        for dim, count in part.items() if isinstance(part, Mapping) else ():
            lost[dim] = lost.get(dim, 0) + count
    return lost


def _single(block: Block, batch: int) -> Shape:
    """The shape of the layer's input for one sample."""
    given, _ = block.inputs[block.nodes[0].input[0]]
    return (given[0] // batch, *given[1:])
