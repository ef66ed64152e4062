"""Dead units: those that nothing reaches, and those that nobody reads (Han et al. 2015, section 3.5).

A unit whose incoming weights are all zero emits a constant, f(b), which moves into the biases of those that read it. A
unit that nobody reads needs no incoming weights. Each makes others dead in turn, up to a fixed point.

A group is only looked at where all its readers are known (`readers`), and what is done to it is checked: the network's
outputs, as it is, are those that they were, within rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from karui.errors import CaptureError, SurgeryError
from karui.measuring.inference import batch_of, inference, random_batch
from karui.model import Analysis, Member, Model, Note, coupled_groups, layer_at
from karui.model.groups import tensor_of
from karui.model.plan import remove_provable
from karui.model.proof import jittered
from karui.model.running import difference, outputs
from karui.model.verdict import SLACK
from karui.technique.pruning.readers import Readers, find_readers, zero

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SAMPLES = 8
CHANGED = "the outputs would not be what they were"


@dataclass(frozen=True, eq=False)
class Settled:
    """What a fixed point left.

    Settings:
        unread: by group, the units that nobody reads and that can be cut out.
        folded: number of units whose constant moved into biases.
        whole: groups that seem to have dead units and are left as they are, with the reason.
    """

    unread: Mapping[str, Int[Tensor, "units"]]
    folded: int
    whole: Mapping[str, str] = field(default_factory=dict)


@torch.no_grad()
def settle(model: Model, analysis: Analysis, readers: Readers | None = None) -> Settled:
    """Zero the weights of dead units in place, to the fixed point; the model computes what it did.

    Groups that a normalisation counts are left alone: there a unit that nobody reads still speaks through the others'
    statistics. So are groups whose units something besides weights reads, and those where the outputs would change. So
    is a unit whose constant cannot move: the reader has no bias, or pads its input with zeros.

    Args:
        model: its module is changed.
        analysis: its coupled groups.
        readers: who reads their units, where that is known already.
    """
    readers = find_readers(model, analysis) if readers is None else readers
    whole = {name: why for name, why in readers.whole.items() if _seems_dead(model.module, analysis, name)}
    names = list(readers.readers)
    same = _Unchanged.of(model)
    own = list(model.module.parameters())
    kept = [p.clone() for p in own]
    found = _fixed_point(model, readers, names)
    if not same(model.module):
        good = []
        for name in names:
            _restore(own, kept)
            _fixed_point(model, readers, [name])
            good += [name] if same(model.module) else []
        _restore(own, kept)
        found = _fixed_point(model, readers, good)
        if not same(model.module):
            _restore(own, kept)
            good, found = [], Settled({}, 0)
        whole |= dict.fromkeys((name for name in names if name not in good), CHANGED)
    return Settled(found.unread, found.folded, whole)


def _restore(own: list[nn.Parameter], kept: list[Tensor]) -> None:
    for p, value in zip(own, kept, strict=True):
        p.copy_(value)


def _fixed_point(model: Model, readers: Readers, names: Sequence[str]) -> Settled:
    """Settle these groups."""
    folded, module = 0, model.module
    while True:
        before = _zeros(module, readers, names)
        for name in names:
            makers, reading = readers.makers[name], readers.readers[name]
            unreached = _all_zero(module, makers) & ~_all_zero(module, reading)
            if unreached.any() and name not in readers.again:
                folded += _fold(model, reading, unreached)
            unread = _all_zero(module, reading)
            for member in makers:
                zero(module, member, unread)
        if _zeros(module, readers, names) == before:
            break
    unread = {name: _cuttable(_all_zero(module, readers.readers[name])) for name in names}
    return Settled({name: units for name, units in unread.items() if len(units)}, folded)


def without_dead_units(model: Model) -> Model:
    """The model without the units whose weights are all zero, or that nobody reads.

    What such a unit says is nothing or a constant, which moves into the biases of those that read it; where it cannot,
    the unit stays. The outputs are the same, which is checked; a note tells what was left whole, and why.
    """
    model = model.copy()
    analysis = coupled_groups(model)
    return cut_unread(model, analysis, settle(model, analysis))


def cut_unread(model: Model, analysis: Analysis, settled: Settled) -> Model:
    """The model without the units that nobody reads, proved, and compared to what it was on the same inputs."""
    light, whole = model, dict(settled.whole)
    if settled.unread:
        try:
            light, failed = remove_provable(model, settled.unread, analysis=analysis)
            if not _Unchanged.of(model)(light.module):
                light, failed = model, dict.fromkeys(settled.unread, CHANGED)
        except SurgeryError as error:
            failed = dict.fromkeys(settled.unread, error.message)
        whole |= failed
    if not (settled.unread or settled.folded or whole):
        return model
    gone = sum(len(units) for name, units in settled.unread.items() if name not in whole)
    left = "".join(f"; '{name}' is left whole: {why.removesuffix('.')}" for name, why in whole.items())
    note = Note(f"{gone} units that are zero cut out, {settled.folded} constants moved{left}")
    return light.evolve(light.module, note)


def dead_units_out(model: Model) -> Model:
    """The same; or the model as it is where it cannot be captured or cut, with a note of the reason."""
    try:
        return without_dead_units(model)
    except (CaptureError, SurgeryError) as error:
        return model.evolve(model.module, Note(f"dead units stay: {error.message}"))


@dataclass(frozen=True, eq=False)
class _Unchanged:
    """What a network gives for the example and for random inputs, and how far rounding may move that."""

    given: tuple[tuple[Any, ...], ...]
    before: tuple[list[Tensor], ...]
    tolerance: tuple[float, ...]

    @staticmethod
    def of(model: Model) -> _Unchanged:
        given = tuple(_inputs_of(model))
        before = tuple(outputs(model.module, inputs) for inputs in given)
        with jittered(model.module):
            moved = tuple(outputs(model.module, inputs) for inputs in given)
        return _Unchanged(given, before, tuple(map(_tolerance, before, moved)))

    def __call__(self, module: nn.Module) -> bool:
        after = (outputs(module, inputs) for inputs in self.given)
        return all(map(lambda a, b, most: difference(a, b) <= most, after, self.before, self.tolerance))


def _tolerance(before: list[Tensor], moved: list[Tensor]) -> float:
    """By how much a unit in the last place of each weight moves the outputs, and some."""
    least = max((float(t.abs().max()) * torch.finfo(t.dtype).eps / 2 for t in before if _counts(t)), default=0.0)
    return SLACK * max(difference(before, moved), least)


def _counts(value: Tensor) -> bool:
    return value.is_floating_point() and value.numel() > 0 and bool(value.isfinite().all())


def _inputs_of(model: Model) -> Iterator[tuple[Any, ...]]:
    """The example and random inputs, several samples of each where the model takes any number."""
    for inputs in (batch_of(model.example, SAMPLES), random_batch(model.example, SAMPLES)):
        try:
            outputs(model.module, inputs)
        except (RuntimeError, ValueError, AssertionError, IndexError, TypeError):
            yield from (model.example, random_batch(model.example, _samples(model.example)))
            return
        yield inputs


def _samples(example: tuple[Any, ...]) -> int:
    return next((len(t) for t in tree_leaves(example) if isinstance(t, Tensor) and t.ndim), 1)


def _seems_dead(module: nn.Module, analysis: Analysis, name: str) -> bool:
    """Whether weights alone would call units of a group unread."""
    return bool(_all_zero(module, [member for member in analysis[name].members if member.role == "in"]).any())


def _cuttable(unread: Bool[Tensor, "units"]) -> Int[Tensor, "units"]:
    """The numbers of the unread units; one stays where all of them would go."""
    units = unread.nonzero().flatten()
    return units[1:] if len(units) == len(unread) else units


def _slices(module: nn.Module, member: Member) -> Float[Tensor, "units features"]:
    return tensor_of(module, member.tensor).detach().movedim(member.dim, 0)[member.indices].flatten(1)


def _all_zero(module: nn.Module, members: Sequence[Member]) -> Bool[Tensor, "units"]:
    return torch.stack([(_slices(module, member) == 0).all(1) for member in members]).all(0)


def _zeros(module: nn.Module, readers: Readers, names: Sequence[str]) -> int:
    members = [member for name in names for member in (*readers.makers[name], *readers.readers[name])]
    return sum(int((_slices(module, member) == 0).sum()) for member in members)


def _fold(model: Model, readers: Sequence[Member], unreached: Bool[Tensor, "units"]) -> int:
    """Move what unreached units emit into their readers' biases; how many could be moved."""
    seen = _inputs(model, [member.tensor.rpartition(".")[0] for member in readers])
    emitted = [_constants(model.module, member, seen.get(member.tensor.rpartition(".")[0])) for member in readers]
    movable = unreached.clone()
    for constants in emitted:
        movable &= torch.zeros_like(movable) if constants is None else ~constants.isnan().any(1)
    for member, constants in zip(readers, emitted, strict=True):
        if constants is None or not movable.any():
            continue
        layer = layer_at(model.module, member.tensor.rpartition(".")[0])
        weight = tensor_of(model.module, member.tensor)
        index, values = member.indices[movable].flatten(), constants[movable].flatten()
        shift = weight[:, index].flatten(2).sum(2) @ values if weight.ndim > 2 else weight[:, index] @ values
        if values.any() and isinstance(layer.bias, nn.Parameter):
            layer.bias += shift
        zero(model.module, member, movable)
    return int(movable.sum())


def _constants(module: nn.Module, member: Member, value: Tensor | None) -> Float[Tensor, "units k"] | None:
    """What each unit's features are at their reader, not a number where that varies or cannot move; None: no reader.

    Besides linear layers and plain convolutions none takes a constant.
    """
    layer = layer_at(module, member.tensor.rpartition(".")[0])
    plain = isinstance(layer, nn.Linear) or (isinstance(layer, _CONVOLUTIONS) and layer.groups == 1)
    if value is None or not plain or member.dim != 1:
        return None
    features = value if isinstance(layer, nn.Linear) else value.movedim(1, -1)
    rows = features.reshape(-1, features.shape[-1])[:, member.indices.flatten()]
    constant = rows[0].clone()
    constant[(rows != rows[0]).any(0)] = torch.nan
    padded = isinstance(layer, _CONVOLUTIONS) and (isinstance(layer.padding, str) or any(layer.padding))
    if layer.bias is None or (padded and layer.padding_mode != "replicate"):
        constant[constant != 0] = torch.nan
    return constant.reshape(member.indices.shape)


def _inputs(model: Model, paths: list[str]) -> dict[str, Tensor]:
    """What each layer is given, for the example and for random inputs."""
    seen: dict[str, list[Tensor]] = {}

    def hook(path: str) -> Any:
        def keep(_layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                seen.setdefault(path, []).append(inputs[0].clone())  # what comes later may write over it in place

        return keep

    given = tuple(_inputs_of(model))
    handles = [layer_at(model.module, path).register_forward_pre_hook(hook(path)) for path in dict.fromkeys(paths)]
    try:
        with inference(model.module) as module:
            for inputs in given:
                module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {path: torch.cat(values) for path, values in seen.items()}
