"""Proximal operators: the minimiser of `0.5 ||x - z||^2 + t penalty(x)` for a penalty that is not smooth."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def shrink_singular_values(
    matrices: Float[Tensor, "*batch rows columns"], threshold: float | Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch rows columns"]:
    """The proximal operator of `threshold` times the nuclear norm: each singular value falls by it, at most to zero.

    Example:
        >>> shrink_singular_values(torch.diag(torch.tensor([3.0, 1.0])), 2.0).tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    by = threshold.unsqueeze(-1) if isinstance(threshold, Tensor) else threshold
    return (left * (values - by).clamp(min=0).unsqueeze(-2)) @ right


def shrink(values: Float[Tensor, "*shape"], threshold: float) -> Float[Tensor, "*shape"]:
    """The proximal operator of `threshold` times the sum of absolute values: each moves towards zero by it.

    Example:
        >>> shrink(torch.tensor([3.0, -1.0, 0.5]), 1.0).tolist()
        [2.0, -0.0, 0.0]
    """
    return torch.nn.functional.softshrink(values, threshold)


def shrink_rows(matrix: Float[Tensor, "*batch rows columns"], threshold: float) -> Float[Tensor, "*batch rows columns"]:
    """The proximal operator of `threshold` times the sum of the rows' Euclidean norms: each row shortens by it.

    Example:
        >>> shrink_rows(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0).tolist()
        [[2.4000000953674316, 3.200000047683716], [0.0, 0.0]]
    """
    norms = matrix.norm(dim=-1, keepdim=True)
    return matrix * (1 - threshold / norms.clamp(min=1e-30)).clamp(min=0)
