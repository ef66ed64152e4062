"""Wide residual networks: Zagoruyko and Komodakis 2016, "Wide Residual Networks" (survey 7).

A pre-activation residual network that is shallow and k times wider instead of deep and thin, with dropout between the
convolutions of a block. Equal in accuracy to networks of many times its depth, and faster to run and train, since a
few wide layers keep a processor busier than many thin ones.

Pays where time counts and parameters do not: the parameters grow with the square of the width. Does not pay where bytes
are short, nor on tasks so small that the narrow network is right already.

Paper -> here: d -> depth, k -> width, N -> blocks of a group, l -> convolutions of a block, B(3,3) -> block "3,3".

DEPARTURE: the map is averaged over whatever is left of it instead of over a fixed 8x8, so that pictures of other sizes
work (28 pixels leave 7x7); at 32 pixels it is the same.

DEPARTURE: training is the bench's. The paper's is SGD with Nesterov momentum 0.9, batches of 128, weight decay 5e-4 and
a rate of 0.1 times 0.2 at epochs 60, 120 and 160 of 200.

Source: arXiv 1605.07146, table 1 (the network), section 2 (block types, dropout), and the authors' code, after which
the normalisation and ReLU before a block are shared with its shortcut where that is a convolution.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from karui.architectures._common import build_and_train, check_counts, draw_he, read_brief
from karui.errors import SettingError, require
from karui.model import Model
from karui.technique import Bench, Card, require_passes, technique
from karui.technique.card import Need

STEM = 16
GROUPS = ((16, 1), (32, 2), (64, 2))


def read_block(block: str) -> tuple[int, ...]:
    """Kernel sizes of a block's convolutions, as in "3,1,3".

    Example:
        >>> read_block("3,1,3")
        (3, 1, 3)
    """
    parts = [part.strip() for part in block.split(",")]
    good = len(parts) >= 2 and all(part.isdecimal() and int(part) % 2 == 1 for part in parts)
    require(good, f"block is '{block}'; give two or more odd kernel sizes, for example '3,3'", "", SettingError)
    return tuple(int(part) for part in parts)


def blocks_of(depth: int, convolutions: int = 2) -> int:
    """Blocks in each of the three groups of a network of `depth`, by which the paper counts all but shortcuts.

    Example:
        >>> blocks_of(28), blocks_of(40, convolutions=3)
        (4, 4)
    """
    step = 3 * convolutions
    near = max(1, round((depth - 4) / step)) * step + 4
    message = f"depth is {depth}; with {convolutions} convolutions a block it must be {step}n + 4, for example {near}"
    require(depth > 4 and (depth - 4) % step == 0, message, "", SettingError)
    return (depth - 4) // step


class WideBlock(nn.Module):
    """Normalisation, ReLU and convolution, twice or more, beside a shortcut; dropout before the last convolution.

    Where the channel counts differ the shortcut is a strided 1x1 convolution of the normalised input; else it is the
    input itself.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, kernels: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        widths = (inputs, *[outputs] * len(kernels))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for channels in widths[:-1])
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[i], outputs, kernel, stride=1 if i else stride, padding=kernel // 2, bias=False)
            for i, kernel in enumerate(kernels)
        )
        self.dropout = nn.Dropout(dropout)
        self.skip = None
        if inputs != outputs or stride != 1:
            self.skip = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Float[Tensor, "batch inputs h w"]) -> Float[Tensor, "batch outputs h2 w2"]:
        """The shortcut plus what the convolutions make."""
        y = functional.relu(self.norms[0](x))
        shortcut = x if self.skip is None else self.skip(y)
        y = self.convs[0](y)
        for number in range(1, len(self.convs)):
            y = functional.relu(self.norms[number](y))
            if number == len(self.convs) - 1:
                y = self.dropout(y)
            y = self.convs[number](y)
        return shortcut + y


def build_wide_resnet(
    depth: int = 28,
    width: int = 10,
    *,
    dropout: float = 0.0,
    block: str = "3,3",
    num_classes: int = 10,
    in_channels: int = 3,
) -> nn.Sequential:
    """The untrained network: a 3x3 stem of 16 channels, three groups of blocks, a linear layer on the averaged map.

    See `WideResNet` for the settings.

    Example:
        >>> sum(p.numel() for p in build_wide_resnet(10, 1).parameters())
        77850
    """
    kernels = read_block(block)
    blocks = blocks_of(depth, len(kernels))
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv1=nn.Conv2d(in_channels, STEM, 3, padding=1, bias=False))
    channels = STEM
    for number, (base, stride) in enumerate(GROUPS, 1):
        outputs = base * width
        first = WideBlock(channels, outputs, stride, kernels, dropout)
        rest = [WideBlock(outputs, outputs, 1, kernels, dropout) for _ in range(blocks - 1)]
        layers[f"group{number}"] = nn.Sequential(first, *rest)
        channels = outputs
    layers["bn"], layers["relu"] = nn.BatchNorm2d(channels), nn.ReLU()
    layers["pool"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    layers["linear"] = nn.Linear(channels, num_classes)
    network = nn.Sequential(layers)
    draw_he(network)
    return network


@technique(
    Card(
        survey=7,
        slug="wide_resnet",
        title="Wide Residual Networks",
        arxiv="1605.07146",
        kind="build",
        needs=("labels", "training"),
        reduces=("time",),
        quick={"depth": 10, "width": 1, "epochs": 1},
        pays="where time counts: a few wide layers keep a processor busier than many thin ones",
        costs="parameters grow with the square of the width",
    )
)
@dataclass(frozen=True, kw_only=True)
class WideResNet:
    """Build and train a wide residual network for the task of a model, or of the data where there is no model.

    Settings:
        depth: layers by the paper's count, 6n + 4 for blocks of two convolutions (3ln + 4 for l of them).
        width: the factor k on the channels of the three groups (16, 32 and 64).
        dropout: share of values dropped between a block's convolutions, in [0, 1).
        block: kernel sizes of a block's convolutions, for example "3,3" or "3,1,3".
        num_classes: classes; None takes what the model gives or the data names.
        in_channels: channels of a picture; None takes the input's.
        epochs: passes over the training data; 0 leaves the network untrained.

    Raises:
        SettingError: a setting is out of range, or the depth does not fit the block.
        UsageError: the task is not to classify pictures.

    Relations: `MobileNet` saves bytes and multiply-accumulates where this one saves time.

    Example:
        >>> WideResNet(depth=16, width=4).block
        '3,3'
    """

    depth: int = 16
    width: int = 4
    dropout: float = 0.0
    block: str = "3,3"
    num_classes: int | None = None
    in_channels: int | None = None
    epochs: int = 30

    def __post_init__(self) -> None:
        blocks_of(self.depth, len(read_block(self.block)))
        check_counts(width=self.width, num_classes=self.num_classes, in_channels=self.in_channels)
        require(0 <= self.dropout < 1, f"dropout is {self.dropout}; give a share in [0, 1), for example 0.3")
        require_passes(epochs=self.epochs)

    def needs(self) -> tuple[Need, ...]:
        """Labels and training data, unless the network is left untrained."""
        return ("labels", "training") if self.epochs else ()

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The new network, trained; `model` is read for its inputs, outputs and task only."""
        brief = read_brief(model, bench)
        settings = {
            "depth": self.depth,
            "width": self.width,
            "dropout": self.dropout,
            "block": self.block,
            "num_classes": self.num_classes or brief.classes,
            "in_channels": self.in_channels or brief.channels,
        }
        factory = f"{__name__}:{build_wide_resnet.__name__}"
        return build_and_train(factory, settings, brief, bench, epochs=self.epochs, label="wide_resnet")
