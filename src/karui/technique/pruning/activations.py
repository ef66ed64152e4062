"""Criteria that look at what units say on data: mean, entropy, zeros, and the gradient of the loss.

A unit's map is read where the next layer reads it: after normalisation, activation and pooling, and after flattening,
where each unit is several features. The scores are pure functions of pooled maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from karui.data import Batches
from karui.errors import NeedError, SurgeryError, require
from karui.technique.pruning.scope import layer_of

if TYPE_CHECKING:
    from karui.model import Group, Model
    from karui.technique.bench import Bench

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Pooled:
    """What is kept of the units' maps: for each sample, their mean over positions and the share of zeros."""

    mean: Float[Tensor, "samples units"]
    zeros: Float[Tensor, "samples units"]


def mean_activation(maps: Pooled) -> Float[Tensor, "units"]:
    """Mean of a unit's map over positions and samples; a quiet unit goes first.

    Example:
        >>> mean_activation(Pooled(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.zeros(2, 2))).tolist()
        [2.0, 0.0]
    """
    return maps.mean.mean(0)


def nonzero_share(maps: Pooled) -> Float[Tensor, "units"]:
    """One minus the average percentage of zeros (APoZ): a unit that is mostly off goes first.

    Example:
        >>> nonzero_share(Pooled(torch.zeros(2, 2), torch.tensor([[1.0, 0.5], [1.0, 0.0]]))).tolist()
        [0.0, 0.75]
    """
    return 1 - maps.zeros.mean(0)


def histogram_entropy(values: Float[Tensor, "samples units"], bins: int = 10) -> Float[Tensor, "units"]:
    """Entropy (nats) of the histogram of each column, in `bins` equal bins between its own least and greatest value.

    A constant column has entropy 0, one spread evenly over all bins `log(bins)`.

    Example:
        >>> histogram_entropy(torch.ones(8, 1)).tolist()
        [0.0]
    """
    low, high = values.min(0).values, values.max(0).values
    width = torch.where(high > low, high - low, torch.ones_like(high))
    bin_of = ((values - low) / width * bins).long().clamp(max=bins - 1)
    counts = torch.zeros(bins, values.shape[1], device=values.device).scatter_add_(
        0, bin_of, torch.ones_like(values, dtype=torch.float32)
    )
    return torch.special.entr(counts / len(values)).sum(0)


def entropy(maps: Pooled) -> Float[Tensor, "units"]:
    """Entropy of the pooled activation over the data: a unit that always says the same goes first."""
    return histogram_entropy(maps.mean)


def scaled_entropy(maps: Pooled) -> Float[Tensor, "units"]:
    """Entropy of the pooled activation times its mean."""
    return entropy(maps) * mean_activation(maps)


@dataclass(frozen=True)
class ByActivations:
    """Scores a unit by its maps on calibration data (no label is read).

    Settings:
        measure: `Pooled -> [units]`, for example `entropy`.
        samples: how many inputs of the training data are looked at.
    """

    measure: Callable[[Pooled], Tensor]
    samples: int = 512

    def __call__(self, model: Model, groups: Sequence[Group], bench: Bench) -> dict[str, Float[Tensor, "units"]]:
        """One pass over the calibration data scores all groups."""
        maps = pooled_maps(model.module, groups, bench.calibration(self.samples))
        return {name: self.measure(pooled) for name, pooled in maps.items()}


@torch.no_grad()
def pooled_maps(module: nn.Module, groups: Sequence[Group], batches: Iterable[tuple[Any, ...]]) -> dict[str, Pooled]:
    """The pooled maps of each group's units over all batches, in evaluation mode.

    Raises:
        SurgeryError: nothing that makes or reads a group's units is a layer whose values can be seen.
    """
    kept: dict[str, list[Pooled]] = {group.name: [] for group in groups}
    training = module.training
    module.eval()
    try:
        with ExitStack() as stack:
            for group in groups:
                stack.callback(_listen(module, group, kept[group.name].append))
            for inputs in batches:
                module(*inputs)
    finally:
        module.train(training)
    for name, parts in kept.items():
        require(len(parts) > 0, f"The maps of '{name}' were not seen while the model ran.", _REMEDY, SurgeryError)
    return {
        name: Pooled(torch.cat([part.mean for part in parts]), torch.cat([part.zeros for part in parts]))
        for name, parts in kept.items()
    }


_TASK = "Give Model(..., task=karui.Classification()), or another task."
_REMEDY = "Leave the group out with skip, or score it by its weights."


def _listen(module: nn.Module, group: Group, tell: Callable[[Pooled], None]) -> Callable[[], None]:
    """Watch the group's maps where a layer reads them, else where one makes them; returns what ends the watch."""
    layers = dict(module.named_modules())
    for role, see in (("in", True), ("out", False)):
        for member in group.members:
            layer = layers.get(layer_of(member.tensor))
            if member.role != role or not member.tensor.endswith("weight") or not _plain(layer):
                continue
            convolution, indices = isinstance(layer, _CONVOLUTIONS), member.indices

            def hook(
                _: nn.Module,
                inputs: Any,
                output: Any = None,
                *,
                convolution: bool = convolution,
                indices: Tensor = indices,
                see: bool = see,
            ) -> None:
                tell(_pool(inputs[0] if see else output, indices, convolution))

            assert layer is not None  # noqa: S101  (it is plain)
            return (layer.register_forward_pre_hook(hook) if see else layer.register_forward_hook(hook)).remove
    raise SurgeryError(f"The maps of '{group.name}' cannot be seen: no plain layer makes or reads them.", _REMEDY)


def _plain(layer: nn.Module | None) -> bool:
    """Whether the channels of a layer's weight are the channels of its input and output."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, _CONVOLUTIONS) and layer.groups == 1)


def _pool(values: Tensor, indices: Int[Tensor, "units k"], convolution: bool) -> Pooled:
    picked = values[:, indices[:, 0]] if convolution else values[..., indices].movedim(-2, 1)
    maps = picked.flatten(2)
    return Pooled(maps.float().mean(2), (maps == 0).float().mean(2))


@dataclass(frozen=True)
class BySensitivity:
    """Scores a unit by how much the loss feels its weights: mean over batches of the gradient's L1 norm (needs labels).

    Settings:
        samples: how many labelled samples of the training data are looked at.
        batch: samples averaged in one gradient.
    """

    samples: int = 512
    batch: int = 64

    def __call__(self, model: Model, groups: Sequence[Group], bench: Bench) -> dict[str, Float[Tensor, "units"]]:
        """One backward pass for each batch scores all groups; the model's own gradients stay as they are."""
        if model.task is None:
            raise NeedError("Sensitivity needs labels, and the model has no task.", _TASK)
        working = model.copy()
        working.module.eval()
        data = Batches(bench.train)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(bench.seed))[: self.samples]
        parts: dict[str, list[Tensor]] = {group.name: [] for group in groups}
        for index in order.split(self.batch):
            inputs, targets = data.fetch(index)
            working.module.zero_grad()
            model.task.loss(working.module(*inputs), targets).backward()
            for group in groups:
                parts[group.name].append(_gradient_norm(working.module, group))
        return {name: torch.stack(scores).mean(0) for name, scores in parts.items()}


def _gradient_norm(module: nn.Module, group: Group) -> Float[Tensor, "units"]:
    """L1 norm of the loss's gradient in each unit's weights."""
    total = torch.zeros(group.size)
    for member in group.members:
        if member.tensor in group.sources and member.role != "in":
            gradient = module.get_parameter(member.tensor).grad
            assert gradient is not None  # noqa: S101  (a source lies on the way to the loss)
            rows = gradient.movedim(member.dim, 0)[member.indices]
            total += rows.abs().flatten(1).sum(1).cpu()
    return total
