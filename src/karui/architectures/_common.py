"""What the builders have in common: reading the task, building by seed, training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from karui.data import targets_of
from karui.errors import NeedError, SettingError, UsageError, require
from karui.measuring.inference import inference
from karui.model import Classification, Model, Origin, Task

if TYPE_CHECKING:
    from karui.technique import Bench

SMALL = 64  # pictures up to this side keep their full size in the stem: a strided one would leave no map for the end


@dataclass(frozen=True, kw_only=True)
class Brief:
    """What a network is built for: one picture as example input, its task, and how many classes there are."""

    example: tuple[Tensor, ...]
    task: Task
    classes: int

    @property
    def channels(self) -> int:
        """Channels of a picture."""
        return self.example[0].shape[1]

    @property
    def side(self) -> int:
        """The shorter side of a picture."""
        return min(self.example[0].shape[2:])


def read_brief(model: Model | None, bench: Bench) -> Brief:
    """The brief of a picture classifier, read off `model`, or off the training data where there is no model.

    Raises:
        NeedError: there is neither.
        UsageError: the inputs are not pictures `[channels, height, width]`, or the targets are not class numbers.
    """
    if model is not None:
        picture, task = model.example[0], model.task or Classification()
        classes = _outputs(model)
    else:
        require(bench.train is not None, "There is nothing to build a network for.", "Give a model or data.", NeedError)
        picture, task = bench.train[0][0][None], Classification()
        classes = _classes(bench.train)
    is_picture = isinstance(picture, Tensor) and picture.ndim == 4
    shape = list(picture.shape) if isinstance(picture, Tensor) else type(picture).__name__
    hint = "This architecture classifies pictures, [batch, channels, height, width]."
    require(is_picture, f"The inputs are not pictures but {shape}.", hint, UsageError)
    return Brief(example=(picture,), task=task, classes=classes)


def _outputs(model: Model) -> int:
    with inference(model.module) as module:
        outputs = module(*model.example)
    fits = isinstance(outputs, Tensor) and outputs.ndim == 2
    shape = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    hint = "A classifier gives [batch, classes]."
    require(fits, f"The model's outputs are not one score for each class but {shape}.", hint, UsageError)
    return outputs.shape[1]


def _classes(dataset: Any) -> int:
    targets = targets_of(dataset)
    if targets is None:
        targets = torch.as_tensor([dataset[i][1] for i in range(len(dataset))])
    numbered = not targets.is_floating_point() and targets.ndim == 1
    require(numbered, "The targets are not class numbers.", "Give num_classes, or another data set.", UsageError)
    return int(targets.max()) + 1


def build_and_train(
    factory: str, settings: dict[str, Any], brief: Brief, bench: Bench, *, epochs: int, label: str
) -> Model:
    """The network that `factory` builds with weights drawn by the bench's seed, trained for `epochs`."""
    origin = Origin(factory, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.seed)
        module = origin.replay(None, ()).eval()
    model = Model(module, example=brief.example, task=brief.task, lineage=(origin,))
    return bench.fit(model, epochs=epochs, label=label) if epochs else model


def check_counts(**counts: int | None) -> None:
    """Refuse a count below 1; None stands for "as the model or the data says"."""
    for name, value in counts.items():
        good = value is None or (isinstance(value, int) and value >= 1)
        require(good, f"{name} is {value}; give a whole number of 1 or more", error=SettingError)


def draw_he(module: nn.Module) -> None:
    """He's initialisation by fan-out for convolutions, as a ReLU follows them; biases are 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
