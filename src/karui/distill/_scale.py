"""Logits as least squares wants them, each class with mean 0 and variance 1; the last layer that gives them back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from karui.data import Batches
from karui.errors import NeedError, require
from karui.layers.factored import CONVOLUTIONS
from karui.model import Model, layer_at
from karui.numerics.running import Running
from karui.train.teaching import Teachers


@dataclass(frozen=True, eq=False)
class Scale:
    """Mean and deviation of the targets, for each class.

    Example:
        >>> scale = Scale(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 1.0]))
        >>> scale.normalised(torch.tensor([[5.0, 3.0]])).tolist()
        [[2.0, 3.0]]
    """

    mean: Float[Tensor, "classes"]
    deviation: Float[Tensor, "classes"]

    def normalised(self, logits: Float[Tensor, "batch classes *positions"]) -> Float[Tensor, "..."]:
        """Less the mean, over the deviation."""
        mean, deviation = (_along(value, logits) for value in (self.mean, self.deviation))
        return (logits - mean) / deviation

    def fold(self, layer: Any) -> None:
        """Let a layer that gives normalised logits give them on their own scale, in place."""
        self._rescale(layer, self.deviation.double(), self.mean.double())

    def unfold(self, layer: Any) -> None:
        """Let a layer that gives logits give them normalised, in place."""
        deviation = self.deviation.double()
        self._rescale(layer, 1 / deviation, -self.mean.double() / deviation)

    @torch.no_grad()
    def _rescale(self, layer: Any, factor: Tensor, offset: Tensor) -> None:
        factor, offset = factor.to(layer.weight.device), offset.to(layer.weight.device)
        layer.weight.copy_(layer.weight.double() * _along(factor, layer.weight, 0))
        layer.bias.copy_(layer.bias.double() * factor + offset)


def _along(value: Tensor, like: Tensor, dim: int = 1) -> Tensor:
    """A value for each class, shaped to meet a tensor with its classes on `dim`."""
    kind = torch.promote_types(value.dtype, like.dtype)
    return value.to(like.device, kind).reshape(-1, *[1] * (like.ndim - dim - 1))


def scale_of(teachers: Teachers, dataset: Any, batch: int = 256) -> Scale:
    """Mean and deviation of the teachers' mean logits over a data set, in one pass, none of them kept.

    A class whose logit never changes has deviation 1.
    """
    batches, running = Batches(dataset), None
    for index in torch.arange(len(batches)).split(batch):
        logits = teachers(batches.fetch(index)[0]).mean(0)
        table = logits.movedim(1, -1).flatten(0, -2) if logits.ndim > 1 else logits[:, None]
        running = running or Running.zeros(table.shape[1], full=False)
        running.add(table)
    require(running is not None, "There is no sample to teach on.", "Give training data.", NeedError)
    assert running is not None  # noqa: S101  (just required; for the type checker)
    deviation = running.variance().sqrt()
    constant = deviation <= 1e-6 * running.mean.abs().clamp(min=1.0)
    return Scale(running.mean.float(), torch.where(constant, 1.0, deviation).float())


def can_hold(model: Model, path: str | None, classes: int | None = None) -> bool:
    """Whether a model's last layer can take up mean and deviation: plain, with a bias, its weights in no other use.

    Given the number of the teacher's classes, it must know as many.
    """
    if path is None:
        return False
    layer: Any = layer_at(model.module, path)
    plain = isinstance(layer, (nn.Linear, *CONVOLUTIONS.values())) and not parametrize.is_parametrized(layer)
    if not plain or layer.bias is None or len(layer.bias) != (classes or len(layer.bias)):
        return False
    own = {id(layer.weight), id(layer.bias)}
    uses = [name for name, value in model.module.named_parameters(remove_duplicate=False) if id(value) in own]
    return len(uses) == 2
