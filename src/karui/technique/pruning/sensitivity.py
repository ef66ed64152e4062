"""The sensitivity scan: what it costs to prune each layer alone, and the plan that follows (Li et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from karui.errors import NeedError, require
from karui.technique.pruning.masking import silenced
from karui.technique.pruning.selection import removed_count, weakest

if TYPE_CHECKING:
    from karui.model import Group, Model
    from karui.technique.bench import Bench
    from karui.technique.pruning.criteria import Criterion


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The metric of the whole network and, for each group, with a share of that group alone silenced; no retraining.

    Settings:
        base: the metric of the whole network, on the validation split.
        higher_is_better: whether a larger metric is better.
        ratios: the shares that were tried, ascending.
        curves: the metric at each share, by group.
    """

    base: float
    higher_is_better: bool
    ratios: tuple[float, ...]
    curves: Mapping[str, tuple[float, ...]]

    def losses(self, group: str) -> tuple[float, ...]:
        """How much worse the metric is at each share."""
        sign = 1 if self.higher_is_better else -1
        return tuple(sign * (self.base - value) for value in self.curves[group])

    def bearable(self, group: str, max_drop: float) -> float:
        """The largest share up to which no share costs more than `max_drop`; 0 for a steep layer."""
        share = 0.0
        for ratio, loss in zip(self.ratios, self.losses(group), strict=True):
            if loss > max_drop:
                break
            share = ratio
        return share

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "base": self.base,
            "higher_is_better": self.higher_is_better,
            "ratios": list(self.ratios),
            "curves": {name: list(values) for name, values in self.curves.items()},
        }


def scan(
    model: Model, bench: Bench, groups: Sequence[Group], criterion: Criterion, ratios: Sequence[float]
) -> Sensitivity:
    """Silence a share of each group alone, and judge on the validation split without retraining.

    The masked network computes what the cut one does, so nothing is cut here.

    Raises:
        NeedError: there is no labelled validation data.
    """
    from rich.progress import track

    require(
        model.task is not None and bench.validation is not None,
        "The sensitivity scan needs labels.",
        _REMEDY,
        NeedError,
    )
    scores = criterion(model, groups, bench)
    base, working = bench.evaluate(model), model.copy()
    curves = {}
    for group in track(groups, "sensitivity", disable=not bench.progress):
        values = []
        for ratio in ratios:
            units = weakest(scores[group.name], removed_count(group.size, ratio))
            with silenced(working.module, group, units):
                values.append(bench.evaluate(working).value)
        curves[group.name] = tuple(values)
    return Sensitivity(base=base.value, higher_is_better=base.higher_is_better, ratios=tuple(ratios), curves=curves)


_REMEDY = "Give Bench(train=...) with labels and a model with a task, or name the ratios yourself."


def stage_ratios(sensitivity: Sensitivity, stages: Mapping[str, Any], max_drop: float) -> dict[str, float]:
    """One share for all layers of a stage: what its most sensitive layer bears, steep layers left whole.

    Args:
        sensitivity: the scan.
        stages: the stage of each group; groups of equal value share a ratio.
        max_drop: how much worse the metric may be when one layer alone is pruned; a layer that costs more at the
            smallest share tried is steep.
    """
    bearable = {name: sensitivity.bearable(name, max_drop) for name in sensitivity.curves}
    weakest_of: dict[Any, float] = {}
    for name, share in bearable.items():
        if share > 0:
            weakest_of[stages[name]] = min(share, weakest_of.get(stages[name], share))
    return {name: weakest_of[stages[name]] if share > 0 else 0.0 for name, share in bearable.items()}
