"""A layer as the sum of a factored one and a sparse one."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from karui.layers.factored import CONVOLUTIONS, FactoredConv, FactoredLinear, conv_settings


class LowRankPlusSparse(nn.Module):
    """Two branches on one input, summed: two layers with a narrow map between, and one whose weights are mostly zero.

    The sparse branch is an ordinary layer, and holds the bias. Its zeros are stored packed; a dense engine multiplies
    them.

    Args:
        layer: settings of the layer that it stands for, as its class of torch.nn takes them.
        rank: of the factored branch, for each group of a convolution.

    Example:
        >>> sum_of_two = LowRankPlusSparse({"in_features": 8, "out_features": 4, "bias": True}, rank=2)
        >>> sum_of_two(torch.zeros(3, 8)).shape
        torch.Size([3, 4])
    """

    def __init__(self, layer: dict[str, Any], rank: int) -> None:
        super().__init__()
        self.layer, self.rank = dict(layer), rank
        if "in_features" in layer:
            self.sparse: Any = nn.Linear(**layer)
            self.low: Any = FactoredLinear(layer["in_features"], rank, layer["out_features"], bias=False)
        else:
            values: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in layer.items()}
            self.sparse = CONVOLUTIONS[len(layer["kernel_size"])](**values)
            self.low = _no_bias(self.sparse, rank)

    @classmethod
    def of(
        cls,
        layer: Any,
        left: Float[Tensor, "groups each rank"],
        right: Float[Tensor, "groups rank columns"],
        sparse: Float[Tensor, "groups each columns"],
        bias: Float[Tensor, "filters"] | None,
    ) -> LowRankPlusSparse:
        """The sum that takes a layer's place, with these matrices of filters by all else."""
        linear = isinstance(layer, nn.Linear)
        told = (
            {"in_features": layer.in_features, "out_features": layer.out_features, "bias": layer.bias is not None}
            if linear
            else conv_settings(layer)
        )
        new = cls(told, left.shape[2]).to(layer.weight)
        weights = (right.flatten(0, 1), left.flatten(0, 1))
        with torch.no_grad():
            for stage, weight in zip(new.low.children(), weights, strict=True):
                stage.weight.copy_(weight.reshape(stage.weight.shape))
            new.sparse.weight.copy_(sparse.reshape(layer.weight.shape))
            if bias is not None:
                new.sparse.bias.copy_(bias)
        return new.requires_grad_(layer.weight.requires_grad).train(layer.training)

    def settings(self) -> dict[str, Any]:
        """What `LowRankPlusSparse(**settings)` rebuilds it from."""
        return {"layer": self.layer, "rank": self.rank}

    def forward(self, x: Tensor) -> Tensor:
        """The sum of the branches."""
        return self.low(x) + self.sparse(x)


def _no_bias(conv: Any, rank: int) -> FactoredConv:
    """The two convolutions of that rank in the place of one, without a bias."""
    spatial = {**conv_settings(conv), "out_channels": conv.groups * rank, "bias": False}
    pointwise = {
        "in_channels": conv.groups * rank,
        "out_channels": conv.out_channels,
        "kernel_size": 1,
        "groups": conv.groups,
        "bias": False,
    }
    return FactoredConv([spatial, pointwise], dimensions=len(conv.kernel_size))
