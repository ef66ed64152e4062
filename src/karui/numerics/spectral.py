"""Units of a network as a graph: how alike they respond, its Laplacian, and projections to fewer numbers."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def distances(moment: Float[Tensor, "units units"]) -> Float[Tensor, "units units"]:
    """Mean square difference of the activations of each two units, from their second moments E[a a^T].

    Example:
        >>> distances(torch.tensor([[1.0, 0.0], [0.0, 4.0]])).tolist()
        [[0.0, 5.0], [5.0, 0.0]]
    """
    power = moment.diagonal()
    return (power[:, None] + power[None, :] - 2 * moment).clamp(min=0)


def similarities(
    apart: Float[Tensor, "units units"], edges: Float[Tensor, "units units"] | None = None
) -> Float[Tensor, "units units"]:
    """Weights of a graph's edges, exp(-d² / (2 s²)) with s² the median d², without loops.

    Args:
        apart: squared distances.
        edges: 1 where there may be an edge, 0 elsewhere; None allows all.
    """
    allowed = torch.ones_like(apart) if edges is None else edges.to(apart)
    allowed = allowed - torch.diag(allowed.diagonal())
    known = apart[allowed > 0]
    scale = float(known.median()) if len(known) else 1.0
    return allowed * torch.exp(-apart / (2 * (scale or 1.0)))


def laplacian(weights: Float[Tensor, "units units"]) -> Float[Tensor, "units units"]:
    """D - A: the sums of the edges of each unit on the diagonal, less the edges. Its rows sum to 0.

    Example:
        >>> laplacian(torch.tensor([[0.0, 2.0], [2.0, 0.0]])).tolist()
        [[2.0, -2.0], [-2.0, 2.0]]
    """
    return torch.diag(weights.sum(1)) - weights


def smoothest(
    operator: Float[Tensor, "units units"], number: int, heat: float = 0.0
) -> Float[Tensor, "units components"]:
    """The eigenvectors of a Laplacian with the smallest eigenvalues, as columns: the lowest graph frequencies.

    Args:
        operator: the Laplacian.
        number: how many.
        heat: s of the heat kernel exp(-s L), by which each is multiplied; 0 leaves them orthonormal.
    """
    values, vectors = torch.linalg.eigh(operator)
    return vectors[:, :number] * torch.exp(-heat * values[:number])


def sketch(units: int, components: int, seed: int) -> Float[Tensor, "units components"]:
    """A random projection that keeps distances (Johnson, Lindenstrauss 1984): normal, of variance 1 / components.

    Distances among n vectors stay within a share eps where components is a few times log(n) / eps². It is drawn anew
    from its seed, and need not be stored.

    Example:
        >>> sketch(1000, 64, seed=0).shape
        torch.Size([1000, 64])
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(units, components, dtype=torch.float64, generator=generator) / components**0.5


def root(covariance: Float[Tensor, "features features"]) -> Float[Tensor, "features features"]:
    """R with R R^T the covariance, by Cholesky's decomposition.

    Where the covariance is singular, as that of fewer samples than features is, up to a thousandth of the mean variance
    is added to each direction, as little as the decomposition needs; it takes a small part of the time of eigenvectors.

    Example:
        >>> r = root(torch.tensor([[4.0, 2.0], [2.0, 3.0]]))
        >>> (r @ r.T).round(decimals=4).tolist()
        [[4.0, 2.0], [2.0, 3.0]]
    """
    unit = torch.eye(len(covariance), dtype=covariance.dtype) * covariance.diagonal().mean()
    for share in (0.0, 1e-6, 1e-5, 1e-4, 1e-3):
        factor, failed = torch.linalg.cholesky_ex(covariance + share * unit)
        if not failed:
            return factor
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()
