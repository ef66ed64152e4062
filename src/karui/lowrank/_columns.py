"""Columns of filter matrices that go while a network trains: their norms as a penalty, and removal step by step (26).

The weight of a convolution is a matrix of filters by pairs of an input channel and a position of the kernel; of a
grouped one there is a matrix for each group. A column is one such pair, for all filters. Of a linear layer it is an
input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from karui.lowrank._proximal import groups_in
from karui.model.taps import layer_at
from karui.numerics.proximal import shrink_rows
from karui.numerics.selection import keep_largest, keep_largest_overall
from karui.numerics.unfold import split_groups
from karui.train import Influence, Moment
from karui.train.masks import MaskKeeper

Pattern = Literal["learned", "cross", "centre", "random"]


def column_norms(weight: Float[Tensor, "filters channels *kernel"], groups: int = 1) -> Float[Tensor, "groups columns"]:
    """The Euclidean norm of each column over the filters of its group; its gradient at zero is zero.

    Example:
        >>> column_norms(torch.tensor([[3.0, 0.0], [4.0, 1.0]])).tolist()
        [[5.0, 1.0]]
    """
    return torch.linalg.vector_norm(split_groups(weight, groups).flatten(2), dim=1)


def group_penalty(weight: Float[Tensor, "filters channels *kernel"], groups: int = 1) -> Float[Tensor, ""]:
    """The sum of the columns' norms: the group-sparse regulariser, without its weight (section 3.2)."""
    return column_norms(weight, groups).sum()


def shrink_columns(
    weight: Float[Tensor, "filters channels *kernel"], threshold: float, groups: int = 1
) -> Float[Tensor, "filters channels *kernel"]:
    """The proximal operator of `threshold` times the penalty: `W_g max(0, 1 - threshold / ||W_g||)` for each column.

    Example:
        >>> shrink_columns(torch.tensor([[3.0, 0.3], [4.0, 0.4]]), 2.5).tolist()
        [[1.5, 0.0], [2.0, 0.0]]
    """
    matrices = split_groups(weight, groups).flatten(2)
    return shrink_rows(matrices.transpose(1, 2), threshold).transpose(1, 2).reshape(weight.shape)


def columns_of(mask: Bool[Tensor, "filters channels *kernel"], groups: int = 1) -> Bool[Tensor, "groups columns"]:
    """The columns in which anything is left."""
    return split_groups(mask, groups).flatten(2).any(1)


def as_mask(alive: Bool[Tensor, "groups columns"], weight: Tensor) -> Bool[Tensor, "filters channels *kernel"]:
    """The columns as a mask of the weight."""
    return alive.repeat_interleave(weight.shape[0] // len(alive), 0).reshape(weight.shape)


def fixed_columns(layer: Any, pattern: Pattern, density: float, seed: int) -> Bool[Tensor, "groups columns"]:
    """A pattern that no training has chosen: a control.

    Args:
        layer: a linear layer or a convolution.
        pattern: "centre" is the position in the middle of the kernel, "cross" what shares a line with it along one
            dimension, "random" is drawn; a linear layer, whose inputs have no middle, is only cut by "random".
        density: share of the columns that a random pattern keeps in each group.
        seed: of the draw.
    """
    groups, kernel = groups_in(layer), () if isinstance(layer, nn.Linear) else layer.kernel_size
    taps, columns = math.prod(kernel), layer.weight[0].numel()
    if pattern == "random":
        chances = torch.rand(groups, columns, generator=torch.Generator().manual_seed(seed))
        alive = torch.ones(columns, dtype=torch.bool)
        return torch.stack([keep_largest(chance, alive, kept(columns, density)) for chance in chances])
    off = [torch.arange(size) != (size - 1) // 2 for size in kernel]
    away = torch.stack(torch.meshgrid(*off, indexing="ij")).sum(0) if kernel else torch.zeros(())
    alive = away.flatten() <= (1 if pattern == "cross" else 0)
    return alive.expand(groups, columns // taps, taps).flatten(1)


def kept(columns: int, density: float) -> int:
    """How many columns a density keeps: one at least."""
    return max(1, round(density * columns))


def surviving(
    norms: Mapping[str, Float[Tensor, "groups columns"]],
    alive: Mapping[str, Bool[Tensor, "groups columns"]],
    density: float,
    *,
    across: bool,
) -> dict[str, Bool[Tensor, "groups columns"]]:
    """The columns that survive at a density: those of the largest norms, in each group or over all layers.

    Every group keeps one at least.
    """
    rows = {(path, group): row for path, matrix in norms.items() for group, row in enumerate(matrix)}
    living = {(path, group): row for path, matrix in alive.items() for group, row in enumerate(matrix)}
    names = {place: f"{place[0]} {place[1]}" for place in rows}
    if across:
        count = round(density * sum(row.numel() for row in rows.values()))
        scores, masks = ({names[place]: row for place, row in given.items()} for given in (rows, living))
        chosen = keep_largest_overall(scores, masks, count)
        found = {place: chosen[names[place]] for place in rows}
    else:
        found = {place: keep_largest(row, living[place], kept(row.numel(), density)) for place, row in rows.items()}
    return {path: torch.stack([found[path, group] for group in range(len(matrix))]) for path, matrix in norms.items()}


@dataclass(frozen=True, eq=False, kw_only=True)
class BrainDamage(Influence):
    """A penalty on the norms of columns, and their removal step by step, those of the smallest norms first.

    Settings:
        groups: paths of the layers, each with the number of groups of its filters.
        keeper: holds the masks of their weights, of which more and more is pruned.
        density: share of the columns that is left when the training ends.
        rounds: removals, at equal distances, the last one at the end; the density falls by the same factor each time.
            1 removes all at the end; 0 removes none.
        lam: weight of the penalty; None takes `share`.
        share: the penalty as a share of the task's loss, in each step.
        shrink: what each column's norm loses in an epoch, by a proximal step after each step.
        across: whether columns of all layers are ranked together; else each group of filters keeps its density.
    """

    groups: Mapping[str, int]
    keeper: MaskKeeper
    density: float
    rounds: int
    lam: float | None = None
    share: float = 0.1
    shrink: float = 0.0
    across: bool = False

    def attach(self, module: nn.Module) -> None:
        """Masks beside the weights."""
        self.keeper.attach(module)

    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        """The loss with the penalty."""
        if self.lam == 0 or (self.lam is None and self.share == 0):
            return loss
        terms = [group_penalty(weight_of(moment.module, path), count) for path, count in self.groups.items()]
        penalty = torch.stack(terms).sum()
        if self.lam is not None:
            return loss + self.lam * penalty
        return loss + self.share * loss.detach() * penalty / penalty.detach().clamp(min=1e-12)

    def constraints(self, module: nn.Module, moment: Moment) -> None:
        """The proximal step, what is due to be removed, and zeros kept."""
        if self.shrink:
            by = self.shrink * moment.epochs / max(1, moment.steps)
            for path, count in self.groups.items():
                weight = weight_of(module, path)
                if weight.requires_grad:  # a layer that does not learn cannot make up for it
                    weight.copy_(shrink_columns(weight, by, count))
        done = moment.step + 1
        for number in range(1, self.rounds + 1):
            if done == max(1, round(moment.steps * number / self.rounds)):
                self.remove(module, self.density ** (number / self.rounds))
        self.keeper.constraints(module, moment)

    def remove(self, module: nn.Module, density: float) -> None:
        """Down to a density."""
        held, norms, alive = self.keeper.held(module), {}, {}
        for path, count in self.groups.items():
            norms[path] = column_norms(weight_of(module, path).detach(), count)
            alive[path] = columns_of(held[name_of(path)], count)
        left = surviving(norms, alive, density, across=self.across)
        self.keeper.narrow(module, {name_of(path): as_mask(m, weight_of(module, path)) for path, m in left.items()})

    def finish(self, module: nn.Module) -> nn.Module:
        """Take the masks off."""
        return self.keeper.finish(module)


def name_of(path: str) -> str:
    """The name of a layer's weight."""
    return f"{path}.weight".lstrip(".")


def weight_of(module: nn.Module, path: str) -> Tensor:
    """A layer's weight."""
    layer: Any = layer_at(module, path)
    return layer.weight
