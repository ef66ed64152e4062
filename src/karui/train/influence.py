"""Influence: what a technique does while a model trains, in parts that default to nothing; and Together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from karui.model import Task


@dataclass(frozen=True)
class Moment:
    """One step of a training, as an influence sees it.

    Settings:
        module: the network being trained (the loop's own copy).
        inputs: the batch's inputs, a tuple, after augmentation.
        targets: the batch's targets.
        outputs: what the module gave.
        taps: values of the layers that the influence asked for by path.
        step, steps: this step and the number of all, from 0.
        epoch, epochs: this pass over the data and the number of all, from 0.
        turn: name of the turn whose update it is.
        ahead: what the influence's own `ahead` gave.
        plain: the loss of the turn, before any influence; None where nobody tells it.
        task: what the model is for, which may have a mark of its own for targets that are no labels.
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    targets: Any
    outputs: Any
    taps: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    steps: int = 1
    epoch: int = 0
    epochs: int = 1
    turn: str = "training"
    ahead: Any = None
    plain: Tensor | None = None
    task: Task | None = None

    def is_plain(self, loss: Tensor) -> bool:
        """Whether no influence has made anything of the loss yet; so too where nobody tells.

        Example:
            >>> import torch
            >>> plain = torch.tensor(1.0)
            >>> moment = Moment(nn.Identity(), (), None, None, plain=plain)
            >>> moment.is_plain(plain), moment.is_plain(plain + 1)
            (True, False)
        """
        return self.plain is None or loss is self.plain


class Influence:
    """What acts on one training: subclass it and give the parts that do something. Each defaults to nothing.

    State that a resumed training must find again lives in the module (buffers, parametrisations, helper layers), so
    that a checkpoint holds it; an influence itself is a value, and may serve several trainings.
    """

    @property
    def taps(self) -> tuple[str, ...]:
        """Paths of the layers whose outputs `objective` wants to see."""
        return ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """Lines for the lineage of what trains under it, such as whether the answers of a teacher are kept."""
        return ()

    def attach(self, module: nn.Module) -> None:
        """Before the first step: reparametrise, add gates or helper layers, in place."""

    def ahead(self, inputs: tuple[Any, ...]) -> Any:
        """Before the network sees a batch: what `objective` will find in `moment.ahead`, None where nothing was asked.

        A teacher is asked here. What it needs on the way is then free again when the network's own intermediate results
        come to stay until the backward pass; asked after that it has to be given fresh memory in each step.
        """
        del inputs

    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        """The loss of this step, made from the task's loss (or from what the influences before made of it)."""
        del moment
        return loss

    def constraints(self, module: nn.Module, moment: Moment) -> None:
        """After each step: project, clip, shrink, in place and without gradient."""

    def finish(self, module: nn.Module) -> nn.Module:
        """After the last step: harden, and remove what `attach` added."""
        return module


@dataclass(frozen=True, init=False)
class Together(Influence):
    """Several influences in one training, each part in the order given (`finish` in the opposite one).

    Example:
        >>> Together(Influence(), Influence()).taps
        ()
    """

    parts: tuple[Influence, ...]

    def __init__(self, *parts: Influence) -> None:
        object.__setattr__(self, "parts", parts)

    @property
    def taps(self) -> tuple[str, ...]:
        """The paths that any part asks for, once each."""
        return tuple(dict.fromkeys(path for part in self.parts for path in part.taps))

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the parts have to say, once each."""
        return tuple(dict.fromkeys(line for part in self.parts for line in part.remarks))

    def attach(self, module: nn.Module) -> None:
        """Each part's, in order."""
        for part in self.parts:
            part.attach(module)

    def ahead(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Each part's, in order."""
        return tuple(part.ahead(inputs) for part in self.parts)

    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        """Each part's, in order: the next one is given the loss that the one before made."""
        for part, ahead in zip(self.parts, moment.ahead or (None,) * len(self.parts), strict=True):
            loss = part.objective(loss, replace(moment, ahead=ahead))
        return loss

    def constraints(self, module: nn.Module, moment: Moment) -> None:
        """Each part's, in order."""
        for part in self.parts:
            part.constraints(module, moment)

    def finish(self, module: nn.Module) -> nn.Module:
        """Each part's, last first, as scaffolding comes off."""
        for part in reversed(self.parts):
            module = part.finish(module)
        return module


@dataclass(frozen=True, eq=False)
class Speechless(Influence):
    """An influence without its say in the loss: it attaches, constrains and finishes, and looks at no output.

    For a training whose outputs are not those of the network, such as a stage that runs its lower half alone: masks
    must hold there too, while soft targets would be compared with something else.

    Settings:
        part: the influence.

    Example:
        >>> Speechless(Influence()).taps
        ()
    """

    part: Influence

    def attach(self, module: nn.Module) -> None:
        """The part's."""
        self.part.attach(module)

    def constraints(self, module: nn.Module, moment: Moment) -> None:
        """The part's."""
        self.part.constraints(module, moment)

    def finish(self, module: nn.Module) -> nn.Module:
        """The part's."""
        return self.part.finish(module)
