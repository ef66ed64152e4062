"""What is to become of a layer: ranks, parameters and multiply-adds, or the reason why it is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Choice:
    """What is done with one layer: its ranks (empty: left as it is, for the reason), parameters and multiply-adds.

    `error` is the relative Frobenius error of the weight, known once the layer is built. `remark` is worth telling.
    `form` says what takes the layer's place where ranks do not.
    """

    path: str
    ranks: tuple[int, ...] = ()
    full: tuple[int, ...] = ()
    reason: str = ""
    parameters: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)
    remark: str = ""
    error: float | None = None
    form: str = ""

    @property
    def replaced(self) -> bool:
        """Whether the layer is factored."""
        return not self.reason

    def describe(self) -> str:
        """One line for a person."""
        if not self.replaced:
            return f"{self.path}: left as it is: {self.reason}"
        sizes = f"{self.parameters[0]:,} -> {self.parameters[1]:,} parameters"
        return f"{self.path}: {self.made}, {sizes}{'; ' if self.remark else ''}{self.remark}"

    @property
    def made(self) -> str:
        """What the layer becomes, in a few words."""
        ranks, full = (" x ".join(map(str, numbers)) for numbers in (self.ranks, self.full))
        return self.form or f"rank {ranks} of {full}"

    def to_json(self) -> dict[str, Any]:
        """Its values, for the lineage."""
        if not self.replaced:
            return {"layer": self.path, "reason": self.reason}
        return {
            "layer": self.path,
            "ranks": list(self.ranks),
            "full": list(self.full),
            "parameters": list(self.parameters),
            "macs": list(self.macs),
            "error": self.error,
            **({"remark": self.remark} if self.remark else {}),
            **({"form": self.form} if self.form else {}),
        }


def unless_larger(choice: Choice, *, macs: bool = True) -> Choice:
    """The choice, or the layer left as it is where its factors would hold or (`macs`) compute as much as it does."""
    for what, (before, after) in (("parameters", choice.parameters), ("multiply-adds", choice.macs)):
        if after >= before and (macs or what == "parameters"):
            made = choice.form or f"rank {' x '.join(map(str, choice.ranks))}"
            return Choice(choice.path, reason=f"{made} would not save {what} ({before:,} -> {after:,})")
    return choice
