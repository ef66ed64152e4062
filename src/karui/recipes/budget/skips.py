"""Leaving whole parts of a network out: those whose output has the shape of their input.

What is left of a residual block without its branch is its shortcut, so that deep residual networks bear the loss of a
few blocks, and nothing else takes so little time as what is not there: thin layers still cost their calls. Whether a
network bears it is measured, as for every candidate. Source: depth as a structure to be removed, Wen et al. 2016,
"Learning Structured Sparsity in Deep Neural Networks", section 3.2 (survey 58); here blocks are not taught to vanish,
but taken out and recovered from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from karui.measuring.inference import inference
from karui.model import Model, replace_layers
from karui.technique import Candidate

if TYPE_CHECKING:
    from karui.technique import Bench


@dataclass(frozen=True, kw_only=True)
class LeaveOut:
    """Put nothing in the place of a part.

    Settings:
        part: its path.
    """

    part: str

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The model without the part."""
        del bench
        assert model is not None  # noqa: S101  (it is offered for a model)
        return replace_layers(model, {self.part: nn.Identity()}, f"left out {self.part}")


def skips(model: Model) -> Iterator[Candidate]:
    """A candidate for each part of several layers that gives what has the shape of its only input."""
    calls: dict[str, list[bool]] = {}
    hooks = []

    def watch(path: str) -> Any:
        def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            del module
            plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(out, Tensor)
            calls.setdefault(path, []).append(plain and args[0].shape == out.shape and args[0].dtype == out.dtype)

        return seen

    with inference(model.module) as module:
        for path, part in module.named_modules():
            if path and any(True for _ in part.children()) and any(True for _ in part.parameters()):
                hooks.append(part.register_forward_hook(watch(path), with_kwargs=True))
        try:
            module(*model.example)
        finally:
            for hook in hooks:
                hook.remove()
    for path, found in calls.items():
        if found == [True]:
            yield Candidate(
                place=path, technique=LeaveOut(part=path), text="left out", layers=lambda at=path: {at: nn.Identity()}
            )
