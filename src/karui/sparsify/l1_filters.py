"""L1 filter pruning (survey 62): Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient ConvNets", 2017.

The filters of smallest L1 norm are cut out of a trained network with their maps, their batch-norm entries and the
slices that the next layer reads them by; retraining recovers the accuracy. No data is needed to score. What is left is
an ordinary smaller network. It is faster where the widths that are left suit the engine: the CIFAR ResNets ran 1.4
times faster in ONNX Runtime at half of the filters and, for all their fewer multiplications, no faster at 30 %, where
widths were odd (`results/cifar_resnets.md`); `multiple=8` mends that.

It pays on wide convolutional networks with layers that no shortcut ties (VGG, the inner layers of residual blocks), at
ratios up to about a half. It does NOT pay where most channels are tied by shortcuts, where the network cannot be
retrained, or against random choice once retraining is long: see `random_channel_pruning` (69). Where a normalisation
follows a layer and no weight decay held its weights, their norm says little: the benchmark on the digits then finds L1
no better than chance (`results/l1_filter_pruning.json`).

Paper -> here: F_{i,j} -> `rows[j]`, s_j -> `scores[j]`, m -> `removed_count(size, ratio)`, independent or greedy
-> `greedy`, prune once or iteratively and retrain -> `iterative`, sensitivity -> `max_drop`, stage -> layers whose maps
have equal size.

DEPARTURE: the retraining uses the bench's optimiser and schedule, where the paper retrains at a constant 0.001; the
bench is how the user says how the network is trained.

DEPARTURE: units of linear layers and other layers are cut by the same rule (`linear=False` cuts convolutions only, as
the paper does).

DEPARTURE: a tied group without a projection shortcut has no rule of its own in the paper; with `tied=True` it is scored
by all the layers that write into it.

DEPARTURE: the paper reads sensitivity off plots; `max_drop` states the rule. A layer is steep when the smallest share
tried already costs more than that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from karui.errors import require
from karui.model import Note
from karui.technique import Candidate, Card, require_passes, technique
from karui.technique.pruning.criteria import L1
from karui.technique.pruning.plan import Candidates, candidates, remarks, shares
from karui.technique.pruning.schedule import cut_layer_by_layer, cut_once
from karui.technique.pruning.scope import Quota, Scope, layers_of, matches
from karui.technique.pruning.selection import ladder, weakest
from karui.technique.pruning.sensitivity import scan, stage_ratios

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique import Bench
    from karui.technique.card import Need


SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@technique(
    Card(
        survey=62,
        slug="l1_filter_pruning",
        title="Pruning Filters for Efficient ConvNets",
        kind="cut",
        needs=("labels", "training"),
        reduces=("parameters", "macs", "bytes"),
        identity={"ratio": 0.0},
        quick={"ratio": 0.5, "epochs": 1},
        arxiv="1608.08710",
        pays="On wide convolutional layers that no shortcut ties, up to about half of the filters, with retraining.",
        costs="Where shortcuts tie most channels or nothing can be retrained; with long retraining chance catches up. "
        "Odd widths: at 30 % the CIFAR ResNets ran no faster in ONNX Runtime, in multiples of 8 they did.",
    )
)
@dataclass(frozen=True, kw_only=True)
class L1Filters:
    """Remove the filters of smallest L1 norm from every coupled group that one layer makes, and retrain.

    Settings:
        ratio: share of the units cut in each group, in [0, 1); with max_drop, the largest share that is tried.
        ratios: shares of single layers by name or shell pattern ("layer3.*"), which ratio then does not touch.
        max_drop: how much worse the validation metric may be (0.02: two points of accuracy) when one layer alone is
            pruned; the shares then follow from a sensitivity scan, one for all layers of equal map size, and layers
            too sensitive for the smallest share are left whole. None scans nothing.
        skip: layers left whole, by name or shell pattern.
        tied: whether maps that several layers write into (at shortcuts) are cut too, scored by the projection's filters
            where the shortcut has one.
        linear: whether units of other layers than convolutions are cut too.
        greedy: whether a layer is scored without what it reads from filters that earlier layers lose.
        iterative: whether each layer is cut and retrained before the next one is scored.
        multiple: what is kept is a multiple of this many units, as engines like (8); 1 keeps the ratio exact.
        allow_normalisation: whether groups are cut that a normalisation across channels mixes.
        epochs: passes of retraining, after the cut or (iterative) after each layer's; 0 retrains nothing.

    Needs:
        Nothing to score. Labels and training data for retraining and for max_drop.

    Raises:
        SettingError: a share or multiple is out of range, or a layer that is named is not there or cannot be cut.
        SurgeryError: no group can be cut; single ones stay whole, told in the lineage.

    Relations: `RandomChannels` (69) is the control that any criterion must beat after equal retraining.

    Example:
        >>> import torch, karui
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 3))
        >>> model = karui.Model(net, example=(torch.zeros(1, 1, 8, 8),))
        >>> light = L1Filters(ratio=0.5, epochs=0).apply(model, karui.Bench())
        >>> light.module[0].weight.shape, light.module[2].weight.shape
        (torch.Size([4, 1, 3, 3]), torch.Size([2, 4, 3, 3]))
    """

    ratio: float = 0.3
    ratios: Mapping[str, float] = field(default_factory=dict, hash=False)
    max_drop: float | None = None
    skip: tuple[str, ...] = ()
    tied: bool = False
    linear: bool = True
    greedy: bool = False
    iterative: bool = False
    multiple: int = 1
    allow_normalisation: bool = False
    epochs: int = 20

    def __post_init__(self) -> None:
        Quota.of(self)
        require_passes(epochs=self.epochs)
        require(
            self.max_drop is None or self.max_drop >= 0, f"max_drop is {self.max_drop}; give 0 or more, such as 0.02"
        )
        require(
            not (self.greedy and self.iterative),
            "greedy and iterative exclude each other.",
            "Set one: an iterative cut has removed what greedy scoring would ignore.",
        )

    def needs(self) -> tuple[Need, ...]:
        """Labels and training data, unless nothing is cut, or the cut is neither scanned for nor retrained."""
        free = Quota.of(self).nothing or (self.epochs == 0 and self.max_drop is None)
        return () if free else ("labels", "training")

    def remarks(self, model: Model) -> tuple[str, ...]:
        """For `plan`: how much of each group is cut, and what is left whole and why."""
        told = remarks(model, Scope.of(self), Quota.of(self))
        if self.max_drop is None:
            return told
        return (*told, "With max_drop these are the most that is cut; the sensitivity scan decides.")

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The model with the weakest filters gone, retrained."""
        assert model is not None  # noqa: S101  (the card's kind asks for one)
        if Quota.of(self).nothing:
            return model
        found = candidates(model, Scope.of(self))
        asked = shares(found, Quota.of(self))
        if self.max_drop is not None:
            model, asked = self._planned(model, bench, found, asked)
        counts = Quota.of(self).counts(found.groups, asked)
        if not counts:
            return model
        if self.iterative:
            return cut_layer_by_layer(
                model, bench, L1, counts, label="l1", epochs=self.epochs, allow_normalisation=self.allow_normalisation
            )
        light = cut_once(
            model, bench, L1, counts, label="l1", greedy=self.greedy, allow_normalisation=self.allow_normalisation
        )
        return bench.fit(light, epochs=self.epochs, label="retrain") if self.epochs else light

    def candidates(self, model: Model, bench: Bench, *, multiple: int = 1) -> Iterator[Candidate]:
        """For a budget: each group, tied ones too, with fewer and fewer units."""
        found = candidates(model, replace(Scope.of(self), tied=True))
        scores = L1(model, found.groups, bench)
        for group in found.groups:
            for kept in ladder(group.size, multiple):
                gone = group.size - kept
                alone = replace(
                    self, ratio=0.0, ratios={group.name: gone / group.size}, tied=True, multiple=1, epochs=0
                )
                yield Candidate(
                    place=group.name,
                    technique=alone,
                    text=f"{kept} of {group.size} units kept",
                    cut={group.name: weakest(scores[group.name], gone)},
                )

    def _planned(
        self, model: Model, bench: Bench, found: Candidates, asked: Mapping[str, float]
    ) -> tuple[Model, dict[str, float]]:
        """The model with the scan in its lineage, and the shares that follow; a share named in `ratios` stays."""
        sensitivity = scan(model, bench, found.groups, L1, [share for share in SHARES if share <= self.ratio])
        stages = {group.name: found.sizes.get(layers_of(group)[0], ()) for group in found.groups}
        planned = stage_ratios(sensitivity, stages, self.max_drop or 0.0)
        full = found.analysis
        named = {g.name for g in found.groups if any(matches(full[g.name], key) for key in self.ratios)}
        chosen = {name: asked[name] if name in named else share for name, share in planned.items()}
        note = Note(
            f"l1: sensitivity scan, {sum(share > 0 for share in chosen.values())} of {len(chosen)} groups to be cut",
            {"max_drop": self.max_drop, "scan": sensitivity.to_json(), "ratios": chosen},
        )
        return model.evolve(model.module, note), chosen
