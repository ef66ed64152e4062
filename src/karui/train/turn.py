"""Turn: one part of a training step: whose parameters move, towards what, and on which data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from karui.errors import require
from karui.train.training import Optimizer


def every_parameter(module: nn.Module) -> Iterable[nn.Parameter]:
    """All parameters: what ordinary training moves."""
    return module.parameters()


@runtime_checkable
class Remarking(Protocol):
    """An objective that has something to say of itself."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """Lines for the lineage, such as whether the answers of a teacher are kept."""
        ...


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One update within a training step. Ordinary training has one turn, and its defaults are just that.

    A step is one batch of the training data. It gives each turn, in order, its update with an optimizer of its own; a
    later turn sees the parameters that an earlier one has moved. Gradients that a turn leaves on the parameters of
    another are dropped.

    Settings:
        name: what errors call it.
        parameters: `module -> parameters` that this turn moves (those that want no gradient stay).
        objective: `(module, inputs, targets) -> (outputs, loss)`; None calls the module and takes the task's loss.
        data: its own data set, of which each update draws a batch; None takes the step's batch, the same for all turns.
        every: takes its turn after every so many steps; None, at the end of each epoch.
        updates: number of updates when its turn comes.
        optimizer: its own optimizer; None takes the training's.

    Raises:
        SettingError: `every` or `updates` is not positive.

    Example:
        >>> Turn(name="controller", every=None, updates=50).updates
        50
    """

    name: str = "training"
    parameters: Callable[[nn.Module], Iterable[nn.Parameter]] = every_parameter
    objective: Callable[[nn.Module, tuple[Any, ...], Any], tuple[Any, Tensor]] | None = None
    data: Any = None
    every: int | None = 1
    updates: int = 1
    optimizer: Optimizer | None = None

    def __post_init__(self) -> None:
        require(
            self.every is None or self.every > 0,
            f"turn '{self.name}': every is {self.every}; give a number of steps, or None for once an epoch",
        )
        require(self.updates > 0, f"turn '{self.name}': updates is {self.updates}; give a positive number")

    @property
    def remarks(self) -> tuple[str, ...]:
        """What its objective has to say, for the lineage of what is trained."""
        return self.objective.remarks if isinstance(self.objective, Remarking) else ()

    def is_due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether its turn comes at this step (from 0)."""
        every = steps_per_epoch if self.every is None else self.every
        within = step % steps_per_epoch if self.every is None else step
        return within % every == every - 1
