"""The CIFAR ResNet of He et al. 2015 (section 4.2), on which most pruning papers measure: 16, 32 and 64 channels.

The shortcut between groups is the paper's option A: every second pixel, and zero channels before and after. No
convolution has a bias. Names are those of the widely used `pytorch_resnet_cifar10` weights, which `load_cifar_weights`
reads: conv1, bn1, layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}, linear. They expect pictures as `karui.data` gives them for
`cifar10:PATH`.
"""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from karui.architectures._common import check_counts, draw_he
from karui.errors import SettingError, UsageError, require

STAGES = ((16, 1), (32, 2), (64, 2))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.zeros = (outputs - inputs) // 2, outputs - inputs - (outputs - inputs) // 2

    def shortcut(self, x: Float[Tensor, "batch inputs h w"]) -> Float[Tensor, "batch outputs h2 w2"]:
        """Every `stride`-th pixel, with channels of zeros before and after (option A)."""
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(x, (0, 0, 0, 0, *self.zeros)) if any(self.zeros) else x

    def forward(self, x: Float[Tensor, "batch inputs h w"]) -> Float[Tensor, "batch outputs h2 w2"]:
        """The block's ReLU comes after the sum."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """A 3x3 stem, three stages of basic blocks, and a linear layer on the average of the last map."""

    def __init__(self, blocks: int, num_classes: int, in_channels: int, width: float) -> None:
        super().__init__()
        channels = max(1, round(STAGES[0][0] * width))
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        stages = []
        for base, stride in STAGES:
            outputs = max(1, round(base * width))
            rest = [BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(BasicBlock(channels, outputs, stride), *rest))
            channels = outputs
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(channels, num_classes)
        draw_he(self)

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch classes"]:
        """Scores of the classes."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(functional.adaptive_avg_pool2d(x, 1).flatten(1))


def cifar_resnet(depth: int = 20, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> CifarResNet:
    """A CIFAR ResNet, untrained.

    Args:
        depth: 6n + 2 layers, for n blocks a stage: 8, 20, 32, 44, 56, 110.
        num_classes: number of classes.
        in_channels: channels of a picture.
        width: factor on the channels of all stages.

    Raises:
        SettingError: the depth is not 6n + 2, or another number is out of range.

    Example:
        >>> sum(p.numel() for p in cifar_resnet(20).parameters())
        269722
    """
    check_counts(num_classes=num_classes, in_channels=in_channels)
    near = max(1, round((depth - 2) / 6)) * 6 + 2
    fits = depth > 2 and (depth - 2) % 6 == 0
    require(fits, f"depth is {depth}; it must be 6n + 2, for example {near}", "", SettingError)
    require(0 < width <= 64, f"width is {width}; give a factor in (0, 64], for example 1.0", "", SettingError)
    return CifarResNet((depth - 2) // 6, num_classes, in_channels, width)


# By name, as a lineage and the command line ask for them; each takes the other settings of `cifar_resnet`.
resnet8 = partial(cifar_resnet, 8)
resnet20 = partial(cifar_resnet, 20)
resnet32 = partial(cifar_resnet, 32)
resnet44 = partial(cifar_resnet, 44)
resnet56 = partial(cifar_resnet, 56)
resnet110 = partial(cifar_resnet, 110)


def load_cifar_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict of an `.npz` file of arrays, for `module.load_state_dict`.

    Raises:
        UsageError: there is no such file, or it holds something else.
    """
    path = Path(path)
    require(path.is_file(), f"There is no file {path}.", "Give an .npz file of a network's weights.", UsageError)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (ValueError, OSError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} cannot be read as an .npz file of arrays: {error}.") from error
