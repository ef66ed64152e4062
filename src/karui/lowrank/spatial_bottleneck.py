"""Spatial bottleneck: Wang, Liu, Foroosh 2016, "Design of Efficient Convolutional Layers using Single Intra-channel
Convolution, Topological Subdivisioning and Spatial Bottleneck Structure", arXiv 1608.04337 (survey 20).

The costly part of a layer, the projection across channels, is done at low resolution: a depthwise convolution of kernel
and stride k shrinks the map, the projection mixes the channels, a depthwise transposed convolution of kernel and stride
k grows the map again, and the input is added. The residual sum carries the detail that the bottleneck loses. All are
trained from scratch.

It pays for wide layers on large maps: n (2 + n / k^2) multiply-adds at a position against k^2 n^2. It does not pay on
small maps, where there is little to shrink, nor for narrow layers. Patches do not overlap: only the other layers of the
network carry anything across their borders, so that a stage should keep some of its standard or SIC layers (`skip`,
`share`). Time falls less than the multiply-adds, as transposed depthwise convolutions are slow in most engines.

Paper -> here: `k` -> stride, `n` -> channels, `b` -> bases.

DEPARTURE: where k does not divide a side of the map, zeros are added after its end and cut off again.

DEPARTURE: batch normalisation stands after the projection, at low resolution, where an engine folds it in; the last
layer's ReLU is the network's own, as in `SicLayers`.

DEPARTURE: only layers that keep width and size are replaced, since elsewhere there is no residual sum to keep the
detail; `changing=True` replaces those that change the width, too.

Source: section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from karui.errors import require
from karui.layers.sic import keeps_size
from karui.layers.spatial_bottleneck import BottleneckConv
from karui.lowrank._choice import Choice
from karui.lowrank._fresh import Offer, conversion_needs, convert, offers, require_conversion
from karui.lowrank._scan import Seen
from karui.model import Model
from karui.technique import Bench, Card, technique
from karui.technique.card import Need


@technique(
    Card(
        survey=20,
        slug="spatial_bottleneck",
        title=(
            "Design of Efficient Convolutional Layers using Single Intra-channel Convolution, Topological "
            'Subdivisioning and Spatial "Bottleneck" Structure'
        ),
        kind="replace",
        needs=("labels", "training"),
        reduces=("parameters", "macs", "bytes"),
        identity={"share": 0.0},
        quick={"changing": True, "epochs": 1},
        arxiv="1608.04337",
        pays="wide layers on large maps, between layers that carry information across the patches",
        costs="small maps and narrow layers; transposed depthwise convolutions are slow in most engines",
    )
)
@dataclass(frozen=True, kw_only=True)
class SpatialBottleneck:
    """Replace convolutions that keep width and size by ones that project at low resolution; train from scratch.

    Settings:
        bases: bottlenecks in sequence in the place of one convolution.
        stride: k, by which each side of the map shrinks; kernel and stride of the depthwise layers.
        changing: whether layers that change the width are replaced too, without a residual sum in the first bottleneck:
            what is finer than k is lost there.
        share: share of the layers that are replaced, those that do most work first, in [0, 1].
        skip: paths of layers to leave.
        draw: whether all weights are drawn anew, as the paper trains from scratch; else the other layers keep theirs.
        epochs: passes over the training data; 0 leaves the network untrained.

    Needs: labels and training data, unless `epochs` is 0.

    Raises:
        SettingError: a setting is out of range, or names no layer.
        NeedError: there is nothing to train on.

    Relations: `SicLayers` projects at full resolution.

    Example:
        >>> import karui, torch
        >>> net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        >>> model = karui.Model(net, example=(torch.zeros(1, 64, 8, 8),))
        >>> SpatialBottleneck(epochs=0).remarks(model)[0]
        '0: 1 bottleneck of stride 2, 36,864 -> 4,736 parameters'
    """

    bases: int = 1
    stride: int = 2
    changing: bool = False
    share: float = 1.0
    skip: tuple[str, ...] = ()
    draw: bool = True
    epochs: int = 30

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", tuple(self.skip))
        require(1 <= self.bases <= 16, f"bases is {self.bases}; give 1 to 16 layers, for example 1")
        require(2 <= self.stride <= 64, f"stride is {self.stride}; give 2 to 64, for example 2")
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
        return convert(model, bench, made, "spatial bottlenecks", draw=self.draw, epochs=self.epochs)

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
            return "a linear layer has no map to shrink"
        if layer.in_channels != layer.out_channels and not self.changing:
            return f"its width changes ({layer.in_channels} to {layer.out_channels}): there is no residual sum"
        if layer.groups != 1:
            return f"it has {layer.groups} groups of channels: its projection is cheap already"
        return "" if keeps_size(layer) else "it changes the size of the map: there is no residual sum"

    def _make(self, one: Seen) -> tuple[nn.Module, str]:
        conv = one.layer
        layers = [
            BottleneckConv(
                conv.out_channels if number else conv.in_channels,
                conv.out_channels,
                self.stride,
                dimensions=len(conv.kernel_size),
                activation=number < self.bases - 1,
            )
            for number in range(self.bases)
        ]
        return nn.Sequential(*layers), f"{self.bases} bottleneck{'s' * (self.bases != 1)} of stride {self.stride}"
