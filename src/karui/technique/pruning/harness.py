"""The control harness: criteria x seeds x ratios under one protocol, judged before and after fine-tuning.

A criterion that only looks better before fine-tuning has shown nothing (Mittal et al. 2018), so every table holds both,
and every criterion is given the same budget, epochs and data order, with several random draws beside it.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from scipy import stats

from karui.measuring import count
from karui.technique.pruning.plan import candidates, shares
from karui.technique.pruning.schedule import cut_layer_by_layer, cut_once
from karui.technique.pruning.scope import Quota, Scope

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique.bench import Bench
    from karui.technique.pruning.criteria import Criterion

When = Literal["before", "after"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One criterion at one ratio on one trained network, judged on the test split.

    Settings:
        criterion, draw: the criterion's name, and which of its draws.
        seed: of the trained network, and of the retraining.
        ratio: share of the units cut in every group.
        base, before, after: the metric of the whole network, of the cut one, and of the retrained one.
        parameters, macs: of the cut network.
    """

    criterion: str
    draw: int
    seed: int
    ratio: float
    base: float
    before: float
    after: float
    parameters: int
    macs: int


@dataclass(frozen=True)
class Trials:
    """A table of trials and what is read off it."""

    rows: tuple[Trial, ...]

    def values(self, criterion: str, ratio: float, when: When) -> list[float]:
        """The metric of every draw and seed."""
        return [getattr(row, when) for row in self.rows if (row.criterion, row.ratio) == (criterion, ratio)]

    def mean(self, criterion: str, ratio: float, when: When) -> float:
        """Mean over draws and seeds."""
        return statistics.fmean(self.values(criterion, ratio, when))

    def criteria(self) -> tuple[str, ...]:
        """The criteria's names, in the order given."""
        return tuple(dict.fromkeys(row.criterion for row in self.rows))

    def spread(self, ratio: float, when: When) -> float:
        """Largest minus smallest mean over the criteria."""
        means = [self.mean(name, ratio, when) for name in self.criteria()]
        return max(means) - min(means)

    def gap(self, ratio: float, when: When, control: str = "random") -> float:
        """The best criterion's mean minus the control's; negative where the control wins."""
        return max(self.mean(name, ratio, when) for name in self.criteria() if name != control) - self.mean(
            control, ratio, when
        )

    def summary(self) -> list[dict[str, Any]]:
        """Mean, its 95 % interval (half of it), and the number of trials, for each criterion and ratio."""
        ratios = dict.fromkeys(row.ratio for row in self.rows)
        return [
            {
                "criterion": name,
                "ratio": ratio,
                "trials": len(self.values(name, ratio, "after")),
                **{
                    f"{when}_{what}": read(self.values(name, ratio, when))
                    for when in ("before", "after")
                    for what, read in (("mean", statistics.fmean), ("half_interval", half_interval))
                },
            }
            for ratio in ratios
            for name in self.criteria()
        ]

    def to_json(self) -> dict[str, Any]:
        """As JSON values: the summary and every trial."""
        return {"summary": self.summary(), "trials": [dataclasses.asdict(row) for row in self.rows]}


def half_interval(values: Sequence[float]) -> float | None:
    """Half the 95 % interval of the mean (Student's t over the trials); None where there is one trial only.

    Example:
        >>> round(half_interval([0.9, 0.8]), 3)
        0.635
    """
    if len(values) < 2:
        return None
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def compare_criteria(
    models: Mapping[int, Model],
    bench: Bench,
    criteria: Mapping[str, Sequence[Criterion]],
    ratios: Sequence[float],
    *,
    epochs: int,
    layer_epochs: int = 0,
    scope: Scope | None = None,
    multiple: int = 1,
) -> Trials:
    """Every criterion and draw at every ratio on every trained network, under one protocol.

    Before: all groups cut at once, nothing retrained. After: with `layer_epochs`, layer by layer with that much
    training after each; then `epochs` of fine-tuning.

    Args:
        models: trained networks by their seed, which also seeds the retraining.
        bench: data and training, the same for all.
        criteria: the draws of each criterion by its name: one of a fixed criterion, several of chance.
        ratios: shares of the units cut in every group.
        epochs: passes over the training data at the end.
        layer_epochs: passes after each layer's cut; 0 cuts all layers at once.
        scope: which groups are cut; by default those that one layer makes.
        multiple: what is kept is a multiple of this many units.
    """
    scope = scope or Scope()
    rows = []
    for seed, model in models.items():
        seeded = replace(bench, seed=seed)
        base = seeded.evaluate(model, "test").value
        found = candidates(model, scope)
        for ratio, (name, draws) in product(ratios, criteria.items()):
            quota = Quota(ratio=ratio, multiple=multiple)
            counts = quota.counts(found.groups, shares(found, quota))
            for draw, criterion in enumerate(draws):
                cut = cut_once(model, seeded, criterion, counts, label=name)
                light = cut
                if layer_epochs:
                    light = cut_layer_by_layer(model, seeded, criterion, counts, label=name, epochs=layer_epochs)
                if epochs:
                    light = seeded.fit(light, epochs=epochs, label=f"{name} {ratio:g}, seed {seed}, draw {draw}")
                before, after = (seeded.evaluate(each, "test").value for each in (cut, light))
                told = {"criterion": name, "draw": draw, "seed": seed, "ratio": ratio}
                size = count(cut)
                rows.append(
                    Trial(**told, base=base, before=before, after=after, parameters=size.parameters, macs=size.macs)
                )
    return Trials(tuple(rows))
