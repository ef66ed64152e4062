"""The model as a value: a module, inputs that it accepts, what it is for, and how it came to be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from karui.errors import UsageError, require
from karui.model.copying import copied

if TYPE_CHECKING:
    from karui.model.edits import Edit
    from karui.model.task import Task


@dataclass(frozen=True, eq=False)
class Model:
    """A network and what karui must know of it. Surgery and training return a new one and leave this one as it is.

    Settings:
        module: any `nn.Module`.
        example: the inputs of one call, positional, with the batch on the first dimension of each tensor.
        task: its loss and metric; None where nothing is trained or judged.
        lineage: the edits that made it, oldest first; replayed when a saved model is loaded.

    Raises:
        UsageError: the module is no `nn.Module`, or there is no example input.

    Example:
        >>> import torch
        >>> model = Model(nn.Linear(4, 2), example=(torch.zeros(1, 4),))
        >>> model.parameters
        10
    """

    module: nn.Module
    example: tuple[Any, ...]
    task: Task | None = None
    lineage: tuple[Edit, ...] = ()

    def __post_init__(self) -> None:
        require(
            isinstance(self.module, nn.Module),
            f"The model is a {type(self.module).__name__}, not a torch.nn.Module.",
            "Give the network itself, for example Model(net, example=(x,)).",
            UsageError,
        )
        if isinstance(self.example, Tensor):
            object.__setattr__(self, "example", (self.example,))
        require(
            isinstance(self.example, tuple) and len(self.example) > 0,
            "The model has no example input.",
            "Give the inputs of one call as a tuple, for example example=(torch.zeros(1, 3, 32, 32),).",
            UsageError,
        )

    @property
    def parameters(self) -> int:
        """Number of trainable and frozen parameters; a shared one counts once."""
        return sum(p.numel() for p in self.module.parameters())

    def copy(self) -> Model:
        """The same value over a module of its own, whose parameters may be changed freely."""
        return replace(self, module=copied(self.module))

    def evolve(self, module: nn.Module, *edits: Edit) -> Model:
        """A new value with another module, and the edits that led to it appended to the lineage."""
        return replace(self, module=module, lineage=(*self.lineage, *edits))
