"""Layers made of a low-rank map of their responses (Zhang et al. 2016, survey 16)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from karui.layers.factored import factor_conv, factor_linear
from karui.layers.spatial import split_space
from karui.lowrank._split import split_kernels
from karui.model.following import Following
from karui.numerics.regression import AffineMap
from karui.numerics.unfold import split_groups


def assemble(layer: Any, maps: Sequence[AffineMap], split: int | None = None) -> nn.Module:
    """The layer that gives `M (W x + b0) + b` for the map `M, b` of each group, split over space at rank `split`."""
    left, right, offset = (torch.stack([getattr(one, name) for one in maps]) for name in ("left", "right", "offset"))
    weight = layer.weight.detach().double()
    if layer.bias is not None:
        old = layer.bias.detach().double().reshape(len(maps), -1)
        offset = offset + torch.einsum("gnr,grm,gm->gn", left, right, old)
    if isinstance(layer, nn.Linear):
        return factor_linear(layer, left[0], right[0] @ weight, offset[0])
    core = torch.einsum("grn,gn...->gr...", right, split_groups(weight, len(maps)))
    if split is None:
        return factor_conv(layer, core, outer=left, bias=offset.flatten())
    vertical, horizontal = split_kernels(core, split)
    return split_space(layer, vertical, horizontal, outer=left, bias=offset.flatten())


def turned_back(found: AffineMap, scale: Tensor, shift: Tensor) -> AffineMap:
    """The map of responses `y` for one that was found on `scale y + shift`.

    A channel of scale 0 is the same whatever the layer gives: it gives 0.
    """
    alive = scale.abs() > 1e-12
    back = torch.where(alive, 1 / torch.where(alive, scale, 1), 0)
    moved = found.left @ (found.right @ shift) + found.offset - shift
    return AffineMap(back.unsqueeze(1) * found.left, found.right * scale, back * moved)


def all_turned_back(maps: Sequence[AffineMap], following: Following) -> list[AffineMap]:
    """The same for the map of each group, by the normalisation that follows the layer."""
    if following.scale is None or following.shift is None:
        return list(maps)
    sides = (following.scale.chunk(len(maps)), following.shift.chunk(len(maps)))
    return [turned_back(one, scale, shift) for one, scale, shift in zip(maps, *sides, strict=True)]
