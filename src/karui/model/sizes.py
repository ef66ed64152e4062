"""Attributes of modules that repeat a size of their weights, and what they become after a cut."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from karui.model.groups import Analysis, tensor_of
from karui.model.walking import layers

# Attribute -> the dimension of the module's weight that it repeats.
SIZES: dict[str, int] = {
    "out_channels": 0,
    "in_channels": 1,
    "out_features": 0,
    "in_features": 1,
    "num_features": 0,
    "num_channels": 0,
    "num_parameters": 0,
    "embedding_dim": 1,
}
RECURRENT = {"hidden_size": ("weight_hh_l0", "weight_hh"), "input_size": ("weight_ih_l0", "weight_ih")}


def new_sizes(
    module: nn.Module, analysis: Analysis, touched: dict[str, dict[int, int]], alive: np.ndarray
) -> list[list[Any]]:
    """(path, attribute, value) for every module that owns a tensor that shrinks.

    Args:
        module: the network before the cut.
        analysis: its labels.
        touched: the new size of each dimension that shrinks, by tensor.
        alive: which labels stay.
    """
    owned: dict[str, dict[str, dict[int, int]]] = {}
    for name, dims in touched.items():
        path, _, leaf = name.rpartition(".")
        owned.setdefault(path, {})[leaf] = dims
    counts: dict[str, dict[str, np.ndarray]] = {}
    for name, attribute, labels in analysis.trace.counts:
        counts.setdefault(name, {})[attribute] = labels
    sizes: list[list[Any]] = []
    owners = layers(module)
    for path, leaves in owned.items():
        owner = owners[path]
        known = vars(owner)
        shapes = {
            leaf: tuple([dims.get(k, int(n)) for k, n in enumerate(getattr(owner, leaf).shape)])
            for leaf, dims in leaves.items()
        }
        weight = f"{path}.weight" if path else "weight"
        counted = {a: int(alive[labels].sum()) for a, labels in counts.get(weight, {}).items()}
        new = _repeated(known, shapes) | {k: v for k, v in counted.items() if k in known}
        if known.get("groups", 1) > 1 and "in_channels" in counted:
            whole = tuple(map(int, tensor_of(module, weight).shape))
            new["groups"] = _conv_groups(known, shapes.get("weight", whole), counted)
        sizes += [[path, attribute, value] for attribute, value in new.items() if known[attribute] != value]
    return sizes


def _repeated(known: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Attributes that repeat a dimension of one of the new shapes."""
    new: dict[str, Any] = {}
    weight = shapes.get("weight") or next(iter(shapes.values()))
    for attribute, dim in SIZES.items():
        place = 1 - dim if known.get("transposed") else dim
        if attribute in known and place < len(weight):
            new[attribute] = weight[place]
    if "normalized_shape" in known and "weight" in shapes:
        new["normalized_shape"] = weight
    for attribute, leaves in RECURRENT.items():
        for leaf in leaves:
            if attribute in known and leaf in shapes:
                new[attribute] = shapes[leaf][1]
    return new


def _conv_groups(known: dict[str, Any], weight: tuple[int, ...], counted: dict[str, int]) -> int:
    """Groups of a convolution: all channels over those of one group."""
    return counted["out_channels" if known.get("transposed") else "in_channels"] // weight[1]
