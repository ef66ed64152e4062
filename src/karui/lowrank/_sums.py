"""A layer as sum of a low-rank and a sparse part (Yu et al. 2017, survey 24): what it is fitted to, and its form."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from karui.layers.factored import factor_conv, factor_linear
from karui.layers.low_rank_sparse import LowRankPlusSparse
from karui.lowrank._calibrate import regularised
from karui.numerics.bilateral import LowRankSparse
from karui.numerics.regression import Moments


def for_one_sample(moments: Moments, weight: Tensor, *, bias: bool) -> Moments:
    """Second moments for one sample: around the means where a bias makes up for these, else around zero.

    A little of isotropic inputs is added, so that retraining does not start from weights of any size.
    """
    moments = regularised(moments, weight, centred=bias)
    if bias:
        return moments.centred()
    n = moments.count
    return Moments(n, moments.x / n, moments.y / n, moments.xx / n, moments.yx / n, moments.yy / n)


def assembled(layer: Any, fits: Sequence[LowRankSparse], bias: Tensor | None) -> nn.Module:
    """The layer that takes the place of one: a sum of two branches, or one alone where the other is empty."""
    left, right, sparse = (torch.stack([getattr(fit, name) for fit in fits]) for name in ("left", "right", "sparse"))
    left, right = _balanced(left, right)
    if left.shape[2] and sparse.any():
        return LowRankPlusSparse.of(layer, left, right, sparse, bias)
    if left.shape[2] and isinstance(layer, nn.Linear):
        return factor_linear(layer, left[0], right[0], bias)
    if left.shape[2]:
        return factor_conv(layer, right.reshape(*right.shape[:2], *layer.weight.shape[1:]), outer=left, bias=bias)
    new = copy.deepcopy(layer)
    with torch.no_grad():
        new.weight.copy_(sparse.reshape(layer.weight.shape))
        if bias is not None:
            new.bias.copy_(bias)
    return new


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same products with each pair of a column and a row equally long, so that both factors train alike."""
    scale = (right.norm(dim=2) / left.norm(dim=1).clamp(min=1e-300)).sqrt().clamp(min=1e-150)
    return left * scale.unsqueeze(1), right / scale.unsqueeze(2)
