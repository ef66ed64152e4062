"""What benchmarks of single layers share: the dense layer in every engine and layout, and the best of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from karui.measuring import Clock, OnnxRuntime, Torch, time_ratio
from karui.model import Model

ROUNDS = 25


class _ChannelsLast(nn.Module):
    """A convolution whose weights and input lie with the channels last.

    The input's numbers are read in that order as they lie, which costs nothing: another picture, in the same time.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, channels last as well."""
        batch, channels, height, width = x.shape
        return self.layer(x.view(batch, height, width, channels).permute(0, 3, 1, 2))


def race(
    dense: nn.Module, light: Mapping[str, tuple[Any, nn.Module]], example: Tensor, batch: int = 1
) -> tuple[str, dict[str, Any]]:
    """Times of a dense layer and of what stands for it: one thread, processor time, in turns.

    Args:
        dense: the layer; in torch as it is and (a convolution) with the channels last, and in ONNX Runtime.
        light: by name, an engine and a layer.
        example: its input.
        batch: so many of them.

    Returns:
        The name of the fastest dense one, and all times by name.
    """
    sides: dict[str, Any] = {"dense, torch": (Torch(), Model(dense.eval(), example=(example,)))}
    if example.ndim == 4:
        sides["dense, torch, channels last"] = (Torch(), Model(_ChannelsLast(dense).eval(), example=(example,)))
    sides["dense, ONNX Runtime"] = (OnnxRuntime(), Model(dense, example=(example,)))
    rivals = list(sides)
    sides |= {name: (engine, Model(layer.eval(), example=(example,))) for name, (engine, layer) in light.items()}
    found = Clock(batches=(batch,), threads=(1,), cpu_time=True, rounds=ROUNDS).race(sides, (example,))
    times = {name: found.of(name)[0] for name in sides}
    return min(rivals, key=lambda name: times[name].median), times


def against(times: Mapping[str, Any], best: str, name: str) -> Any:
    """The ratio of two of the times, of whichever engines."""
    return time_ratio(times[best], times[name], across=True)
