"""karui (軽い, "light"): makes trained neural networks smaller and, by measurement, faster.

    model = karui.Model(net, example=(x,), task=karui.Classification())
    light = karui.sparsify.L1Filters(ratio=0.5).apply(model, karui.Bench(train=train, test=test, seed=0))
    karui.save(light, "light/")

Nothing heavy is imported until it is used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_DOOR = {
    "Model": "karui.model",
    "Classification": "karui.model",
    "Regression": "karui.model",
    "Detection": "karui.model",
    "CustomTask": "karui.model",
    "Task": "karui.model",
    "Bench": "karui.technique",
    "Card": "karui.technique",
    "Technique": "karui.technique",
    "Then": "karui.technique",
    "compress": "karui.recipes.budget.door",
    "measure": "karui.technique",
    "Influence": "karui.train",
    "Together": "karui.train",
    "Training": "karui.train",
    "Clock": "karui.measuring",
    "load_data": "karui.data",
    "save": "karui.artifact",
    "load": "karui.artifact",
    "plan_surgery": "karui.model",
    "KaruiError": "karui.errors",
}
_FLOORS = (
    "architectures",
    "artifact",
    "convolution",
    "data",
    "distill",
    "errors",
    "index",
    "layers",
    "lowrank",
    "measuring",
    "model",
    "numerics",
    "quantize",
    "recipes",
    "report",
    "search",
    "sparsify",
    "structured",
    "survey",
    "technique",
    "train",
)


def __getattr__(name: str) -> Any:
    if name in _DOOR:
        return getattr(importlib.import_module(_DOOR[name]), name)
    if name in _FLOORS:
        return importlib.import_module(f"karui.{name}")
    raise AttributeError(f"module 'karui' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted((*globals(), *_DOOR, *_FLOORS))
