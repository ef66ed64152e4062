"""Perceptrons: linear layers with ReLU between them, on which many papers of the survey try their methods."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from karui.architectures._common import check_counts
from karui.errors import require


def perceptron(sizes: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """A perceptron on inputs of any shape, which it flattens; untrained.

    Args:
        sizes: numbers in an input, units of each hidden layer, outputs; two or more.
        dropout: share of the hidden values dropped while training, in [0, 1); 0 puts in no such layers.

    Raises:
        SettingError: a setting is out of range.

    Example:
        >>> [type(layer).__name__ for layer in perceptron((64, 100, 10))]
        ['Flatten', 'Linear', 'ReLU', 'Linear']
    """
    require(len(sizes) >= 2, f"sizes is {tuple(sizes)}; give at least inputs and outputs, for example (64, 100, 10)")
    check_counts(**{f"sizes[{number}]": size for number, size in enumerate(sizes)})
    require(0 <= dropout < 1, f"dropout is {dropout}; give a share in [0, 1), for example 0.5")
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()] + ([nn.Dropout(dropout)] if dropout else [])
    return nn.Sequential(*layers[: -2 if dropout else -1])
