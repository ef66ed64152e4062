"""A micro detector and its data: digits of several sizes on a cluttered canvas, for the tests of detection."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from karui.data import Splits
from karui.model import Detection, Model, grid_anchors
from karui.model.detection import mean_over
from karui.numerics.boxes import mean_average_precision
from karui.train import Influence, Moment
from karui.train.guide import Guide

SIDE, STRIDE, SIZES = 32, 8, (8, 12)
TASK = Detection(anchors=grid_anchors((SIDE // STRIDE,) * 2, STRIDE, [(s, s) for s in SIZES]), confidence=0.3)
MOST, CLASSES = 3, 5


def canvases(digits: Sequence[tuple[Tensor, int]], count: int, seed: int) -> TensorDataset:
    """Pictures `[1, 32, 32]` with one to three digits, strokes and noise, and their `[3, 5]` targets."""
    draw = np.random.default_rng(seed)
    pictures, targets = torch.zeros(count, 1, SIDE, SIDE), torch.zeros(count, MOST, 5)
    shown = [(picture, int(label)) for picture, label in digits if int(label) < CLASSES]
    for picture, target in zip(pictures, targets, strict=True):
        taken: list[tuple[int, int, int]] = []
        for row in range(int(draw.integers(1, MOST + 1))):
            size = int(draw.integers(SIZES[0], SIZES[-1] + 1))
            for _ in range(20):
                x, y = (int(v) for v in draw.integers(0, SIDE - size + 1, 2))
                if all(max(abs(x - a), abs(y - b)) >= max(size, s) for a, b, s in taken):
                    break
            else:
                continue
            taken.append((x, y, size))
            digit, label = shown[int(draw.integers(len(shown)))]
            drawn = functional.interpolate(digit[None], (size, size), mode="bilinear", align_corners=False)[0]
            picture[:, y : y + size, x : x + size] = torch.maximum(picture[:, y : y + size, x : x + size], drawn)
            target[row] = torch.tensor([label + 1.0, x, y, x + size, y + size])
        for _ in range(3):  # strokes that are no digits
            x, y, length = int(draw.integers(SIDE - 6)), int(draw.integers(SIDE)), int(draw.integers(3, 7))
            picture[0, y, x : x + length] = picture[0, y, x : x + length].clamp(min=0.5)
        picture.add_(torch.from_numpy(draw.normal(0, 0.1, picture.shape)).float())
    return TensorDataset(pictures, targets)


class Noised(nn.Module):
    """A detector whose boxes are off by chance, the same way for the same picture."""

    def __init__(self, inner: nn.Module, noise: float = 0.5) -> None:
        super().__init__()
        self.inner, self.body, self.noise = inner, inner.get_submodule("body"), noise

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits as they are, offsets moved by up to the noise."""
        logits, offsets = self.inner(x)
        return logits, offsets + self.noise * torch.sin(1e4 * offsets)


class Drawn(Influence):
    """The control: boxes are drawn to the teacher's, with the weight of the bounded part."""

    def __init__(self, guide: Guide) -> None:
        self.guide = guide

    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        """The loss and half the squared distance to the teacher's boxes."""
        (_, offsets), _ = self.guide.told(moment.inputs)
        labels, _ = TASK.matched(moment.targets)
        return loss + 0.5 * mean_over((moment.outputs[1] - offsets).square().sum(1), labels > 0)


class MicroDetector(nn.Module):
    """Convolutions down to a grid of 4x4, and a head that judges the anchors of each cell: logits and offsets."""

    def __init__(self, width: int, classes: int = CLASSES, shrink: int = 1) -> None:
        super().__init__()
        self.shrink = shrink
        strides = (2, 2, 2) if shrink == 1 else (2, 2, 1)
        widths = (1, width, 2 * width, 4 * width)
        parts: list[nn.Module] = []
        for before, after, stride in zip(widths, widths[1:], strides, strict=False):
            parts += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*parts)
        self.outputs = classes + 1
        self.head = nn.Conv2d(widths[-1], len(SIZES) * (self.outputs + 4), 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.shrink > 1:
            x = functional.avg_pool2d(x, self.shrink)
        judged = self.head(self.body(x)).flatten(2)
        judged = judged.reshape(x.shape[0], len(SIZES), self.outputs + 4, -1).permute(0, 2, 3, 1).flatten(2)
        return judged[:, : self.outputs], judged[:, self.outputs :]


def detector(width: int, seed: int = 0, shrink: int = 1) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(MicroDetector(width, shrink=shrink), example=(torch.zeros(2, 1, SIDE, SIDE),), task=TASK)


def mean_precision(model: Model, data: TensorDataset) -> float:
    """mAP@0.5 in percent."""
    x, y = data.tensors
    model.module.eval()
    with torch.no_grad():
        outputs = model.module(x)
    return 100 * mean_average_precision(TASK.found(outputs, confidence=0.02), TASK.truth(y))


def scenes(digits: Splits, train: int, test: int) -> tuple[TensorDataset, TensorDataset]:
    """Pictures to train on and to test on, of digits that are not shared."""
    return canvases(digits.train, train, 1), canvases(digits.test, test, 2)
