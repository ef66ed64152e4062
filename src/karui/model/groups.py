"""Coupled groups: the slices of parameters and buffers that live and die together, unit by unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from karui.errors import did_you_mean
from karui.model.collecting import newest_alone
from karui.model.exporting import require_one_path
from karui.model.labels import NO_RULE
from karui.model.solve import Resolved, distinct, solve
from karui.model.trace import Trace, capture

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from karui.model.value import Model

Role = Literal["out", "in", "both"]


@dataclass(frozen=True, eq=False)
class Member:
    """What a group's units own of one parameter or buffer.

    Settings:
        tensor: the parameter's or buffer's name.
        dim: the dimension that is cut.
        role: "out" where it produces the units, "in" where it reads them, "both" where it does neither or both (a bias,
            a normalisation, a depthwise filter).
        indices: which indices of `dim` belong to each unit.
    """

    tensor: str
    dim: int
    role: Role
    indices: Int[Tensor, "units k"]


@dataclass(frozen=True, eq=False)
class Group:
    """Units that are cut each by itself, and what each of them owns.

    Settings:
        name: path of the first layer that produces the units; unique in its analysis.
        size: number of units.
        members: the slices, in the order of the module's parameters.
        sources: names of the weights that produce the units.
        exact: False where a normalisation counts the units, so that a cut is exact up to normalisation.
        reason: which normalisation that is; "" for an exact group.
        classes: the units' numbers in the analysis.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    sources: tuple[str, ...]
    exact: bool = True
    reason: str = ""
    classes: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64), repr=False)

    def rows(self, module: nn.Module, tensor: str) -> Float[Tensor, "units features"]:
        """Each unit's slice of a member, flattened: what a criterion scores."""
        member = next((m for m in self.members if m.tensor == tensor), None)
        if member is None:
            did_you_mean(tensor, [m.tensor for m in self.members], f"Group '{self.name}': member")
        value = tensor_of(module, tensor).detach()
        return value.movedim(member.dim, 0)[member.indices.to(value.device)].flatten(1)


@dataclass(frozen=True)
class Locked:
    """Output indices of a layer that cannot be cut, and why."""

    name: str
    size: int
    reason: str


@dataclass(frozen=True, eq=False)
class Analysis:
    """Everything that can be cut, and everything that cannot.

    Settings:
        groups: the coupled groups, in the order of the module's parameters.
        locked: what must stay.
        trace, resolved: how they were found; the cut and its proof read them.
    """

    groups: tuple[Group, ...]
    locked: tuple[Locked, ...]
    trace: Trace = field(repr=False)
    resolved: Resolved = field(repr=False)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    @cached_property
    def by_name(self) -> dict[str, Group]:
        """The groups by their names."""
        return {g.name: g for g in self.groups}

    def __getitem__(self, name: str) -> Group:
        found = self.by_name.get(name)
        if found is None:
            did_you_mean(name, list(self.by_name), "Group")
        return found

    def alive(self, kept: list[Any]) -> np.ndarray:
        """For each label whether it stays when only the `kept` indices of tensors do: (name, dimension, indices).

        Labels that never die are negative, and count from the end of the array; so it may be indexed by any label.
        """
        dead = np.zeros(len(self.resolved.locked), dtype=bool)
        for name, dim, indices in kept:
            if name not in self.trace.slots:
                continue  # another run uses it: that of training, say
            labels = self.trace.slots[name][dim]
            gone = np.ones(len(labels), dtype=bool)
            gone[indices] = False
            found = self.resolved.of(labels[gone])
            dead[found[found >= 0]] = True
        for cells, axes in [*self.resolved.grids] * len(self.resolved.grids):
            whole = dead[cells] & (cells >= 0)
            for place, axis in enumerate(axes):
                slab = whole.all(axis=tuple(k for k in range(len(axes)) if k != place)) & (axis >= 0)
                dead[axis[slab]] = True
        return self._by_label(dead)

    def left(self, removed: Mapping[str, Tensor]) -> np.ndarray:
        """The same when these units are removed."""
        dead = np.zeros(len(self.resolved.locked), dtype=bool)
        for name, units in removed.items():
            dead[self[name].classes[units.cpu().numpy()]] = True
        return self._by_label(dead)

    def _by_label(self, dead: np.ndarray) -> np.ndarray:
        """Dead classes, with the cells of grids whose axes die, as labels that stay."""
        for _ in self.resolved.grids:
            for cell, axis in self.resolved.bases():
                live = (axis >= 0) & (cell >= 0)
                dead[cell[live][dead[axis[live]]]] = True
        dead &= self.resolved.locked < 0
        fixed = np.ones(len(self.trace.labels.reasons), dtype=bool)
        return np.concatenate([~dead[self.resolved.classes], fixed])


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that name."""
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


@newest_alone()
def coupled_groups(model: Model) -> Analysis:
    """What can be cut out of a model: run it once, label every tensor, and resolve the labels into units.

    Raises:
        CaptureError: the model does not run on its example, or what it computes depends on its input's values.

    Example:
        >>> from karui.model import Model
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 2))
        >>> (group,) = coupled_groups(Model(net, example=(torch.zeros(1, 3, 4, 4),)))
        >>> group.name, group.size, [(m.tensor, m.dim, tuple(m.indices.shape)) for m in group.members]
        ('0', 8, [('0.weight', 0, (8, 1)), ('0.bias', 0, (8, 1)), ('3.weight', 1, (8, 4))])
    """
    trace = capture(model.module, model.example)
    if trace.sized:
        require_one_path(model.module, model.example)
    weights = [name for name, _ in model.module.named_parameters()]
    found = analyse(trace, weights + [name for name, _ in model.module.named_buffers()])
    # Units that own buffers only, such as positions beyond the example's length, hold nothing that could be trained.
    groups = tuple(g for g in found.groups if any(member.tensor in weights for member in g.members))
    return replace(found, groups=groups)


def analyse(trace: Trace, order: list[str]) -> Analysis:
    """Groups and locked layers of a trace; `order` is that of the module's parameters and buffers."""
    resolved = solve(trace.labels)
    slots = tuple((name, dim) for name in order if name in trace.slots for dim in range(len(trace.slots[name])))
    book = _Book(trace, resolved, slots, tuple(_role(trace, resolved, name, dim) for name, dim in slots))
    found = book.groups()
    groups = tuple(g for g in found if g.size > 1)
    single = [Locked(g.name, 1, "it is the only unit of its kind") for g in found if g.size == 1]
    return Analysis(groups, tuple(book.locked() + single), trace, resolved)


def _role(trace: Trace, resolved: Resolved, name: str, dim: int) -> Role:
    """Whether contractions passed the dimension's labels on, or summed over them."""
    made, read = trace.produced.get(name, []), trace.consumed.get(name, [])
    labels = trace.slots[name][dim]
    if not (made or read) or len(labels) == 1:  # a single index is no unit, whatever it does
        return "both"
    mine = set(resolved.classes[labels[labels >= 0]].tolist())

    def touches(seen: list[np.ndarray]) -> bool:
        return any(a is labels for a in seen) or any(
            not mine.isdisjoint(resolved.classes[a[a >= 0]].tolist()) for a in seen
        )

    out = touches(made)
    if out == touches(read):
        return "both"
    return "out" if out else "in"


def _closure(resolved: Resolved) -> Any:
    """[classes, classes], sparse: 1 where a base class (no cell of a grid) takes a class with it, or is it."""
    from scipy.sparse import csr_matrix  # few models have grids, and the import takes longer than a cut

    count = len(resolved.locked)
    cell = np.concatenate([c for c, _ in resolved.bases()] or [np.zeros(0, dtype=np.int64)])
    axis = np.concatenate([a for _, a in resolved.bases()] or [np.zeros(0, dtype=np.int64)])
    live = (cell >= 0) & (axis >= 0)
    base = np.ones(count, dtype=np.int64)
    base[cell[live]] = 0
    ends: Any = csr_matrix((base, (np.arange(count), np.arange(count))), shape=(count, count))
    reach: Any = ends
    step: Any = csr_matrix((np.ones(int(live.sum()), dtype=np.int64), (cell[live], axis[live])), shape=(count, count))
    path = step
    while path.nnz:
        reach = reach + path @ ends
        path = path @ step
    reach.eliminate_zeros()
    reach.data[:] = 1
    return reach


@dataclass
class _Book:
    """The slots of a trace, (tensor, dimension), and the units that own their indices.

    Settings:
        trace, resolved: what is known of the labels.
        slots, roles: every dimension of every parameter and buffer that was used, and its role.
        names: how often a group was named after each layer.
    """

    trace: Trace
    resolved: Resolved
    slots: tuple[tuple[str, int], ...]
    roles: tuple[Role, ...]
    names: dict[str, int] = field(default_factory=dict)

    def ownership(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(slot, index, unit) of every index that may be cut, once for each unit that takes it away."""
        flat = [self.resolved.of(self.trace.slots[name][dim]) for name, dim in self.slots]
        slot = np.repeat(np.arange(len(flat)), [len(f) for f in flat])
        index = np.concatenate([np.arange(len(f)) for f in flat] or [np.zeros(0, dtype=np.int64)])
        classes = np.concatenate(flat or [np.zeros(0, dtype=np.int64)])
        live = classes >= 0
        slot, index, classes = slot[live], index[live], classes[live]
        if not self.resolved.grids:
            return slot, index, classes  # in order already, and every class is its own unit
        owned = _closure(self.resolved)[classes].tocoo()
        order = np.lexsort((index[owned.row], slot[owned.row]))
        return slot[owned.row][order], index[owned.row][order], owned.col.astype(np.int64)[order]

    def groups(self) -> list[Group]:
        """Units that own as many indices of the same slots form a group."""
        slot, index, unit = self.ownership()
        count = len(self.resolved.locked)
        sides = [axis for _, axes in self.resolved.grids for axis in axes]
        # Drawn by torch, which is there already: numpy imports its generators only when they are asked for.
        chance = torch.Generator().manual_seed(0)
        marks = torch.randint(1, 2**62, (len(self.slots) + len(sides),), generator=chance).numpy().astype(np.uint64)
        signature = np.zeros(count, dtype=np.uint64)
        np.add.at(signature, unit, marks[slot])
        for mark, axis in zip(marks[len(self.slots) :], sides, strict=True):
            signature[axis[axis >= 0]] += mark  # rows and columns of a grid may own alike slices, but one of each stays
        owners, seen = np.unique(unit, return_index=True)
        owners = owners[np.argsort(seen, kind="stable")]
        kinds, first, kind, sizes = np.unique(
            signature[owners], return_index=True, return_inverse=True, return_counts=True
        )
        leads = seen[np.argsort(seen, kind="stable")][first]
        place_of = np.lexsort((-sizes, index[leads], slot[leads])) if len(kinds) else first
        rank = np.argsort(place_of)[kind] if len(owners) else kind
        place, label = np.full(count, -1), np.full(count, -1)
        label[owners] = rank
        units = [owners[rank == number] for number in range(len(kinds))]
        for classes in units:
            place[classes] = np.arange(len(classes))
        order = np.argsort(label[unit], kind="stable")
        bounds = np.searchsorted(label[unit][order], np.arange(len(kinds) + 1))
        return [
            self.group(classes, slot[mine], index[mine], place[unit[mine]])
            for number, classes in enumerate(units)
            for mine in [order[bounds[number] : bounds[number + 1]]]
        ]

    def group(self, classes: np.ndarray, slot: np.ndarray, index: np.ndarray, place: np.ndarray) -> Group:
        """One group: `slot`, `index` and `place` (the unit's number) of everything its units own."""
        members = []
        order = np.lexsort((index, place, slot))
        slot, index = slot[order], index[order]
        starts = np.flatnonzero(np.diff(slot, prepend=-1))
        for number, mine in zip(slot[starts].tolist(), np.split(index, starts[1:]), strict=True):
            tensor, dim = self.slots[number]
            members.append(Member(tensor, dim, self.roles[number], torch.from_numpy(mine.reshape(len(classes), -1))))
        wide = [m for m in members if len(self.trace.slots[m.tensor]) > 1]
        sources = [m.tensor for m in wide if m.role == "out"] or [m.tensor for m in wide if m.role == "both"]
        name = self.name((sources or [members[0].tensor])[0])
        codes = self.resolved.counted[_touched(classes, self.resolved)]
        flagged = codes[codes >= 0]
        reason = self.trace.labels.reasons[int(flagged[0])] if len(flagged) else ""
        return Group(name, len(classes), tuple(members), tuple(sources), not len(flagged), reason, classes)

    def name(self, tensor: str) -> str:
        """The path of the layer that owns a tensor, numbered where it has several groups."""
        path = tensor.rpartition(".")[0] or tensor
        self.names[path] = self.names.get(path, 0) + 1
        return path if self.names[path] == 1 else f"{path}#{self.names[path]}"

    def locked(self) -> list[Locked]:
        """Output indices that must stay, by layer and reason; and those of weights that only unknown operators read."""
        reasons, found = self.trace.labels.reasons, []
        known = np.zeros(len(self.resolved.locked), dtype=bool)
        for slot, role in zip(self.slots, self.roles, strict=True):
            if role != "both":
                known[self.classes_of(slot)] = True
        for (name, dim), role in zip(self.slots, self.roles, strict=True):
            sizes = [len(labels) for labels in self.trace.slots[name]]
            alone = role == "both" and len(sizes) > 1
            if sizes[dim] == 1 or not (alone or role == "out"):
                continue
            classes = self.classes_of((name, dim))
            codes = self.resolved.locked[classes[~known[classes]] if alone else classes]
            found += [
                Locked(name.rpartition(".")[0] or name, int((codes == code).sum()), reasons[code])
                for code in distinct(codes[codes >= 0])
                if not alone or reasons[code].endswith(NO_RULE)
            ]
        return found

    def classes_of(self, slot: tuple[str, int]) -> np.ndarray:
        """The class of each index of a dimension that has one."""
        labels = self.trace.slots[slot[0]][slot[1]]
        return self.resolved.classes[labels[labels >= 0]]


def _touched(classes: np.ndarray, resolved: Resolved) -> np.ndarray:
    """The classes and the cells that die with them."""
    found = [classes]
    for cell, axis in resolved.bases():
        found.append(cell[(cell >= 0) & np.isin(axis, classes)])
    return distinct(np.concatenate(found))
