"""Criteria that need no data: norms of a unit's weights, their inverse as a control, and chance.

A criterion is a callable `(model, groups, bench) -> {group name: scores}`; units of small score go first. It is handed
all groups at once, so that one that reads data does so in one pass (see `activations`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from karui.model import Group, Model
    from karui.technique.bench import Bench


class Criterion(Protocol):
    """Scores the units of groups; the weakest go first."""

    def __call__(self, model: Model, groups: Sequence[Group], bench: Bench) -> dict[str, Float[Tensor, "units"]]:
        """One score for each unit of each group, by the group's name."""
        ...


def l1_norm(rows: Float[Tensor, "units features"]) -> Float[Tensor, "units"]:
    """Sum of absolute weights of each unit (Li et al. 2017, section 3.1).

    Example:
        >>> l1_norm(torch.tensor([[1.0, -2.0], [0.5, 0.0]])).tolist()
        [3.0, 0.5]
    """
    return rows.abs().sum(1)


def l2_norm(rows: Float[Tensor, "units features"]) -> Float[Tensor, "units"]:
    """Euclidean norm of each unit's weights.

    Example:
        >>> l2_norm(torch.tensor([[3.0, -4.0]])).tolist()
        [5.0]
    """
    return rows.square().sum(1).sqrt()


@dataclass(frozen=True)
class ByWeights:
    """Scores a unit by its rows of the weights that make it; rows of several weights are judged as one long row.

    Settings:
        measure: `[units, features] -> [units]`, for example `l1_norm`.
    """

    measure: Callable[[Tensor], Tensor]

    def __call__(self, model: Model, groups: Sequence[Group], bench: Bench) -> dict[str, Float[Tensor, "units"]]:
        """The measure of each unit's weights; `bench` is not looked at."""
        del bench
        return {group.name: self.measure(self._rows(model, group)) for group in groups}

    @staticmethod
    def _rows(model: Model, group: Group) -> Float[Tensor, "units features"]:
        return torch.cat([group.rows(model.module, name).detach() for name in group.sources], dim=1)


L1 = ByWeights(l1_norm)


@dataclass(frozen=True)
class Largest:
    """The inverse of a criterion: what it would keep goes first. A control; a criterion worth its name beats it."""

    of: Criterion

    def __call__(self, model: Model, groups: Sequence[Group], bench: Bench) -> dict[str, Float[Tensor, "units"]]:
        """The criterion's scores, negated."""
        return {name: -scores for name, scores in self.of(model, groups, bench).items()}


def uniform_scores(size: int, *key: object) -> Float[Tensor, "units"]:
    """Independent uniform numbers, fixed by `key`: the units of the k smallest are a uniform draw of k units.

    Example:
        >>> torch.equal(uniform_scores(5, 0, "conv1"), uniform_scores(5, 0, "conv1"))
        True
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(size, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Uniform:
    """Chance: every subset of a group is as likely as any other, whatever the weights are (Mittal et al. 2018).

    Settings:
        draw: number of the draw; the bench's seed, the draw and the group's name fix the outcome.
    """

    draw: int = 0

    def __call__(self, model: Model, groups: Sequence[Group], bench: Bench) -> dict[str, Float[Tensor, "units"]]:
        """Random scores; neither the weights nor the data are looked at."""
        del model
        return {group.name: uniform_scores(group.size, bench.seed, self.draw, group.name) for group in groups}
