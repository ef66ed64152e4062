"""Topological subdivisioning: Wang, Liu, Foroosh 2016, "Design of Efficient Convolutional Layers using Single
Intra-channel Convolution, Topological Subdivisioning and Spatial Bottleneck Structure", arXiv 1608.04337 (survey 20).

The channels of a layer are arranged on a torus, and an output channel is connected to the input channels in a box next
to it only, the same box for all: n prod(c_i) weights in place of n^2. Unlike the parts of a grouped convolution the
boxes overlap, so that after a few layers all channels have met. It takes the place of the dense projection in SIC
layers, and of pointwise convolutions; all are trained from scratch.

It pays in bytes and multiply-adds, where many layers of equal width follow one another. It does not pay in time: no
engine has such a layer. Here the box of each output is gathered and multiplied by a grouped convolution, which moves
prod(c_i) times the map: with eight times fewer multiply-adds than the dense network's its network was 1.9 times faster
at batch size 1 and no faster at 64, that of SIC layers with dense projections 4.3 and 5.0 times, and that of grouped
ones with as many weights 5.4 and 6.6 times, at no lower accuracy (`results/efficient_layers.md`).

Paper -> here: `d_1 x ... x d_s` -> lattice, `c_1 x ... x c_s` -> window, `s` -> sides, `b` -> bases.

DEPARTURE: batch normalisation and the last layer's ReLU are as in `SicLayers`.

DEPARTURE: layers whose input and output differ in width have no common torus; they are left, as the paper's nets have
standard layers between stages.

Source: section 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from karui.errors import require
from karui.layers.sic import keeps_size, odd, sic_chain
from karui.layers.topological import TopologicalPointwise, square_lattice
from karui.lowrank._choice import Choice
from karui.lowrank._fresh import Offer, conversion_needs, convert, offers, require_conversion
from karui.lowrank._scan import Seen
from karui.model import Model
from karui.technique import Bench, Card, technique
from karui.technique.card import Need


@technique(
    Card(
        survey=20,
        slug="topological_conv",
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
        pays="in bytes and multiply-adds, where many layers of equal width follow one another",
        costs="time: no engine has such a layer, and gathering its inputs often takes longer than the dense projection",
    )
)
@dataclass(frozen=True, kw_only=True)
class Topological:
    """Replace convolutions of equal width by SIC layers whose projections are local on a torus; train from scratch.

    Settings:
        bases: SIC layers in sequence in the place of one convolution.
        sides: dimensions s of the torus; each layer's channels are arranged as evenly as can be.
        reach: share of each side of the torus that an output sees, rounded up, in (0, 1].
        lattice: sides of the torus for layers of that many channels, instead; the others are left.
        window: sides of the box, instead of `reach`.
        share: share of the layers that are replaced, those that do most work first, in [0, 1].
        skip: paths of layers to leave.
        draw: whether all weights are drawn anew, as the paper trains from scratch; else the other layers keep theirs.
        epochs: passes over the training data; 0 leaves the network untrained.

    Needs: labels and training data, unless `epochs` is 0.

    Raises:
        SettingError: a setting is out of range, or names no layer.
        NeedError: there is nothing to train on.

    Relations: `SicLayers` has dense projections.

    Example:
        >>> import karui, torch
        >>> net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        >>> model = karui.Model(net, example=(torch.zeros(1, 64, 8, 8),))
        >>> Topological(epochs=0).remarks(model)[0]
        '0: 2 SIC layers, box 4x4 on torus 8x8, 36,864 -> 3,456 parameters'
    """

    bases: int = 2
    sides: int = 2
    reach: float = 0.5
    lattice: tuple[int, ...] = ()
    window: tuple[int, ...] = ()
    share: float = 1.0
    skip: tuple[str, ...] = ()
    draw: bool = True
    epochs: int = 30

    def __post_init__(self) -> None:
        for name in ("skip", "lattice", "window"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        require(1 <= self.bases <= 16, f"bases is {self.bases}; give 1 to 16 layers, for example 2")
        require(1 <= self.sides <= 6, f"sides is {self.sides}; give 1 to 6, for example 2")
        require(0 < self.reach <= 1, f"reach is {self.reach}; give a share of each side in (0, 1], for example 0.5")
        for name in ("lattice", "window"):
            value = getattr(self, name)
            require(all(side >= 1 for side in value), f"{name} is {value}; give sides from 1, for example (8, 8)")
        torus = len(self.lattice) or self.sides
        fits = len(self.window) in (0, torus)
        require(fits, f"window is {self.window} on a torus of {torus} sides; give {torus} sides, or none for `reach`")
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
        return convert(model, bench, made, "topological convolution", draw=self.draw, epochs=self.epochs)

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What would be done with each layer, and why."""
        return tuple(choice.describe() for choice in self.choose(model))

    def choose(self, model: Model) -> tuple[Choice, ...]:
        """What takes the place of each layer, or the reason why it is left."""
        return tuple(offer.choice for offer in self._offers(model, 0)) if self.share else ()

    def _offers(self, model: Model, seed: int) -> tuple[Offer, ...]:
        return offers(model, self._objection, self._make, skip=self.skip, share=self.share, seed=seed)

    def _torus(self, channels: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Lattice and window for so many channels."""
        lattice = self.lattice or square_lattice(channels, self.sides)
        box = self.window or tuple(math.ceil(self.reach * side - 1e-9) for side in lattice)
        return lattice, tuple(min(c, d) for c, d in zip(box, lattice, strict=True))

    def _objection(self, layer: Any) -> str:
        if isinstance(layer, nn.Linear):
            return "a linear layer has no channels"
        if layer.in_channels != layer.out_channels:
            return f"its {layer.in_channels} inputs and {layer.out_channels} outputs have no common torus"
        if layer.groups != 1:
            return f"it has {layer.groups} groups of channels already"
        return self._objection_to_shape(layer)

    def _objection_to_shape(self, layer: Any) -> str:
        if self.lattice and math.prod(self.lattice) != layer.in_channels:
            return f"lattice {'x'.join(map(str, self.lattice))} does not hold its {layer.in_channels} channels"
        if all(taps == 1 for taps in layer.kernel_size):
            return "" if keeps_size(layer) else "it is a projection that changes the size of the map"
        if self.bases > 1 and not odd(layer):
            return "its kernel is even: a second layer could not keep the size of the map"
        return ""

    def _make(self, one: Seen) -> tuple[nn.Module, str]:
        conv = one.layer
        lattice, window = self._torus(conv.in_channels)
        told = f"box {'x'.join(map(str, window))} on torus {'x'.join(map(str, lattice))}"
        if all(taps == 1 for taps in conv.kernel_size):
            dimensions = len(conv.kernel_size)
            layer = TopologicalPointwise(lattice, window, dimensions=dimensions, bias=conv.bias is not None)
            return layer, f"a projection, {told}"
        layer = sic_chain(conv, self.bases, lattice=lattice, window=window)
        return layer, f"{self.bases} SIC layer{'s' * (self.bases != 1)}, {told}"
