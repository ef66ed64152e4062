"""Low-rank filters trained from scratch: Ioannou, Robertson, Shotton, Cipolla, Criminisi 2016, "Training CNNs with
Low-Rank Filters for Efficient Image Classification", ICLR, arXiv 1511.06744 (survey 21).

Nothing trained is decomposed. A convolution of d x d filters becomes a composite layer: filters of 1 x d and of d x 1,
and perhaps a few of d x d, side by side on the same input, their maps concatenated. The next layer, or a pointwise one
of its own (the join), learns how to combine them, so that what they compute together are crosses and whole filters. The
ReLU comes after the last of these. All groups of filters start from one standard deviation, which keeps the variance of
the gradient, `sqrt(2 / sum_g w_g h_g d_g)`; He's rule for each group alone would multiply that variance by the number
of groups in every layer.

It pays where a network of wide 3 x 3 (or larger) convolutions is trained from scratch anyway. It does not pay to speed
up a network that is trained already (the decompositions start from its weights), for layers of few channels (the join
alone costs as much as they do), nor where the filters are small and the maps large: a 1 x 3 convolution moves as much
memory as a 3 x 3 one, and the concatenation is one more copy, so that time falls less than multiply-adds do. Nor is
the accuracy of the dense network sure: on 3,000 pictures of CIFAR-10 and 8 epochs joined filters had 53.9 % at half of
the multiply-adds, and the dense network 58.9 %; a quarter of full filters did not help (`results/low_rank_filters.md`).

Paper -> here: `d` -> the kernel's size, `w_g x h_g`, `d_g` -> kernel size and filters of a part; `lr` -> join=False,
`lr-join` -> the default, `lr-join-wfull` -> full=0.25, `lr-2x` -> filters=2 (under a join).

DEPARTURE: the rule of the initialisation and the names of the variants are those of secondary sources, and have not
been held against the paper's own text.

DEPARTURE: in a network that exists a layer must keep its number of outputs, so that twice the filters (`lr-2x`) come
with a join back to it. `CompositeConv` alone has no such limit.

DEPARTURE: under a join the composite layer is drawn at gain 1, since no ReLU stops its gradient there, and the join at
gain 2; the paper's rule is for a composite layer with a ReLU.

DEPARTURE: kernels in three dimensions get filters along each of them. Grouped convolutions keep their groups.

Source: sections 3 (the layers) and 4 (their initialisation).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from karui.errors import require
from karui.layers.composite import CompositeConv, low_rank_parts
from karui.lowrank._choice import Choice
from karui.lowrank._fresh import Offer, conversion_needs, convert, offers, require_conversion
from karui.lowrank._scan import Seen
from karui.model import Model
from karui.technique import Bench, Card, technique
from karui.technique.card import Need


@technique(
    Card(
        survey=21,
        slug="low_rank_filters",
        title="Training CNNs with Low-Rank Filters for Efficient Image Classification",
        kind="replace",
        needs=("labels", "training"),
        reduces=("parameters", "macs", "bytes"),
        identity={"share": 0.0},
        quick={"epochs": 1},
        arxiv="1511.06744",
        pays="wide convolutions of 3x3 or more in a network that is trained from scratch anyway",
        costs="networks trained already; few channels, where the join costs what the filters save; time falls less",
    )
)
@dataclass(frozen=True, kw_only=True)
class LowRankFilters:
    """Replace each convolution by filters along one dimension each, side by side, and train the network from scratch.

    Settings:
        join: whether a pointwise layer combines the filters; without it the next layer has to.
        filters: filters of a composite layer for each output of the old one; other than 1 under a join only.
        full: share of filters of the whole size, in [0, 1).
        point: share of filters of one position, in [0, 1).
        share: share of the layers that are replaced, those that do most work first, in [0, 1].
        skip: paths of layers to leave.
        draw: whether all weights are drawn anew, as the paper trains from scratch; else the other layers keep theirs.
        epochs: passes over the training data; 0 leaves the network untrained.

    Needs: labels and training data, unless `epochs` is 0.

    Raises:
        SettingError: a setting is out of range, or names no layer.
        NeedError: there is nothing to train on.

    Relations: papers 13 and 22 put filters along one dimension one after the other, and start from trained weights;
    paper 15 gives each filter one of its own along each dimension.

    Example:
        >>> import karui, torch
        >>> net = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
        >>> model = karui.Model(net, example=(torch.zeros(1, 32, 8, 8),))
        >>> light = LowRankFilters(epochs=0).apply(model, karui.Bench())
        >>> model.parameters, light.parameters
        (18496, 8256)
    """

    join: bool = True
    filters: float = 1.0
    full: float = 0.0
    point: float = 0.0
    share: float = 1.0
    skip: tuple[str, ...] = ()
    draw: bool = True
    epochs: int = 30

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", tuple(self.skip))
        require(0 < self.filters <= 16, f"filters is {self.filters}; give a factor in (0, 16], for example 1.0")
        kept = self.join or self.filters == 1
        require(kept, f"filters is {self.filters} without a join; a layer must keep its outputs: give join=True or 1.0")
        require(0 <= self.full < 1, f"full is {self.full}; give a share of the filters in [0, 1), for example 0.25")
        require(0 <= self.point < 1, f"point is {self.point}; give a share of the filters in [0, 1), for example 0.25")
        told = f"full and point are {self.full} and {self.point}; together they must leave a share below 1"
        require(self.full + self.point < 1, told)
        require_conversion(self.share, self.epochs)

    def needs(self) -> tuple[Need, ...]:
        """Labels and training data, unless nothing is converted or trained."""
        return conversion_needs(self.share, self.epochs)

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The converted network, trained."""
        assert model is not None  # noqa: S101  (the card's kind asks for one)
        if not self.share:
            return model
        return convert(
            model, bench, self._offers(model, bench.seed), "low-rank filters", draw=self.draw, epochs=self.epochs
        )

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What would be done with each layer, and why."""
        return tuple(choice.describe() for choice in self.choose(model))

    def choose(self, model: Model) -> tuple[Choice, ...]:
        """What takes the place of each layer, or the reason why it is left."""
        return tuple(offer.choice for offer in self._offers(model, 0)) if self.share else ()

    def _offers(self, model: Model, seed: int) -> tuple[Offer, ...]:
        return offers(model, self._objection, self._make, skip=self.skip, share=self.share, seed=seed)

    def _width(self, conv: Any) -> int:
        """Filters of the composite layer: whole groups of them."""
        return max(1, round(self.filters * conv.out_channels / conv.groups)) * conv.groups

    def _objection(self, layer: Any) -> str:
        if isinstance(layer, nn.Linear):
            return "a linear layer has no filters in space"
        axes = sum(taps > 1 for taps in layer.kernel_size)
        if axes < 2:
            return "its kernel extends along fewer than two dimensions: no filter is smaller"
        each, parts = self._width(layer) // layer.groups, self._parts(layer)
        if sum(sum(taps > 1 for taps in kernel) == 1 for kernel, _ in parts) < axes:
            beside = " beside full and single ones" if self.full or self.point else ""
            return f"{each} filter{'s' * (each != 1)} a group cannot be split between {axes} directions{beside}"
        return ""

    def _parts(self, conv: Any) -> list[tuple[tuple[int, ...], int]]:
        return low_rank_parts(conv.kernel_size, self._width(conv), full=self.full, point=self.point, groups=conv.groups)

    def _make(self, one: Seen) -> tuple[nn.Module, str]:
        conv = one.layer
        parts = self._parts(conv)
        layer = CompositeConv(
            conv.in_channels,
            parts,
            join=conv.out_channels if self.join else None,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
        )
        told = " + ".join(f"{filters} of {'x'.join(map(str, kernel))}" for kernel, filters in parts)
        return layer, f"filters {told}{', joined' if self.join else ''}"
