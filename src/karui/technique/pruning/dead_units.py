"""Dead units: those that nothing reaches, and those that nobody reads (Han et al. 2015, section 3.5).

A unit whose incoming weights are all zero emits a constant, f(b), which moves into the biases of those that read it. A
unit that nobody reads needs no incoming weights. Each makes others dead in turn, up to a fixed point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from karui.errors import CaptureError, SurgeryError
from karui.measuring.inference import batch_of, inference, random_batch
from karui.model import Analysis, Group, Member, Model, Note, coupled_groups, layer_at, remove_units
from karui.model.groups import tensor_of

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SAMPLES = 8


@dataclass(frozen=True, eq=False)
class Settled:
    """What a fixed point left.

    Settings:
        unread: by group, the units that nobody reads and that can be cut out.
        folded: number of units whose constant moved into biases.
    """

    unread: Mapping[str, Int[Tensor, "units"]]
    folded: int


@torch.no_grad()
def settle(model: Model, analysis: Analysis) -> Settled:
    """Zero the weights of dead units in place, to the fixed point; the model computes what it did.

    Groups that a normalisation counts are left alone: there a unit that nobody reads still speaks through the others'
    statistics. So is a unit whose constant cannot move: the reader has no bias, or pads its input with zeros.

    Args:
        model: its module is changed.
        analysis: its coupled groups.
    """
    groups = [group for group in analysis.groups if group.exact and _makers(group) and _readers(group)]
    folded = 0
    while True:
        before = _zeros(model.module, groups)
        for group in groups:
            unreached = _all_zero(model.module, _makers(group)) & ~_all_zero(model.module, _readers(group))
            if unreached.any():
                folded += _fold(model, group, unreached)
            unread = _all_zero(model.module, _readers(group))
            for member in _makers(group):
                _zero(model.module, member, unread)
        if _zeros(model.module, groups) == before:
            break
    unread = {group.name: _cuttable(_all_zero(model.module, _readers(group))) for group in groups}
    return Settled({name: units for name, units in unread.items() if len(units)}, folded)


def without_dead_units(model: Model) -> Model:
    """The model without the units whose weights are all zero, or that nobody reads.

    What such a unit says is nothing or a constant, which moves into the biases of those that read it; where it cannot,
    the unit stays. The outputs are the same.
    """
    model = model.copy()
    analysis = coupled_groups(model)
    settled = settle(model, analysis)
    light = remove_units(model, settled.unread, analysis=analysis) if settled.unread else model
    gone = sum(len(units) for units in settled.unread.values())
    return light.evolve(light.module, Note(f"{gone} units that are zero cut out, {settled.folded} constants moved"))


def dead_units_out(model: Model) -> Model:
    """The same; or the model as it is where it cannot be captured or cut, with a note of the reason."""
    try:
        return without_dead_units(model)
    except (CaptureError, SurgeryError) as error:
        return model.evolve(model.module, Note(f"dead units stay: {error.message}"))


def _cuttable(unread: Bool[Tensor, "units"]) -> Int[Tensor, "units"]:
    """The numbers of the unread units; one stays where all of them would go."""
    units = unread.nonzero().flatten()
    return units[1:] if len(units) == len(unread) else units


def _makers(group: Group) -> list[Member]:
    return [member for member in group.members if member.tensor in group.sources and member.role == "out"]


def _readers(group: Group) -> list[Member]:
    return [member for member in group.members if member.role == "in"]


def _slices(module: nn.Module, member: Member) -> Float[Tensor, "units features"]:
    return tensor_of(module, member.tensor).detach().movedim(member.dim, 0)[member.indices].flatten(1)


def _all_zero(module: nn.Module, members: list[Member]) -> Bool[Tensor, "units"]:
    return torch.stack([(_slices(module, member) == 0).all(1) for member in members]).all(0)


def _zero(module: nn.Module, member: Member, units: Bool[Tensor, "units"]) -> None:
    tensor_of(module, member.tensor).index_fill_(member.dim, member.indices[units].flatten(), 0.0)


def _zeros(module: nn.Module, groups: list[Group]) -> int:
    members = [member for group in groups for member in (*_makers(group), *_readers(group))]
    return sum(int((_slices(module, member) == 0).sum()) for member in members)


def _fold(model: Model, group: Group, unreached: Bool[Tensor, "units"]) -> int:
    """Move what unreached units emit into their readers' biases; how many could be moved."""
    readers = _readers(group)
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
        _zero(model.module, member, movable)
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

    handles = [layer_at(model.module, path).register_forward_pre_hook(hook(path)) for path in dict.fromkeys(paths)]
    try:
        with inference(model.module) as module:
            for inputs in (batch_of(model.example, SAMPLES), random_batch(model.example, SAMPLES)):
                module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {path: torch.cat(values) for path, values in seen.items()}
