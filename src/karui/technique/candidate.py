"""Candidates: what a technique offers to do at one place of a model, so that a budget can choose among all of them.

A technique joins the automatic recipes by one optional method beside `apply`:

    def candidates(self, model: Model, bench: Bench, *, multiple: int = 1) -> Iterator[Candidate]: ...

It says what could be done, place by place, at a ladder of settings, and does none of it: whoever asks measures the time
and the harm of each, chooses, and carries the chosen ones out together (all cuts at once, all replacements at once).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor, nn

from karui.errors import require

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique.bench import Bench
    from karui.technique.protocol import Technique


@dataclass(frozen=True, eq=False, kw_only=True)
class Candidate:
    """One setting of a technique at one place. It cuts units of coupled groups, or puts other layers in; not both.

    Settings:
        place: the group or the layer that it acts on; of several candidates with one place, one is chosen at most.
        technique: the settings that would do just this by themselves, without retraining.
        text: what is done, in a few words: "24 of 64 units".
        cut: for each coupled group, the numbers of the units that go.
        layers: makes the new layers, by path. Made when they are asked for, and anew each time, so that a menu of
            hundreds of candidates holds no weights; at most those that take long to find and weigh little are kept.

    Raises:
        SettingError: it does nothing, or both.
    """

    place: str
    technique: Technique
    text: str
    cut: Mapping[str, Int[Tensor, "units"]] = field(default_factory=dict)
    layers: Callable[[], Mapping[str, nn.Module]] | None = None

    def __post_init__(self) -> None:
        one = bool(self.cut) != (self.layers is not None)
        require(one, f"candidate at '{self.place}': give units to cut, or a maker of layers, and not both")


@runtime_checkable
class Offers(Protocol):
    """A technique that offers candidates."""

    def candidates(self, model: Model, bench: Bench, *, multiple: int = 1) -> Iterable[Candidate]:
        """What it could do to the model, place by place, mild settings first.

        Args:
            model: what would be changed.
            bench: data and seed, for techniques that look at data.
            multiple: widths and ranks that the engine runs well are multiples of this.
        """
        ...
