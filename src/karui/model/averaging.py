"""Several trained networks of one structure as one model, as an edit that a saved model can repeat."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from karui.errors import ArtifactError, UsageError, require
from karui.layers.averaged import Averaged
from karui.model.copying import copied
from karui.model.edits import edit
from karui.model.value import Model


@edit
@dataclasses.dataclass(frozen=True)
class Average:
    """The network becomes the mean of so many networks of its structure."""

    kind: ClassVar[str] = "average"
    members: int

    def replay(self, module: nn.Module | None, example: tuple[Any, ...]) -> nn.Module | None:
        """So many copies in one; their weights are read afterwards."""
        del example
        require(module is not None, "A lineage starts with an average of no network.", error=ArtifactError)
        assert module is not None  # noqa: S101  (just required; for the type checker)
        return Averaged([copied(module) for _ in range(self.members)])

    def describe(self) -> str:
        """What was done."""
        return f"the mean of the probabilities of {self.members} networks"


def averaged(models: Sequence[Model]) -> Model:
    """One model of several classifiers of the same structure: the mean of their probabilities.

    Args:
        models: at least one; of one, it is that one itself.

    Raises:
        UsageError: there is none, or their structures differ.

    Example:
        >>> import torch
        >>> model = Model(nn.Linear(4, 3), example=(torch.zeros(1, 4),))
        >>> averaged([model, model.copy()]).parameters
        30
    """
    require(len(models) > 0, "There is no model to average.", "Give at least one.", UsageError)
    first = models[0]
    if len(models) == 1:
        return first
    shapes = [{name: value.shape for name, value in model.module.state_dict().items()} for model in models]
    require(
        all(one == shapes[0] for one in shapes),
        "The models to average differ in structure.",
        "Give networks that differ in the values of their weights only.",
        UsageError,
    )
    return first.evolve(Averaged([copied(model.module) for model in models]), Average(len(models)))
