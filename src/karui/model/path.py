"""The path that a run takes: its operators, and the weights that they are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from karui.model.rules import known_of
from karui.model.trace import Trace

Ran = list[tuple[str, tuple[str, ...]]]

# A run with gradients keeps results for later, which is seen as this.
DETACH = "aten.detach.default"


class Path(TorchDispatchMode):
    """Notes each operator that a module runs, and which of its weights each is given."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[int, str] = {}
        self.ran: Ran = []

    def name(self, weights: Mapping[str, Tensor]) -> None:
        """Tell it the weights of the run that follows."""
        self.names = {id(t): name for name, t in weights.items()}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled while this mode is on, so it need not be hidden from the compiler at every operator."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = known_of(func)
        if known.split is not None:
            with self:
                return known.split(*args, **kwargs)
        if known.name != DETACH:
            self.ran.append((known.name, tuple([self.names.get(id(t), "") for t in known.tensors(args, kwargs)])))
        return func(*args, **kwargs)


def seen(trace: Trace) -> Ran:
    """The operators of a trace's evaluation run, and the weights that they were given."""
    return [
        (step.name, tuple([v.origin if v.origin and v.dims is trace.slots[v.origin] else "" for v in step.inputs]))
        for step in trace.steps[: trace.evaluated]
        if step.name != DETACH
    ]
