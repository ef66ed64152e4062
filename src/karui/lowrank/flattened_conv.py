"""Flattened convolutions: Jin, Dundar, Culurciello 2015, "Flattened Convolutional Neural Networks for Feedforward
Acceleration", ICLR workshop, arXiv 1412.5474 (survey 15).

Nothing is approximated: the network is trained from scratch with layers that are flat from the start. A convolution of
F filters becomes two cascaded sets of three convolutions in one dimension each: across channels (lateral, pointwise),
down (vertical, d x 1 on each map by itself), along (horizontal, 1 x d). Each filter of a set is an outer product of
three vectors. There is a bias after each of them and no non-linearity inside; the network's own comes after both sets.
One set alone loses accuracy; two make up for it, for two pointwise layers in place of d^2.

It pays for large kernels (5 x 5 and up) over many channels, in a network that is trained from scratch. It does not pay
for 3 x 3 kernels of few channels, nor for the first layer on raw pixels (they are left, as the layers that it would
make larger are). Six narrow layers in place of one read and write the map six times, and in ONNX Runtime those of one
dimension cost far more than their multiply-adds: measure it. The chain of linear factors is also harder to train than a
dense layer, and asks for an initialisation that keeps the variance and for care with the rate.

Paper -> here: `alpha`, `beta`, `gamma` -> the lateral, vertical and horizontal weights, `l` -> stages, `C`, `F` -> in
and out channels.

DEPARTURE: the paper pads by "full" mode so that the size stays; here the first set has the stride and padding of the
convolution that it replaces, and the later ones keep the size.

DEPARTURE: the lateral weights of the first set are drawn at gain 2, as a ReLU stops half of what it is given.

DEPARTURE: kernels in one and three dimensions get as many filters along one. Grouped convolutions keep their groups.

DEPARTURE: `draw=False` starts from a trained network instead, each filter at the nearest one of rank one.

Source: section 3 (the layer and why two sets).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from karui.errors import require
from karui.layers.flattened import FlattenedConv
from karui.lowrank._choice import Choice
from karui.lowrank._fresh import Offer, conversion_needs, convert, offers, require_conversion
from karui.lowrank._scan import Seen
from karui.model import Model
from karui.technique import Bench, Card, technique
from karui.technique.card import Need


@technique(
    Card(
        survey=15,
        slug="flattened_conv",
        title="Flattened Convolutional Neural Networks for Feedforward Acceleration",
        kind="replace",
        needs=("labels", "training"),
        reduces=("parameters", "macs", "bytes"),
        identity={"share": 0.0},
        quick={"stages": 1, "epochs": 1},
        arxiv="1412.5474",
        pays="kernels of 5x5 and more over many channels, in a network that is trained from scratch",
        costs="3x3 kernels over few channels; six narrow layers for one are bound by memory; harder to train",
    )
)
@dataclass(frozen=True, kw_only=True)
class Flattened:
    """Replace each convolution by sets of one-dimensional ones, and train the network from scratch.

    Settings:
        stages: sets of lateral, vertical and horizontal convolutions in place of one layer; the paper's is 2.
        share: share of the layers that are replaced, those that do most work first, in [0, 1].
        skip: paths of layers to leave.
        draw: whether all weights are drawn anew, as the paper trains from scratch; else each filter starts from the
            nearest one of rank one, and the other layers keep their weights.
        epochs: passes over the training data; 0 leaves the network untrained.

    Needs: labels and training data, unless `epochs` is 0.

    Raises:
        SettingError: a setting is out of range, or names no layer.
        NeedError: there is nothing to train on.

    Relations: `LowRankFilters` (21) puts filters along one dimension side by side and mixes the maps afterwards.

    Example:
        >>> import karui, torch
        >>> net = nn.Sequential(nn.Conv2d(32, 32, 5, padding=2), nn.ReLU(), nn.Conv2d(32, 32, 5, padding=2))
        >>> model = karui.Model(net, example=(torch.zeros(1, 32, 8, 8),))
        >>> Flattened(epochs=0).apply(model, karui.Bench()).parameters
        5760
    """

    stages: int = 2
    share: float = 1.0
    skip: tuple[str, ...] = ()
    draw: bool = True
    epochs: int = 30

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", tuple(self.skip))
        require(1 <= self.stages <= 8, f"stages is {self.stages}; give 1 to 8 sets, for example 2")
        require_conversion(self.share, self.epochs)

    def needs(self) -> tuple[Need, ...]:
        """Labels and training data, unless nothing is converted or trained."""
        return conversion_needs(self.share, self.epochs)

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The flattened network, trained."""
        assert model is not None  # noqa: S101  (the card's kind asks for one)
        if not self.share:
            return model
        made = self._offers(model, bench.seed)
        return convert(model, bench, made, "flattened convolution", draw=self.draw, epochs=self.epochs)

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
            return "a linear layer has no kernel in space"
        if all(taps == 1 for taps in layer.kernel_size):
            return "its kernel is a single position: it is lateral already"
        odd = all(step * (taps - 1) % 2 == 0 for taps, step in zip(layer.kernel_size, layer.dilation, strict=True))
        if layer.padding_mode != "zeros" and not odd:
            return f"its even kernel pads by '{layer.padding_mode}'; a second set could not keep the size so"
        return ""

    def _make(self, one: Seen) -> tuple[nn.Module, str]:
        conv = one.layer
        layer = FlattenedConv(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stages=self.stages,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            padding_mode=conv.padding_mode,
            gain=2.0,
        )
        form = f"{self.stages} set{'s' * (self.stages != 1)} of flat filters"
        if self.draw:
            return layer, form
        error = layer.fit(conv.weight.detach(), conv.bias)
        return layer, f"{form} (error of the start {error:.2f})"
