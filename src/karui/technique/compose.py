"""Then: a sequence of techniques is a technique."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from karui.errors import NeedError, UsageError, require
from karui.technique.protocol import Technique, lacking, require_fit

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique.bench import Bench


@dataclass(frozen=True, init=False)
class Then:
    """Apply techniques one after the other; each is given what the one before it made.

    What any step lacks is refused before the first one starts. Each step finds the model that the pipeline started from
    as `bench.dense`: where there is none at first, it is what the first step builds.

    Raises:
        UsageError: there is no step, or one of them is no technique.
        NeedError: a step needs data, labels, training or a teacher that is not there.

    Relations: `karui.train.Together` folds influences into *one* training; `Then` is for order.
    """

    steps: tuple[Technique, ...]

    def __init__(self, *steps: Technique) -> None:
        require(len(steps) > 0, "Then has no step.", "Give at least one technique.", UsageError)
        for step in steps:
            require(
                isinstance(step, Technique),
                f"Then was given {step!r}, which is no technique.",
                "Give an object with apply(model, bench), for example karui.sparsify.L1Filters(ratio=0.5).",
                UsageError,
            )
        object.__setattr__(self, "steps", steps)

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The model after every step."""
        missing = lacking(self, model, bench)
        if missing:
            raise NeedError(*missing[0])
        if model is not None:
            require_fit(self.steps, model, bench)
        first, *later = self.steps
        made = first.apply(model, bench if model is None else _from(model, bench))
        bench = _from(made if model is None else model, bench)
        for step in later:
            made = step.apply(made, bench)
        return made


def _from(dense: Model, bench: Bench) -> Bench:
    """The bench with the model that the pipeline started from, unless it knows one already."""
    return bench if bench.dense is not None else replace(bench, dense=dense)
