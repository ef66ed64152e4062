"""Statistics of activations, class by class, in one pass over labelled data: none of the activations is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from karui.data import Batches
from karui.errors import DataError, UsageError, require, told
from karui.measuring.bar import bar
from karui.measuring.inference import inference
from karui.model.taps import taps
from karui.numerics.running import Running

Features = Callable[[dict[str, Tensor]], Sequence[Float[Tensor, "batch features"]]]
"""What of the outputs of layers, flattened and by path, is counted: one or several blocks of features."""


def flattened(seen: dict[str, Any], layers: Sequence[str]) -> dict[str, Float[Tensor, "batch units"]]:
    """Outputs of layers as one vector a sample.

    Raises:
        UsageError: a layer was not called, or gives no tensor.
    """
    for path in layers:
        require(
            isinstance(seen.get(path), Tensor),
            f"The layer '{path}' gives {told(seen.get(path))}.",
            "Name layers that are called and give one tensor.",
            UsageError,
        )
    return {path: seen[path].flatten(1) for path in layers}


def class_moments(
    module: nn.Module,
    layers: Sequence[str],
    dataset: Any,
    features: Features,
    *,
    full: bool = True,
    batch: int = 256,
    progress: bool = False,
) -> list[list[Running]]:
    """Mean and covariance of features of layers' outputs for each class: for each block, one of each class number.

    The network runs in evaluation mode and without gradients, and is left as it was.

    Args:
        module: the network.
        layers: paths of its layers.
        dataset: (input, class number) pairs.
        features: from the outputs by path, flattened, to blocks of features.
        full: whole covariances; otherwise variances alone.
        batch: samples at a time.
        progress: whether a bar is shown.

    Raises:
        DataError: targets are not class numbers, or there is no sample.
        UsageError: a layer is not there, or gives no tensor.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.tensor([[1.0], [3.0], [8.0]]), torch.tensor([0, 0, 1]))
        >>> ((low, high),) = class_moments(nn.Identity(), ("",), data, lambda seen: [seen[""]])
        >>> low.mean.item(), low.variance().item(), high.mean.item()
        (2.0, 1.0, 8.0)
    """
    batches = Batches(dataset)
    require(len(batches) > 0, "There is no sample to take statistics of.", "Give labelled data.", DataError)
    blocks: list[dict[int, Running]] = []
    with inference(module), taps(module, layers) as seen, bar("statistics", len(batches), progress) as advance:
        for index in torch.arange(len(batches)).split(batch):
            inputs, targets = batches.fetch(index)
            numbered = isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point()
            require(numbered, "The targets are not class numbers.", "Give one class a sample.", DataError)
            module(*inputs)
            rows = features(flattened(dict(seen), layers))
            blocks = blocks or [{} for _ in rows]
            for block, part in zip(blocks, rows, strict=True):
                for number in targets.unique().tolist():
                    held = block.setdefault(number, Running.zeros(part.shape[1], full=full))
                    held.add(part[targets == number])
            advance(len(index))
    classes = max(blocks[0]) + 1
    missing = [number for number in range(classes) if number not in blocks[0]]
    require(
        not missing, f"There is no sample of class {missing}.", "Number the classes from 0, without gaps.", DataError
    )
    return [[block[number] for number in range(classes)] for block in blocks]
