"""What each layer takes, in bytes and in time: for the report's plots."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from karui.measuring import OnnxRuntime, layer_times
from karui.measuring.inference import batch_of, inference

if TYPE_CHECKING:
    from karui.model import Model

CALLS = 15
BETWEEN = "(between layers)"
"""What the network itself does, outside of its layers."""
ADDED = "(the engine)"
"""What the engine spends on operators of its own, such as changes of layout."""


def layer_rows(model: Model) -> list[dict[str, Any]]:
    """Path, kind, bytes and seconds of each innermost layer that has tensors of its own or takes time.

    Seconds are the median over calls of torch, eager, one sample; a layer that is called several times counts its sum.
    Hooks cost a little time themselves, so the sum exceeds that of the whole network, which the clock measures.

    Example:
        >>> from karui.model import Model
        >>> model = Model(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), example=(torch.zeros(1, 4),))
        >>> [(row["path"], row["bytes"]) for row in layer_rows(model)]
        [('0', 40), ('1', 0)]
    """
    layers = {path: layer for path, layer in model.module.named_modules() if not list(layer.children())}
    seconds = _seconds(model, layers)
    return [
        {
            "path": path or "(all)",
            "kind": type(layer).__name__,
            "bytes": _bytes(layer),
            "seconds": seconds.get(path, 0.0),
        }
        for path, layer in layers.items()
        if _bytes(layer) or path in seconds
    ]


def engine_rows(model: Model, batch: int, threads: int) -> list[dict[str, Any]]:
    """The same rows with the times that ONNX Runtime tells, at a batch size and with threads: of each layer's own, and
    after them what the engine spends on work that belongs to none. A layer that it melts into another takes no time.

    Example:
        >>> from karui.model import Model
        >>> model = Model(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), example=(torch.zeros(1, 4),))
        >>> [(row["path"], row["bytes"]) for row in engine_rows(model, 1, 1)]
        [('0', 40)]
    """
    found = layer_times(model, engine=OnnxRuntime(), batch=batch, threads=threads)
    seconds = {layer.path: layer.seconds for layer in found.layers}
    whole, rows = BETWEEN if list(model.module.children()) else "(all)", []
    for path, layer in model.module.named_modules():
        size, taken = _bytes(layer, recurse=False), seconds.get(path, 0.0)
        if size or taken:
            rows.append({"path": path or whole, "kind": type(layer).__name__, "bytes": size, "seconds": taken})
    return [*rows, {"path": ADDED, "kind": "", "bytes": 0, "seconds": found.rest}] if found.rest else rows


def _bytes(layer: nn.Module, *, recurse: bool = True) -> int:
    tensors: list[Tensor] = [*layer.parameters(recurse), *layer.buffers(recurse)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _seconds(model: Model, layers: dict[str, nn.Module]) -> dict[str, float]:
    started: dict[str, float] = {}
    spent: dict[str, float] = {}
    rounds: dict[str, list[float]] = {}

    def before(path: str) -> Any:
        return lambda *_: started.__setitem__(path, time.perf_counter())

    def after(path: str) -> Any:
        return lambda *_: spent.__setitem__(path, spent.get(path, 0.0) + time.perf_counter() - started[path])

    hooks = [layer.register_forward_pre_hook(before(path)) for path, layer in layers.items()]
    hooks += [layer.register_forward_hook(after(path)) for path, layer in layers.items()]
    inputs = batch_of(model.example, 1)
    try:
        with inference(model.module) as module, torch.inference_mode():
            module(*inputs)
            for _ in range(CALLS):
                spent.clear()
                module(*inputs)
                for path, value in spent.items():
                    rounds.setdefault(path, []).append(value)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: statistics.median(values) for path, values in rounds.items()}
