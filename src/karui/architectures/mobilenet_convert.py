"""MobileNet's layer put into a network that exists (survey 4): each k x k convolution becomes a separable one.

A dense convolution with M inputs and N outputs on a map of F pixels does k^2 M N F multiply-accumulates; the depthwise
convolution, batch normalisation, ReLU and pointwise convolution in its place do k^2 M F + M N F, a share of
1/N + 1/k^2 (section 3.1). The new layers have the old one's stride, padding and dilation and start from random weights,
so the network must be trained again.

Pays for networks that are wide and can be trained afresh. Does not pay where training is short: the low-rank
techniques start from the trained weights instead. Time falls less than the counts; measure it.

Paper -> here: M -> in_channels, N -> out_channels, D_K -> kernel_size.

DEPARTURE: the paper builds networks and converts none. The batch normalisation and ReLU that end its layer are not
added: the network has its own there, and a residual sum would not bear another.

DEPARTURE: convolutions with fewer than `min_inputs` input channels stay, as MobileNet's own first layer is dense.

Source: arXiv 1704.04861, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from karui.errors import SettingError, SurgeryError, require
from karui.layers.separable import Separable2d
from karui.measuring import count
from karui.model import Model, layer_at, replace_layers
from karui.technique import Bench, Card, require_passes, technique
from karui.technique.card import Need


def is_convertible(layer: nn.Module, min_inputs: int) -> bool:
    """Whether a layer is a dense spatial convolution for which a separable one does less work.

    Example:
        >>> is_convertible(nn.Conv2d(16, 32, 3), 8), is_convertible(nn.Conv2d(16, 32, 1), 8)
        (True, False)
    """
    if type(layer) is not nn.Conv2d or layer.groups != 1 or layer.padding_mode != "zeros":
        return False
    area = layer.kernel_size[0] * layer.kernel_size[1]
    saves = area + layer.out_channels < area * layer.out_channels
    return area > 1 and layer.in_channels >= min_inputs and saves


def separable_like(conv: nn.Conv2d) -> Separable2d:
    """A separable layer of the same shape, with random weights; see the module's text for what is left out of it."""
    return Separable2d(
        conv.in_channels,
        conv.out_channels,
        cast("tuple[int, int]", conv.kernel_size),
        stride=cast("tuple[int, int]", conv.stride),
        padding=cast("tuple[int, int] | str", conv.padding),
        dilation=cast("tuple[int, int]", conv.dilation),
        bias=conv.bias is not None,
        norm=False,
        activation=False,
    )


@technique(
    Card(
        survey=4,
        slug="mobilenet_convert",
        title="MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications",
        arxiv="1704.04861",
        kind="replace",
        needs=("labels", "training"),
        reduces=("parameters", "macs", "bytes"),
        identity={"share": 0.0},
        quick={"epochs": 1},
        pays="for wide networks of dense convolutions that can be trained afresh",
        costs="the new layers start from random weights; time falls less than the counts",
    )
)
@dataclass(frozen=True, kw_only=True)
class MobileNetConvert:
    """Replace the spatial convolutions of a network by depthwise-separable ones, and train it.

    Settings:
        share: share of the convertible layers that are converted, those that do most work first, in [0, 1].
        min_inputs: convolutions with fewer input channels stay as they are.
        skip: paths of layers that stay as they are.
        epochs: passes over the training data afterwards.

    Raises:
        SettingError: a setting is out of range.
        SurgeryError: there is no convolution to convert.

    Relations: `MobileNet` builds a network of such layers; the techniques of `karui.lowrank` replace a convolution by
    factors that start from its weights.

    Example:
        >>> MobileNetConvert(share=0.5).share
        0.5
    """

    share: float = 1.0
    min_inputs: int = 8
    skip: tuple[str, ...] = ()
    epochs: int = 30

    def __post_init__(self) -> None:
        require(0 <= self.share <= 1, f"share is {self.share}; give a share in [0, 1]", "", SettingError)
        require(self.min_inputs >= 1, f"min_inputs is {self.min_inputs}; give 1 or more channels", "", SettingError)
        require_passes(epochs=self.epochs)

    def needs(self) -> tuple[Need, ...]:
        """Labels and training data, unless nothing is converted or trained."""
        return ("labels", "training") if self.share and self.epochs else ()

    def remarks(self, model: Model) -> tuple[str, ...]:
        """For `plan`: which layers are converted."""
        paths = self.choose(model) if self.share else []
        return (f"Made depthwise-separable: {', '.join(paths) or 'nothing'}.",)

    def apply(self, model: Model, bench: Bench) -> Model:
        """The converted network, trained."""
        if self.share == 0:
            return model
        paths = self.choose(model)
        convs = {path: cast("nn.Conv2d", layer_at(model.module, path)) for path in paths}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(bench.seed)
            layers = {path: separable_like(conv) for path, conv in convs.items()}
        text = f"made {len(layers)} convolution{'s' * (len(layers) != 1)} depthwise-separable"
        light = replace_layers(model, layers, text)
        return bench.fit(light, epochs=self.epochs, label="mobilenet_convert") if self.epochs else light

    def choose(self, model: Model) -> list[str]:
        """Paths of the layers to convert, those with most multiply-accumulates first."""
        for path in self.skip:
            layer_at(model.module, path, SettingError)
        work = {layer.path: layer.macs for layer in count(model).layers if layer.macs}
        fit = [
            path
            for path, layer in model.module.named_modules()
            if is_convertible(layer, self.min_inputs) and path in work and path not in self.skip
        ]
        require(
            bool(fit),
            "The model has no convolution to make depthwise-separable.",
            f"Dense convolutions larger than 1x1 with {self.min_inputs} or more input channels can be converted.",
            SurgeryError,
        )
        fit.sort(key=lambda path: -work[path])
        return fit[: max(1, round(self.share * len(fit)))]
