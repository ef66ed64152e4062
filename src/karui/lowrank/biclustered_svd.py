"""Biclusters by two SVDs: Denton, Zaremba, Bruna, LeCun, Fergus 2014, "Exploiting Linear Structure Within
Convolutional Networks for Efficient Evaluation", NIPS, arXiv 1404.0736 (survey 18), section 3.2.2.

Filters that are alike form groups, channels that are used alike form groups, all of equal size; and the kernel between
each two groups is cut by an SVD to few directions of its filters, what is left by another to few of its channels: down
to few maps, a convolution between few maps, up to the filters. Linear layers may get a truncated SVD.

It pays for convolutions with many channels; groups make each of the small convolutions cheap. It does not pay for
small networks, in which a group has a handful of channels (`Tucker2`, one group of all, loses less there), nor in
engines that are slow at grouped convolutions and at gathering channels: measure the time.

Paper -> here: `W` -> kernel, `G` -> in_groups, `H` -> out_groups, `K_1` -> rank of the channels, `K_2` -> rank of the
filters, `alpha_p` -> the weights of "maha", `Sigma` -> the covariance of "datacov".

DEPARTURE: an approximation of the weighted kernel, weighed back, is of low rank no more; so in the metrics "maha" and
"datacov" the factors of the SVDs descend in the metric by back-propagation, all at once.

DEPARTURE: "maha" takes the class that the network puts first as the right one, where the authors know the label.

DEPARTURE: linear layers are left unless `linear_share` says how much of them is kept; the paper cuts them all.

DEPARTURE: where groups do not part a layer evenly the next smaller number that does is taken, and said; one and three
dimensions of space are as two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from karui.errors import require
from karui.lowrank._above import layer_by_layer
from karui.lowrank._biclusters import (
    Fit,
    conv_objection,
    linear_build,
    linear_choice,
    pair_choice,
)
from karui.lowrank._choice import Choice
from karui.lowrank._common import require_data, require_fine_tuning, require_ranks
from karui.lowrank._metrics import metric_needs, require_metric
from karui.lowrank._per_layer import LARGE, Offering, PerLayer
from karui.lowrank._scan import Seen, scan
from karui.lowrank._watching import Shelf
from karui.numerics.biclusters import two_svds
from karui.technique import Bench, Card, technique

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique.card import Need

_SHARES = tuple(step / 20 for step in range(18, 0, -1))
"""Shares of both ranks that are tried for a candidate of a budget, falling."""


@technique(
    Card(
        survey=18,
        slug="biclustered_svd",
        title="Exploiting Linear Structure Within Convolutional Networks for Efficient Evaluation",
        kind="replace",
        reduces=("parameters", "macs", "bytes"),
        identity={"ratio_in": 1.0, "ratio_out": 1.0, "linear_share": 1.0},
        quick={"linear_share": 0.5},
        arxiv="1404.0736",
        pays="inner convolutions with many channels, whose groups have many too",
        costs="small networks; engines that are slow at grouped convolutions",
    )
)
@dataclass(frozen=True, kw_only=True)
class BiclusteredSvd(PerLayer, Offering):
    """Write every inner convolution as a grid of biclusters, each of low rank in channels and filters.

    The first convolution is left to `Monochromatic` unless `ranks` names it.

    Settings:
        in_groups: groups of input channels.
        out_groups: groups of filters.
        ratio_in: share of the channels of a group that is kept as its rank, in (0, 1].
        ratio_out: share of the filters of a group that is kept as its rank, in (0, 1].
        ranks: ranks of single layers, as (path, rank_in, rank_out); they go before the ratios. A linear layer takes the
            second for its SVD.
        linear_share: share of a linear layer's parameters that its truncated SVD keeps, in (0, 1]; 1 leaves it.
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

    Relations: `BiclusteredCp` has sums of outer products in each bicluster; `Tucker2` (12) is one bicluster.

    Example:
        >>> import karui, torch
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 5), nn.ReLU(), nn.Conv2d(16, 32, 5))
        >>> model = karui.Model(net, example=(torch.zeros(1, 3, 16, 16),))
        >>> light = BiclusteredSvd(ranks=(("2", 3, 4),)).apply(model, karui.Bench())
        >>> [tuple(part.weight.shape) for part in light.module[2].children()]
        [(12, 8, 1, 1), (16, 3, 5, 5), (32, 8, 1, 1)]
    """

    most: ClassVar[int] = LARGE

    in_groups: int = 2
    out_groups: int = 2
    ratio_in: float = 0.4
    ratio_out: float = 0.4
    ranks: tuple[tuple[str, int, int], ...] = ()
    linear_share: float = 1.0
    metric: str = "l2"
    images: int = 256
    positions: int = 20
    iterations: int = 50
    restarts: int = 10
    skip: tuple[str, ...] = ()
    epochs: int = 0
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple((path, inner, outer) for path, inner, outer in self.ranks))
        object.__setattr__(self, "skip", tuple(self.skip))
        for path, inner, outer in self.ranks:
            require(min(inner, outer) >= 1, f"ranks has {inner}, {outer} for '{path}'; give numbers from 1")
        for name in ("ratio_in", "ratio_out", "linear_share"):
            value = getattr(self, name)
            require(0 < value <= 1, f"{name} is {value}; give a share in (0, 1], for example 0.4")
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
        require_data("biclustered_svd", model, bench, self.epochs)

        def build(current: Model, one: Seen, choice: Choice) -> tuple[nn.Module, float, str]:
            return self._build(current, one, choice, bench)

        extra = {"metric": self.metric}
        settings: Any = {"epochs": self.epochs, "learning_rate": self.learning_rate}
        settings["shelf"] = Shelf.of(self, model, bench)
        seen = self._scan(model)[0]
        return layer_by_layer(
            model, bench, seen, self.choose(model), build, name="Biclusters, SVD", extra=extra, **settings
        )

    def _build(self, model: Model, one: Seen, choice: Choice, bench: Bench) -> tuple[nn.Module, float, str]:
        if isinstance(one.layer, nn.Linear):
            return linear_build(one, choice)
        return self._fit().build(model, one, bench, lambda blocks: two_svds(blocks, *choice.ranks))

    def alone(self, model: Model, one: Seen, speedup: float) -> tuple[BiclusteredSvd, Choice]:
        """For a budget: the settings that do this to one layer and nothing else, and what becomes of it."""
        del model
        bare = replace(self, ranks=(), linear_share=1.0, metric="l2", restarts=1, epochs=0)
        choices = [replace(bare, ratio_in=share, ratio_out=share).choice_for(one) for share in _SHARES]
        able = [choice for choice in choices if choice.replaced and choice.macs[0] >= speedup * choice.macs[1]]
        choice = able[0] if able else choices[-1]
        own: Any = ((one.path, *choice.ranks),) if choice.replaced and not isinstance(one.layer, nn.Linear) else ()
        return replace(bare, ratio_in=1.0, ratio_out=1.0, ranks=own), choice

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
        require_ranks([path for path, *_ in self.ranks], seen, left)
        return seen, left

    def choice_for(self, one: Seen) -> Choice:
        """Ranks by the setting; the layer is left if they would not save anything."""
        own = next(((inner, outer) for path, inner, outer in self.ranks if path == one.path), None)
        if isinstance(one.layer, nn.Linear):
            return linear_choice(one, self.linear_share, own and own[1])
        if own is None and one.first:
            return Choice(one.path, reason="the first convolution is left to 'monochromatic'; name it in ranks")
        groups = self._fit().groups_for(one)
        filters, channels = one.layer.weight.shape[:2]
        each, taps = (channels // groups[0], filters // groups[1]), math.prod(one.layer.kernel_size)
        inner, outer = own or (
            max(1, math.floor(share * number))
            for share, number in zip((self.ratio_in, self.ratio_out), each, strict=True)
        )
        # Neither rank can exceed what the other and space span.
        outer = min(outer, each[1], each[0] * taps)
        inner = min(inner, each[0], outer * taps)
        return pair_choice(one, groups, (inner, outer), (self.in_groups, self.out_groups))
