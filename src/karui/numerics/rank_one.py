"""The nearest tensor of rank one, for many tensors at once, by the higher-order power method.

`t[i, j, k] ~ scale a[i] b[j] c[k]` with unit vectors. It starts from the leading singular vectors of the
unfoldings, or where it is told; then
each vector in turn becomes the contraction of the tensor with all others, which never raises the error (De Lathauwer,
De Moor, Vandewalle 2000).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def rank_one(
    tensors: Float[Tensor, "batch *sizes"],
    sweeps: int = 50,
    start: Sequence[Float[Tensor, "batch size"]] | None = None,
) -> tuple[Float[Tensor, "batch"], list[Float[Tensor, "batch size"]]]:
    """Scales and unit vectors (one for each dimension after the first) of the nearest rank-one tensors, in float64.

    Args:
        tensors: a batch of tensors of two or more dimensions each.
        sweeps: rounds of the power method.
        start: vectors of any length to start from, one for each dimension after the first.

    Example:
        >>> a, b, c = torch.randn(5, 4), torch.randn(5, 3), torch.randn(5, 2)
        >>> made = torch.einsum("na,nb,nc->nabc", a, b, c).double()
        >>> scale, vectors = rank_one(made)
        >>> torch.allclose(outer(scale, vectors), made)
        True
    """
    whole = tensors.double()
    modes = range(1, whole.ndim)
    vectors = list(start or (_leading(whole.movedim(mode, 1).flatten(2)) for mode in modes))
    scale = whole.new_zeros(whole.shape[0])
    for _ in range(sweeps):
        for mode in modes:
            made = _contracted(whole, vectors, mode)
            scale = made.norm(dim=1)
            vectors[mode - 1] = made / scale.clamp(min=1e-300)[:, None]
    return scale, vectors


def outer(scale: Float[Tensor, "batch"], vectors: list[Float[Tensor, "batch size"]]) -> Float[Tensor, "batch *sizes"]:
    """The tensors that scales and vectors stand for."""
    made = scale
    for vector in vectors:
        made = made.unsqueeze(-1) * vector.reshape(vector.shape[0], *[1] * (made.ndim - 1), -1)
    return made


def _leading(matrices: Float[Tensor, "batch rows columns"]) -> Float[Tensor, "batch rows"]:
    """The leading left singular vector, by the small Gram matrix."""
    return torch.linalg.eigh(matrices @ matrices.mT).eigenvectors[..., -1]


def _contracted(tensors: Tensor, vectors: list[Tensor], kept: int) -> Float[Tensor, "batch size"]:
    """Each tensor contracted with its vectors in all modes but one."""
    made = tensors.movedim(kept, 1)
    for vector in reversed([vector for mode, vector in enumerate(vectors, 1) if mode != kept]):
        made = (made * vector.reshape(vector.shape[0], *[1] * (made.ndim - 2), -1)).sum(-1)
    return made
