"""Single intra-channel convolution: Wang, Liu, Foroosh 2016, "Design of Efficient Convolutional Layers using Single
Intra-channel Convolution, Topological Subdivisioning and Spatial Bottleneck Structure", arXiv 1608.04337 (survey 20).

A convolution is a filter for each channel and a projection across channels. A SIC layer has one filter a channel, a
pointwise projection, the input added to it, and a ReLU after the sum. A convolution that would need b filters a channel
becomes b SIC layers in sequence, each with one and with its own residual sum: as cheap as b side by side, and deeper.
All are trained from scratch.

It pays for wide stages of equal width: two layers do 2 (k^2 n + n^2) multiply-adds in place of k^2 n^2. It does not pay
for narrow layers, nor on trained networks (the decompositions start from their weights). Time falls less than the
multiply-adds: depthwise filters, sums and ReLUs are bound by memory; measure it.

It is not MobileNet's layer: nothing stands between the filter and the projection, and the input is added each time.

Paper -> here: `b` -> bases, `k` -> the kernel's size, `n` -> channels.

DEPARTURE: where batch normalisation goes is not told in the sources at hand; it stands after the projection, before
the sum.

DEPARTURE: the last layer of a sequence leaves out its ReLU, since the network that is converted has its own there
(after a batch normalisation of its own, or a residual sum).

DEPARTURE: where channels or the size of the map change there is nothing to add, and the first layer has no residual.
Grouped convolutions keep the groups in the projections.

Source: section 3.1 (the layer), table 1 (its cost).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from karui.errors import require
from karui.layers.sic import odd, sic_chain
from karui.lowrank._choice import Choice
from karui.lowrank._fresh import Offer, conversion_needs, convert, offers, require_conversion
from karui.lowrank._scan import Seen
from karui.model import Model
from karui.technique import Bench, Card, technique
from karui.technique.card import Need


@technique(
    Card(
        survey=20,
        slug="sic_layer",
        title=(
            "Design of Efficient Convolutional Layers using Single Intra-channel Convolution, Topological "
            'Subdivisioning and Spatial "Bottleneck" Structure'
        ),
        kind="replace",
        needs=("labels", "training"),
        reduces=("parameters", "macs", "bytes"),
        identity={"share": 0.0},
        quick={"bases": 1, "epochs": 1},
        arxiv="1608.04337",
        pays="wide stages of convolutions of equal width, in a network that is trained from scratch",
        costs="narrow layers, trained networks; time falls less, as depthwise filters and sums are bound by memory",
    )
)
@dataclass(frozen=True, kw_only=True)
class SicLayers:
    """Replace each convolution by depthwise filters and projections with residual sums, and train from scratch.

    Settings:
        bases: SIC layers in sequence in the place of one convolution.
        residual: whether the input of each is added; without, the paper's point is lost (to compare with).
        norm: whether each has batch normalisation.
        share: share of the layers that are replaced, those that do most work first, in [0, 1].
        skip: paths of layers to leave.
        draw: whether all weights are drawn anew, as the paper trains from scratch; else the other layers keep theirs.
        epochs: passes over the training data; 0 leaves the network untrained.

    Needs: labels and training data, unless `epochs` is 0.

    Raises:
        SettingError: a setting is out of range, or names no layer.
        NeedError: there is nothing to train on.

    Relations: `Topological` makes the projections local; `SpatialBottleneck` projects at low resolution;
    `MobileNetConvert` (4) has a ReLU between filter and projection and no sum.

    Example:
        >>> import karui, torch
        >>> net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        >>> model = karui.Model(net, example=(torch.zeros(1, 64, 8, 8),))
        >>> SicLayers(epochs=0).remarks(model)[0]
        '0: 2 SIC layers, 36,864 -> 9,600 parameters'
    """

    bases: int = 2
    residual: bool = True
    norm: bool = True
    share: float = 1.0
    skip: tuple[str, ...] = ()
    draw: bool = True
    epochs: int = 30

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", tuple(self.skip))
        require(1 <= self.bases <= 16, f"bases is {self.bases}; give 1 to 16 layers, for example 2")
        require_conversion(self.share, self.epochs)

    def needs(self) -> tuple[Need, ...]:
        """Labels and training data, unless nothing is converted or trained."""
        return conversion_needs(self.share, self.epochs)

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The converted network, trained."""
        assert model is not None  # noqa: S101  (the card's kind asks for one)
        if not self.share:
            return model
        made = self._offers(model, bench.seed)
        return convert(model, bench, made, "SIC layers", draw=self.draw, epochs=self.epochs)

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What would be done with each layer, and why."""
        return tuple(choice.describe() for choice in self.choose(model))

    def choose(self, model: Model) -> tuple[Choice, ...]:
        """What takes the place of each layer, or the reason why it is left."""
        return tuple(offer.choice for offer in self._offers(model, 0)) if self.share else ()

    def _offers(self, model: Model, seed: int) -> tuple[Offer, ...]:
        return offers(model, self._objection, self._make, skip=self.skip, share=self.share, seed=seed)

    def _objection(self, layer: Any) -> str:
        if isinstance(layer, nn.Linear):
            return "a linear layer has no filters in space"
        if all(taps == 1 for taps in layer.kernel_size):
            return "its kernel is a single position: it is a projection already"
        if self.bases > 1 and not odd(layer):
            return "its kernel is even: a second layer could not keep the size of the map"
        return ""

    def _make(self, one: Seen) -> tuple[nn.Module, str]:
        layer = sic_chain(one.layer, self.bases, residual=self.residual, norm=self.norm)
        return layer, f"{self.bases} SIC layer{'s' * (self.bases != 1)}"
