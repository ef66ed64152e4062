"""What prunings of single weights share: which of them survive a round, all rounds in one training, the scan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from karui.errors import SettingError, did_you_mean
from karui.measuring.inference import watch_example
from karui.numerics.selection import keep_above, keep_largest, keep_largest_overall
from karui.technique.pruning.sensitivity import Sensitivity
from karui.train import Influence, Moment
from karui.train.masks import MaskKeeper, Masks, connections, meant, zero_pruned

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique import Bench

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Shares of a layer's weights that the sensitivity scan removes."""


def sensitivity(
    model: Model, bench: Bench, *, skip: tuple[str, ...] = (), shares: tuple[float, ...] = SHARES
) -> Sensitivity:
    """The validation metric with a share of one layer's smallest weights removed, each layer alone, no retraining."""
    from rich.progress import track

    base, working = bench.evaluate(model), model.copy()
    curves = {}
    weights = connections(working.module, skip)
    for name, weight in track(weights.items(), "sensitivity", disable=not bench.progress):
        own, values = weight.detach().clone(), []
        for share in shares:
            alive = torch.ones_like(own, dtype=torch.bool)
            mask = keep_largest(own.abs(), alive, round((1 - share) * own.numel()))
            zero_pruned(working.module, {name: mask})
            values.append(bench.evaluate(working).value)
            weight.data.copy_(own)
        curves[name] = tuple(values)
    return Sensitivity(base=base.value, higher_is_better=base.higher_is_better, ratios=shares, curves=curves)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which weights survive a round.

    Settings:
        keep: share of all weights that survive the last round.
        keeps: shares of single layers, by parameter name.
        quality: q of the threshold q * std, which then decides alone; None goes by shares.
        qualities: q of single layers.
        across: whether weights are ranked over all layers.
    """

    keep: float
    keeps: Mapping[str, float] = field(default_factory=dict)
    quality: float | None = None
    qualities: Mapping[str, float] = field(default_factory=dict)
    across: bool = True

    def masks(self, module: nn.Module, alive: Masks, progress: float) -> dict[str, Bool[Tensor, "..."]]:
        """The masks of a round, within those alive.

        Args:
            module: holds the weights.
            alive: the masks so far, of the layers that are pruned in this round.
            progress: the share of the rounds that is then done: shares fall by the same factor in each round.
        """
        weights = {name: module.get_parameter(name).detach() for name in alive}
        if self.quality is not None:
            return {
                name: keep_above(weight, alive[name], self.qualities.get(name, self.quality))
                for name, weight in weights.items()
            }
        scores = {name: weight.abs() for name, weight in weights.items()}
        own = {name: self.keeps[name] for name in weights if name in self.keeps}
        ranked = {name: score for name, score in scores.items() if name not in own}
        if not self.across:
            own |= dict.fromkeys(ranked, self.keep)
            ranked = {}
        masks = {
            name: keep_largest(scores[name], alive[name], _count([scores[name]], share, progress))
            for name, share in own.items()
        }
        if ranked:
            count = _count(list(ranked.values()), self.keep, progress)
            masks |= keep_largest_overall(ranked, {name: alive[name] for name in ranked}, count)
        return masks


def _count(tensors: list[Tensor], keep: float, progress: float) -> int:
    return max(1, round(sum(tensor.numel() for tensor in tensors) * keep**progress))


@dataclass(frozen=True, eq=False, kw_only=True)
class Gradual(Influence):
    """All rounds within one training: the first at its start, the others at equal distances.

    Settings:
        keeper: holds the masks.
        selection: what survives.
        rounds: number of rounds.
    """

    keeper: MaskKeeper
    selection: Selection
    rounds: int

    def attach(self, module: nn.Module) -> None:
        """Prune the first round."""
        self.keeper.attach(module)
        self._prune(module, 1)

    def constraints(self, module: nn.Module, moment: Moment) -> None:
        """Prune the next round when its step comes; keep what is pruned at zero."""
        done = moment.step + 1
        for number in range(2, self.rounds + 1):
            if done == round(moment.steps * (number - 1) / self.rounds):
                self._prune(module, number)
        self.keeper.constraints(module, moment)

    def finish(self, module: nn.Module) -> nn.Module:
        """Take the masks off."""
        return self.keeper.finish(module)

    def _prune(self, module: nn.Module, number: int) -> None:
        masks = self.selection.masks(module, self.keeper.held(module), number / self.rounds)
        self.keeper.narrow(module, masks)


def by_name(values: Mapping[str, float], weights: list[str], setting: str) -> dict[str, float]:
    """Settings of single layers by parameter name; of several patterns that match, the first counts."""
    for pattern in values:
        if not any(meant(name, [pattern]) for name in weights):
            layers = [name.rpartition(".")[0] for name in weights]
            did_you_mean(pattern, layers, f"The layer that {setting} names", SettingError)
    matched = {name: [value for pattern, value in values.items() if meant(name, [pattern])] for name in weights}
    return {name: found[0] for name, found in matched.items() if found}


def computing_order(model: Model, paths: Iterable[str]) -> list[str]:
    """The layers at these paths in the order in which the network computes; one that is called twice comes twice."""
    order: list[str] = []
    watch_example(model, {path: lambda *_, path=path: order.append(path) for path in paths})
    return order
