"""The last layer of a classifier: the one whose output is the model's."""

from __future__ import annotations

from typing import Any

from karui.measuring.inference import inference
from karui.model import Model


def head_of(model: Model) -> str | None:
    """Path of the layer whose output the model returns as it is; None where something is done to it first.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> head_of(Model(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)), example=(torch.zeros(1, 2),)))
        '2'
    """
    given: dict[str, Any] = {}
    layers = [(path, layer) for path, layer in model.module.named_modules() if not list(layer.children())]
    handles = [
        layer.register_forward_hook(lambda _layer, _inputs, output, path=path: given.update({path: output}))
        for path, layer in layers
    ]
    try:
        with inference(model.module) as module:
            result = module(*model.example)
    finally:
        for handle in handles:
            handle.remove()
    return next((path for path, output in reversed(given.items()) if output is result), None)
