"""Shallow wide students: one hidden layer behind a linear bottleneck (survey 31, sections 3.4 and 4).

A wide layer of H units on D inputs costs H D; written as an untrained product of H x k and k x D with nothing between
it costs k (H + D), which is what makes it wide in reasonable time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from karui.errors import SettingError, SurgeryError, UsageError, require
from karui.layers.factored import FactoredLinear
from karui.measuring.inference import inference
from karui.model import Model, Origin, replace_layers
from karui.train.randomness import undisturbed

KERNEL = 5


def wide_shallow(
    inputs: int, hidden: int, outputs: int, rank: int = 0, *, channels: int = 0, filters: int = 0
) -> nn.Sequential:
    """One hidden layer of ReLUs, perhaps behind a linear bottleneck, perhaps behind one convolution; untrained.

    Args:
        inputs: numbers that the hidden layer sees: of a sample, or of the pooled maps.
        hidden: units of the hidden layer.
        outputs: classes.
        rank: units of the bottleneck; 0 leaves it out.
        channels: of a picture, where there is a convolution.
        filters: of a convolution of 5x5 with ReLU and pooling by two before; 0 leaves it out.

    Example:
        >>> [type(layer).__name__ for layer in wide_shallow(64, 500, 10, rank=8)]
        ['Flatten', 'FactoredLinear', 'ReLU', 'Linear']
    """
    first = FactoredLinear(inputs, rank, hidden) if rank else nn.Linear(inputs, hidden)
    maps = [nn.Conv2d(channels, filters, KERNEL, padding=KERNEL // 2), nn.ReLU(), nn.MaxPool2d(2)] if filters else []
    return nn.Sequential(*maps, nn.Flatten(), first, nn.ReLU(), nn.Linear(hidden, outputs))


def widest(parameters: int, inputs: int, outputs: int, rank: int = 0, *, before: int = 0) -> int:
    """The most hidden units that so many parameters pay for, biases and `before` counted.

    Example:
        >>> hidden = widest(50_000, 64, 10, rank=8)
        >>> sum(p.numel() for p in wide_shallow(64, hidden, 10, rank=8).parameters())
        49998
    """
    fixed = before + rank * inputs + outputs
    return (parameters - fixed) // ((rank or inputs) + 1 + outputs)


def shallow_student(
    model: Model, parameters: int, rank: int | None = None, filters: int = 0, *, seed: int = 0
) -> Model:
    """An untrained shallow wide network of at most so many parameters, for the task of a model.

    Args:
        model: read for its input, outputs and task.
        parameters: the budget; the hidden layer is as wide as it allows.
        rank: units of the bottleneck; 0 leaves it out. None takes a seventh of the inputs.
        filters: of a convolution before, for pictures; 0 leaves it out.
        seed: draws the weights.

    Raises:
        UsageError: the model does not give one score for each class, or takes no pictures where filters are asked for.
        SettingError: the budget does not pay for one hidden unit.

    Example:
        >>> deep = Model(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), example=(torch.zeros(1, 1, 8, 8),))
        >>> shallow_student(deep, 20_000, rank=8).parameters
        19997
    """
    x, outputs = model.example[0], _classes(model)
    require(
        isinstance(x, Tensor) and len(model.example) == 1 and (filters == 0 or x.ndim == 4),
        "A shallow student takes one tensor, and with a convolution pictures [batch, channels, height, width].",
        "Set filters=0, or give a student of your own.",
        UsageError,
    )
    inputs = filters * (x.shape[2] // 2) * (x.shape[3] // 2) if filters else x[0].numel()
    units = max(1, inputs // 7) if rank is None else rank
    before = filters * (KERNEL**2 * x.shape[1] + 1) if filters else 0
    hidden = widest(parameters, inputs, outputs, units, before=before)
    require(
        hidden >= 1,
        f"parameters is {parameters}, which does not pay for one hidden unit on {inputs} inputs with rank {units}",
        "Give more of them, or a smaller rank or fewer filters.",
        SettingError,
    )
    settings: dict[str, Any] = {"inputs": inputs, "hidden": hidden, "outputs": outputs, "rank": units}
    if filters:
        settings |= {"channels": x.shape[1], "filters": filters}
    return _untrained(model, settings, seed)


def hidden_layer_student(model: Model, hidden: int, *, seed: int = 0) -> Model:
    """An untrained network of one hidden layer of ReLUs, for the task of a model.

    Args:
        model: read for its input, outputs and task.
        hidden: units of the hidden layer.
        seed: draws the weights.

    Raises:
        UsageError: the model does not take one tensor, or not give one score for each class.

    Example:
        >>> deep = Model(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), example=(torch.zeros(1, 1, 8, 8),))
        >>> hidden_layer_student(deep, 32).parameters
        2410
    """
    x, outputs = model.example[0], _classes(model)
    require(
        isinstance(x, Tensor) and len(model.example) == 1,
        "A network of one hidden layer takes one tensor.",
        "Put the inputs into one, or give a student of your own.",
        UsageError,
    )
    return _untrained(model, {"inputs": x[0].numel(), "hidden": hidden, "outputs": outputs}, seed)


def _untrained(model: Model, settings: dict[str, Any], seed: int) -> Model:
    origin = Origin(f"{__name__}:{wide_shallow.__name__}", settings)
    with undisturbed():
        torch.manual_seed(seed)
        module = wide_shallow(**settings).eval()
    return Model(module.to(model.example[0].device), example=model.example, task=model.task, lineage=(origin,))


def _classes(model: Model) -> int:
    with inference(model.module) as module:
        outputs = module(*model.example)
    fits = isinstance(outputs, Tensor) and outputs.ndim == 2
    require(fits, "A shallow student needs a model that gives one score for each class, [batch, classes].",
            "Give a student of your own.", UsageError)  # fmt: skip
    return outputs.shape[1]


def factored_first_layer(model: Model, rank: int, *, seed: int = 0) -> Model:
    """The model with its first linear layer W replaced by an untrained product U V with nothing between (section 3.4).

    Both factors are to be trained from the start; this is no decomposition of a trained layer. A wide layer of H units
    on D inputs then costs k (H + D) in place of H D.

    Args:
        model: an untrained student; left as it is.
        rank: k, the units of the bottleneck.
        seed: draws both factors.

    Raises:
        SurgeryError: there is no linear layer, or its sides are no larger than the rank.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10))
        >>> factored_first_layer(Model(net, example=(torch.zeros(1, 64),)), 8).module[0]
        FactoredLinear(
          (0): Linear(in_features=64, out_features=8, bias=False)
          (1): Linear(in_features=8, out_features=512, bias=True)
        )
    """
    linear = next(((p, part) for p, part in model.module.named_modules() if type(part) is nn.Linear), None)
    require(linear is not None, "The student has no linear layer to factor.", "Give a perceptron.", SurgeryError)
    assert linear is not None  # noqa: S101  (just required; for the type checker)
    path, old = linear
    require(
        0 < rank < min(old.in_features, old.out_features),
        f"The rank is {rank}; the layer '{path}' has {old.in_features} inputs and {old.out_features} units.",
        "Give a rank below both.",
        SurgeryError,
    )
    with undisturbed():
        torch.manual_seed(seed)
        new = FactoredLinear(old.in_features, rank, old.out_features, bias=old.bias is not None).to(old.weight)
    return replace_layers(model, {path: new}, f"'{path}' as an untrained product of rank {rank}")


def multiplied_out(model: Model) -> Model:
    """The model with each such product of linear layers as the one layer that computes the same.

    Example:
        >>> net = nn.Sequential(FactoredLinear(64, 8, 512), nn.ReLU(), nn.Linear(512, 10))
        >>> multiplied_out(Model(net, example=(torch.zeros(1, 64),))).module[0]
        Linear(in_features=64, out_features=512, bias=True)
    """
    found = {p: part.dense() for p, part in model.module.named_modules() if isinstance(part, FactoredLinear)}
    return replace_layers(model, found, f"{len(found)} product{'s' * (len(found) != 1)} multiplied out")
