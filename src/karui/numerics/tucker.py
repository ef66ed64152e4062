"""Tucker-2 of convolution kernels: both channel modes are projected, the spatial ones stay whole.

`W[n, c, ...] ~ sum_{p, q} core[q, p, ...] inner[c, p] outer[n, q]`. It starts from HOSVD (leading left singular vectors
of the two unfoldings) and is refined by HOOI, higher-order orthogonal iteration: project on one factor, redo the other.

TensorLy's partial Tucker computes the same; this one works in float64 on torch tensors, keeps the fit of every
sweep, and takes the subspaces from the small Gram matrices, since only they matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from karui.errors import require
from karui.numerics.unfold import unfold


@dataclass(frozen=True)
class Tucker2:
    """A kernel as `core` `[rank_out, rank_in, ...]`, `inner` `[channels, rank_in]` and `outer` `[filters, rank_out]`.

    The factors have orthonormal columns. `errors` are the relative Frobenius errors after HOSVD and after each sweep
    of HOOI. All in float64.
    """

    core: Float[Tensor, "rank_out rank_in *kernel"]
    inner: Float[Tensor, "channels rank_in"]
    outer: Float[Tensor, "filters rank_out"]
    errors: tuple[float, ...]

    @property
    def error(self) -> float:
        """Relative Frobenius error of the approximation."""
        return self.errors[-1]

    def kernel(self) -> Float[Tensor, "filters channels *kernel"]:
        """The kernel that it stands for."""
        return torch.einsum("qp...,cp,nq->nc...", self.core, self.inner, self.outer)


def tucker2(
    kernel: Float[Tensor, "filters channels *kernel"],
    rank_out: int,
    rank_in: int,
    *,
    sweeps: int = 20,
    tolerance: float = 1e-5,
) -> Tucker2:
    """Tucker-2 of a kernel by HOSVD and up to `sweeps` sweeps of HOOI, until the error falls by less than `tolerance`.

    Example:
        >>> kernel = torch.randn(6, 4, 3, 3, dtype=torch.float64)
        >>> torch.allclose(tucker2(kernel, 6, 4).kernel(), kernel)
        True
    """
    filters, channels = kernel.shape[:2]
    require(1 <= rank_out <= filters, f"rank_out is {rank_out}; give 1 to {filters}, the number of filters")
    require(1 <= rank_in <= channels, f"rank_in is {rank_in}; give 1 to {channels}, the number of channels")
    whole = kernel.double()
    outer, inner = _leading(whole, 0, rank_out), _leading(whole, 1, rank_in)
    best = _project(whole, outer, inner)
    errors = [_error(whole, best)]
    for _ in range(sweeps):
        outer_next = _leading(torch.einsum("nc...,cp->np...", whole, inner), 0, rank_out)
        inner_next = _leading(torch.einsum("nc...,nq->qc...", whole, outer_next), 1, rank_in)
        core = _project(whole, outer_next, inner_next)
        error = _error(whole, core)
        # In exact arithmetic a sweep never loses; at the floor of rounding it may, and then it is not taken.
        if error > errors[-1]:
            break
        outer, inner, best = outer_next, inner_next, core
        errors.append(error)
        if errors[-2] - error < tolerance:
            break
    return Tucker2(best, inner, outer, tuple(errors))


def _leading(tensor: Tensor, mode: int, rank: int) -> Float[Tensor, "size rank"]:
    """Orthonormal basis of the leading left singular subspace of an unfolding, by its Gram matrix."""
    flat = unfold(tensor, (mode,))
    _, vectors = torch.linalg.eigh(flat @ flat.T)
    return vectors[:, -rank:].flip(1)


def _project(kernel: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    return torch.einsum("nc...,cp,nq->qp...", kernel, inner, outer)


def _error(kernel: Tensor, core: Tensor) -> float:
    """With orthonormal factors the error needs no reconstruction: what the core does not hold is lost."""
    total = float(kernel.square().sum())
    return math.sqrt(max(0.0, 1.0 - float(core.square().sum()) / total)) if total else 0.0
