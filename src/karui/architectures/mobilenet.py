"""MobileNets: Howard et al. 2017, "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications"
(survey 4).

A network of depthwise-separable convolutions with two knobs: the width multiplier scales every channel count, the
resolution multiplier the side of the input (give smaller pictures). Each separable layer is a depthwise 3x3
convolution, batch normalisation, ReLU, a pointwise convolution, batch normalisation, ReLU, and does 1/N + 1/9 of the
multiply-accumulates of a dense 3x3 convolution to N channels (section 3.1).

Pays where multiply-accumulates or bytes are what is short: most of the work lies in 1x1 convolutions, which engines do
well. Does not pay by the factor that the counts promise: a depthwise convolution moves as much memory as a dense one
and does little with it, so time falls less than the counts; measure it. On small, easy data the dense network of equal
widths may be as fast and more accurate.

Paper -> here: alpha -> width, rho -> the input's side, M -> inputs, N -> outputs, D_K -> kernel, D_F -> the map's side.

DEPARTURE: the last depthwise layer has stride 1. The paper's table prints 2, but its sizes (7 in, 7 out) need 1.

DEPARTURE: pictures of at most 64 pixels keep their size in the stem and before the 1024-channel layers (stride 1 in
both), since the network for 224 pixels would leave them a single pixel.

DEPARTURE: training is the bench's (SGD or Adam on one machine) instead of asynchronous RMSprop. As in the paper, weight
decay spares the depthwise filters.

Source: arXiv 1704.04861, table 1 (the network), tables 4 and 5 (the two networks to compare with), tables 6 and 7.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from torch import nn

from karui.architectures._common import SMALL, build_and_train, check_counts, read_brief
from karui.errors import SettingError, require
from karui.layers.separable import Separable2d
from karui.model import Model
from karui.technique import Bench, Card, require_passes, technique
from karui.technique.card import Need

STEM = 32
REPEATED = (512, 1)
BODY = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[REPEATED] * 5, (1024, 2), (1024, 1))


def widened(channels: int, width: float) -> int:
    """Channels under the width multiplier: rounded to the nearest, at least one.

    Example:
        >>> widened(64, 0.75), widened(32, 0.01)
        (48, 1)
    """
    return max(1, round(channels * width))


def plan_body(*, small: bool, shallow: bool) -> list[tuple[int, int]]:
    """(output channels, stride) of each layer after the stem, before the width multiplier.

    Example:
        >>> len(plan_body(small=False, shallow=False)), len(plan_body(small=False, shallow=True))
        (13, 8)
    """
    body = [layer for layer in BODY if not (shallow and layer == REPEATED)]
    return [(channels, 1 if small and channels == 1024 else stride) for channels, stride in body]


def build_mobilenet(
    num_classes: int = 1000,
    width: float = 1.0,
    in_channels: int = 3,
    input_size: int = 224,
    *,
    shallow: bool = False,
    dense: bool = False,
) -> nn.Sequential:
    """The untrained network; see `MobileNet` for the settings.

    Example:
        >>> sum(p.numel() for p in build_mobilenet(10, width=0.25, input_size=32).parameters())
        215642
    """
    small = input_size <= SMALL
    channels = widened(STEM, width)
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=_dense(in_channels, channels, stride=1 if small else 2))
    for number, (full, stride) in enumerate(plan_body(small=small, shallow=shallow), 1):
        outputs = widened(full, width)
        make = _dense if dense else Separable2d
        layers[f"layer{number}"] = make(channels, outputs, stride=stride)
        channels = outputs
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["classifier"] = nn.Linear(channels, num_classes)
    return nn.Sequential(layers)


def _dense(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs), activation=nn.ReLU()))


@technique(
    Card(
        survey=4,
        slug="mobilenet",
        title="MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications",
        arxiv="1704.04861",
        kind="build",
        needs=("labels", "training"),
        reduces=("parameters", "macs", "bytes"),
        quick={"width": 0.25, "epochs": 1},
        pays="where bytes and multiply-accumulates are short: most of the work is in 1x1 convolutions",
        costs="time falls less than the counts, as depthwise convolutions are bound by memory; measure it",
    )
)
@dataclass(frozen=True, kw_only=True)
class MobileNet:
    """Build and train a MobileNet for the task of a model, or of the data where there is no model.

    Settings:
        width: the width multiplier on every channel count; the cost falls with its square.
        num_classes: classes; None takes what the model gives or the data names.
        in_channels: channels of a picture; None takes the input's.
        input_size: side of a picture in pixels; up to 64 the stem keeps the size. None takes the input's.
        shallow: leave out the five repeated 512-channel layers (the paper's shallow network, table 5).
        dense: 3x3 convolutions in place of separable ones (the paper's full-convolution network, table 4).
        epochs: passes over the training data; 0 leaves the network untrained.

    Raises:
        SettingError: a setting is out of range.
        UsageError: the task is not to classify pictures.

    Relations: `MobileNetConvert` puts the same layers into a network that exists; `WideResNet` builds a dense one.

    Example:
        >>> MobileNet(width=0.5).width
        0.5
    """

    width: float = 1.0
    num_classes: int | None = None
    in_channels: int | None = None
    input_size: int | None = None
    shallow: bool = False
    dense: bool = False
    epochs: int = 30

    def __post_init__(self) -> None:
        require(
            0 < self.width < math.inf,
            f"width is {self.width}; give a positive factor, for example 0.5",
            "",
            SettingError,
        )
        check_counts(num_classes=self.num_classes, in_channels=self.in_channels, input_size=self.input_size)
        require_passes(epochs=self.epochs)

    def needs(self) -> tuple[Need, ...]:
        """Labels and training data, unless the network is left untrained."""
        return ("labels", "training") if self.epochs else ()

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The new network, trained; `model` is read for its inputs, outputs and task only."""
        brief = read_brief(model, bench)
        settings = {
            "num_classes": self.num_classes or brief.classes,
            "width": self.width,
            "in_channels": self.in_channels or brief.channels,
            "input_size": self.input_size or brief.side,
            "shallow": self.shallow,
            "dense": self.dense,
        }
        factory = f"{__name__}:{build_mobilenet.__name__}"
        return build_and_train(factory, settings, brief, bench, epochs=self.epochs, label="mobilenet")
