"""The card: what is known of a technique before it is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from karui.errors import require
from karui.index import KINDS

__all__ = ["KINDS", "Card", "Kind", "Need", "Quantity"]

Need = Literal["calibration", "labels", "training", "teacher"]
Kind = Literal["build", "replace", "cut", "influence", "data", "trainings", "forward", "reader"]
Quantity = Literal["parameters", "macs", "bytes", "time", "memory"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """Data about a technique. Written as literals only: the catalogue reads it from the source, without importing it.

    Settings:
        survey: number of the paper in the survey, 1 to 80.
        slug: the technique's name in recipes and on the command line.
        title: the paper's title.
        kind: the mechanism; see `KINDS`.
        needs: what `apply` must be given beside the model: "calibration" (inputs), "labels" (targets and a task),
            "training" (epochs of it), "teacher" (another model).
        reduces: what is smaller afterwards when measured.
        identity: settings under which nothing changes; None where there are none (a network built anew).
        quick: settings for the laws, chosen to take seconds on a small network.
        exact: whether the result computes what the original did, up to rounding.
        arxiv: the paper's number there, if any.
        pays: when to use it, in a sentence.
        costs: when not to, in a sentence.
        same_signature: whether the result takes and gives tensors of the same shapes.
    """

    survey: int
    slug: str
    title: str
    kind: Kind
    needs: tuple[Need, ...] = ()
    reduces: tuple[Quantity, ...] = ()
    identity: Mapping[str, Any] | None = None
    quick: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = False
    arxiv: str | None = None
    pays: str = ""
    costs: str = ""
    same_signature: bool = True

    def __post_init__(self) -> None:
        require(1 <= self.survey <= 80, f"card '{self.slug}': survey is {self.survey}; papers are numbered 1 to 80")
        for name, given, known in (
            ("kind", (self.kind,), get_args(Kind)),
            ("needs", self.needs, get_args(Need)),
            ("reduces", self.reduces, get_args(Quantity)),
        ):
            unknown = [value for value in given if value not in known]
            require(not unknown, f"card '{self.slug}': {name} has {unknown}; choose from {', '.join(known)}")
