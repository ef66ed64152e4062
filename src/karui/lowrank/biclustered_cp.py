"""Biclusters by outer products: Denton, Zaremba, Bruna, LeCun, Fergus 2014, "Exploiting Linear Structure Within
Convolutional Networks for Efficient Evaluation", NIPS, arXiv 1404.0736 (survey 18), section 3.2.2.

Filters that are alike form groups, channels that are used alike form groups, all of equal size; and the kernel between
each two groups is a tensor of three modes (filters, channels, positions), written as a sum of few outer products, found
one after another. Linear layers may get a truncated SVD.

It pays for inner convolutions with many channels and kernels of 5x5 or more, where a few spatial filters serve each
pair of groups. It does not pay for 3x3 kernels of small networks (one Tucker core or a split over space loses less at
as many multiply-adds), nor in engines that are slow at depthwise layers and at gathering channels: measure the time.

Paper -> here: `W` -> kernel, `G` -> in_groups, `H` -> out_groups, `K` -> rank, `alpha_p` -> the weights of "maha",
`Sigma` -> the covariance of "datacov".

DEPARTURE: an approximation of the weighted kernel, weighed back, is no sum of few outer products any more; so in the
metrics "maha" and "datacov" the greedy factors descend in the metric by back-propagation, all at once.

DEPARTURE: "maha" takes the class that the network puts first as the right one, where the authors know the label.

DEPARTURE: linear layers are left unless `linear_share` says how much of them is kept; the paper cuts them all.

DEPARTURE: the rank follows from the wanted speed-up, where the paper sets it by hand; where groups do not part a layer
evenly the next smaller number that does is taken, and said; one and three dimensions of space are as two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from karui.errors import SettingError, did_you_mean, require
from karui.lowrank._above import layer_by_layer
from karui.lowrank._biclusters import (
    Fit,
    conv_objection,
    linear_build,
    linear_choice,
    pair_choice,
    pair_cost,
)
from karui.lowrank._choice import Choice
from karui.lowrank._common import require_data, require_fine_tuning, require_ranks
from karui.lowrank._metrics import metric_needs, require_metric
from karui.lowrank._per_layer import Offering, PerLayer
from karui.lowrank._scan import Seen, scan
from karui.lowrank._watching import Shelf
from karui.numerics.biclusters import outer_products
from karui.technique import Bench, Card, technique

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique.card import Need

SOLVERS = ("greedy", "als")


@technique(
    Card(
        survey=18,
        slug="biclustered_cp",
        title="Exploiting Linear Structure Within Convolutional Networks for Efficient Evaluation",
        kind="replace",
        reduces=("parameters", "macs", "bytes"),
        identity={"speedup": 1.0, "linear_share": 1.0},
        quick={"speedup": 1.5, "linear_share": 0.5},
        arxiv="1404.0736",
        pays="inner convolutions with many channels and kernels of 5x5 or more",
        costs="3x3 kernels of small networks; engines that are slow at depthwise layers",
    )
)
@dataclass(frozen=True, kw_only=True)
class BiclusteredCp(PerLayer, Offering):
    """Write every inner convolution as a grid of biclusters, each a sum of outer products.

    The first convolution is left to `Monochromatic` unless `ranks` names it.

    Settings:
        in_groups: groups of input channels.
        out_groups: groups of filters.
        speedup: how many times fewer multiply-adds each layer shall do, from 1; its rank is the largest that holds it.
        ranks: outer products of single layers, as (path, rank) pairs; they go before `speedup`. Of a linear layer it is
            the rank of its SVD.
        linear_share: share of a linear layer's parameters that its truncated SVD keeps, in (0, 1]; 1 leaves it.
        solver: "greedy" (one outer product after another, the paper's) or "als" (all of a bicluster, in turns).
        metric: "l2", "maha" (weights that the loss is sensitive to count more) or "datacov" (responses count).
        images: calibration inputs of the two.
        positions: random positions of each that "datacov" looks at.
        iterations: most steps of descent in these metrics.
        restarts: random starts of the clusters.
        skip: paths of layers to leave.
        epochs: passes over the data after each layer, in which only the layers above it are trained.
        learning_rate: of these; None takes the bench's.

    Needs: nothing; calibration inputs for other metrics than "l2"; labels and a task if `epochs` is not 0.

    Raises:
        SettingError: a setting is out of range, or names no layer.
        NeedError: there are no calibration inputs, or nothing to train on.

    Relations: `BiclusteredSvd` has a dense core in each bicluster; `CpDecomposition` (17) writes the whole kernel as
    one sum, and takes space apart.

    Example:
        >>> import karui, torch
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 5), nn.ReLU(), nn.Conv2d(16, 32, 5))
        >>> model = karui.Model(net, example=(torch.zeros(1, 3, 16, 16),))
        >>> light = BiclusteredCp(ranks=(("2", 4),)).apply(model, karui.Bench())
        >>> [tuple(part.weight.shape) for part in light.module[2].children()]
        [(16, 8, 1, 1), (16, 1, 5, 5), (32, 8, 1, 1)]
    """

    ladder: ClassVar[tuple[float, ...]] = (4.0,)

    in_groups: int = 2
    out_groups: int = 2
    speedup: float = 2.0
    ranks: tuple[tuple[str, int], ...] = ()
    linear_share: float = 1.0
    solver: str = "greedy"
    metric: str = "l2"
    images: int = 256
    positions: int = 20
    iterations: int = 50
    restarts: int = 10
    skip: tuple[str, ...] = ()
    epochs: int = 0
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple((path, rank) for path, rank in self.ranks))
        object.__setattr__(self, "skip", tuple(self.skip))
        require(1 <= self.speedup < math.inf, f"speedup is {self.speedup}; give a number from 1, for example 2")
        for path, rank in self.ranks:
            require(rank >= 1, f"ranks has {rank} for '{path}'; give a number from 1")
        within = 0 < self.linear_share <= 1
        require(within, f"linear_share is {self.linear_share}; give a share in (0, 1], for example 0.5")
        if self.solver not in SOLVERS:
            did_you_mean(self.solver, list(SOLVERS), "solver", SettingError)
        require_metric(self.metric)
        for name in ("in_groups", "out_groups", "images", "positions", "restarts"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; give a number from 1")
        require(self.iterations >= 0, f"iterations is {self.iterations}; give 0 or more, for example 50")
        require_fine_tuning(self.epochs, self.learning_rate)

    def needs(self) -> tuple[Need, ...]:
        """What these settings need: the plain metric looks at kernels alone."""
        return metric_needs(self.metric)

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The model with its convolutions biclustered, the layers above trained if asked for."""
        assert model is not None  # noqa: S101  (the card's kind asks for one)
        require_data("biclustered_cp", model, bench, self.epochs)

        def build(current: Model, one: Seen, choice: Choice) -> tuple[nn.Module, float, str]:
            return self._build(current, one, choice, bench)

        extra = {"solver": self.solver, "metric": self.metric}
        settings: Any = {"epochs": self.epochs, "learning_rate": self.learning_rate}
        settings["shelf"] = Shelf.of(self, model, bench)
        seen = self._scan(model)[0]
        return layer_by_layer(
            model, bench, seen, self.choose(model), build, name="Biclusters, CP", extra=extra, **settings
        )

    def _build(self, model: Model, one: Seen, choice: Choice, bench: Bench) -> tuple[nn.Module, float, str]:
        if isinstance(one.layer, nn.Linear):
            return linear_build(one, choice)
        terms = choice.ranks[0]
        return self._fit().build(model, one, bench, lambda blocks: outer_products(blocks, terms, solver=self.solver))

    def alone(self, model: Model, one: Seen, speedup: float) -> tuple[BiclusteredCp, Choice]:
        """For a budget: the settings that do this to one layer and nothing else, and what becomes of it."""
        del model
        bare = replace(
            self, speedup=speedup, ranks=(), linear_share=1.0, metric="l2", solver="als", restarts=1, epochs=0
        )
        choice = bare.choice_for(one)
        return replace(bare, speedup=1.0, ranks=((one.path, *choice.ranks),) if choice.replaced else ()), choice

    def evidence(self, model: Model, one: Seen, bench: Bench) -> Model:
        """For a budget: the network that the layer is part of."""
        del one, bench
        return model

    def layer_for(self, one: Seen, choice: Choice, bench: Bench, evidence: Any) -> nn.Module:
        """For a budget: the biclusters of its kernel."""
        return self._build(evidence, one, choice, bench)[0]

    def _fit(self) -> Fit:
        return Fit(**{name: getattr(self, name) for name in Fit.__dataclass_fields__})

    def _scan(self, model: Model) -> tuple[tuple[Seen, ...], tuple[Choice, ...]]:
        seen, left = scan(model, conv_objection, self.skip)
        require_ranks([path for path, _ in self.ranks], seen, left)
        return seen, left

    def choice_for(self, one: Seen) -> Choice:
        """The largest rank that cuts the layer's multiply-adds by `speedup`, or its own."""
        own = dict(self.ranks).get(one.path)
        if isinstance(one.layer, nn.Linear):
            return linear_choice(one, self.linear_share, own)
        if own is None and one.first:
            return Choice(one.path, reason="the first convolution is left to 'monochromatic'; name it in ranks")
        if own is None and self.speedup == 1:
            return Choice(one.path, reason="speedup 1 asks for nothing")
        groups = self._fit().groups_for(one)
        dense = one.outputs * one.layer.weight.numel()
        room = math.floor(dense / self.speedup / pair_cost(one, groups, (1,))[1] + 1e-9)
        return pair_choice(one, groups, (own or max(1, room),), (self.in_groups, self.out_groups))
