"""Product quantisation of kernels: codebooks for slices of the input channels, and a code for each slice.

Wu, Leng, Wang, Hu, Cheng 2016 (survey 19). Channels are split into subspaces; in each, the vectors of all filters (and
of all positions of the kernel) are replaced by one of few codewords. The error of responses on any number of inputs is
a function of their second moments, so it is corrected on all of them at once, subspace by subspace: codewords by least
squares, codes by trying all codewords for one position of the kernel at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from karui.numerics.clusters import kmeans
from karui.numerics.regression import Moments


@dataclass(frozen=True)
class ProductCode:
    """A kernel `[filters, channels, taps]` as codewords and codes: `kernel[n, m] = books[m, codes[n, m, t]]` at tap t.

    Settings:
        books: codewords of each subspace, in float64.
        codes: number of the codeword of each filter, subspace and position of the kernel.
    """

    books: Float[Tensor, "subspaces codewords size"]
    codes: Int[Tensor, "filters subspaces taps"]

    def kernel(self) -> Float[Tensor, "filters channels taps"]:
        """The kernel that it stands for."""
        return decoded(self.books, self.codes)


def decoded(
    books: Float[Tensor, "subspaces codewords size"], codes: Int[Tensor, "filters subspaces taps"]
) -> Float[Tensor, "filters channels taps"]:
    """Look the codewords up."""
    subspaces, codewords, size = books.shape
    start = torch.arange(subspaces, device=codes.device)[:, None] * codewords
    vectors = torch.nn.functional.embedding(codes.long() + start, books.reshape(subspaces * codewords, size))
    return vectors.transpose(2, 3).flatten(1, 2)


def code_bits(codewords: int) -> int:
    """Bits of a code, 1 to 8 for up to 256 codewords."""
    return max(1, math.ceil(math.log2(codewords)))


def stored_bytes(channels: int, size: int, codewords: int, filters: int, taps: int, *, each: int = 4) -> int:
    """Bytes of codebooks and packed codes: `4 C K + taps N (C / C') log2(K) / 8` in the paper's symbols.

    A number of a codebook takes `each` bytes, in the paper 4.

    Example:
        >>> stored_bytes(9216, 4, 32, 4096, 1) == 1_179_648 + 5_898_240
        True
    """
    return each * channels * codewords + math.ceil(taps * filters * (channels // size) * code_bits(codewords) / 8)


def product_code(
    kernel: Float[Tensor, "filters channels taps"], size: int, codewords: int, seed: int = 0
) -> ProductCode:
    """The code of least error of the kernel itself that k-means finds, subspace by subspace.

    Args:
        kernel: its channels part into subspaces of `size`.
        size: channels of a subspace.
        codewords: of each subspace; as many as there are different vectors make it exact.
        seed: of the start.
    """
    filters, _, taps = kernel.shape
    books, codes = [], []
    for part in kernel.detach().double().split(size, 1):
        vectors = part.transpose(1, 2).reshape(filters * taps, size)
        found = kmeans(vectors, min(codewords, len(vectors)), restarts=1, seed=seed)
        spare = codewords - len(found.centres)
        books.append(torch.cat([found.centres, found.centres.new_zeros(spare, size)]))
        codes.append(found.labels.reshape(filters, taps))

    return ProductCode(torch.stack(books), torch.stack(codes, 1))


@dataclass(frozen=True)
class Quadratic:
    """The squared error of responses as a function of the kernel: `tr(W xx W^T) - 2 tr(W yx^T) + yy`, rows are filters.

    Settings:
        xx: second moments of what the filters see, `[channels taps, channels taps]`.
        yx: of the wanted responses with it.
        yy: sum of the squares of the wanted responses.
    """

    xx: Float[Tensor, "seen seen"]
    yx: Float[Tensor, "filters seen"]
    yy: float

    @classmethod
    def of(cls, moments: Moments, bias: Float[Tensor, "filters"] | None) -> Quadratic:
        """The error with the bias as it is: it is taken off the responses."""
        if bias is None:
            return cls(moments.xx, moments.yx, float(moments.yy.trace()))
        fixed = bias.detach().double().cpu()
        total = moments.yy.trace() - 2 * fixed @ moments.y + moments.count * fixed @ fixed
        return cls(moments.xx, moments.yx - fixed.outer(moments.x), float(total))

    def error(self, kernel: Float[Tensor, "filters channels taps"]) -> float:
        """Sum of the squared errors."""
        flat = kernel.flatten(1)
        return max(0.0, self.yy + float(((flat @ self.xx - 2 * self.yx) * flat).sum()))


Watch = Callable[[str, float], None]
"""Told after each half-step: "codewords" or "codes", and the sum of the squared errors."""


def corrected(
    start: ProductCode, wanted: Quadratic, *, sweeps: int = 3, turns: int = 2, watch: Watch | None = None
) -> ProductCode:
    """The code after block coordinate descent on the error of responses, which never rises.

    Args:
        start: from k-means.
        wanted: the error.
        sweeps: passes over all subspaces.
        turns: of codewords and codes in each subspace, in a pass.
        watch: told after each half-step; the error takes about as long as the step.
    """
    current = start
    for _ in range(sweeps):
        for subspace in range(len(start.books)):
            for _ in range(turns):
                for name, step in (("codewords", _better_words), ("codes", _better_codes)):
                    current = step(current, wanted, subspace)
                    if watch is not None:
                        watch(name, wanted.error(current.kernel()))
    return current


def _places(code: ProductCode, subspace: int) -> Int[Tensor, "taps size"]:
    """Where the vectors of a subspace lie in a flat kernel, position by position of the kernel."""
    size, taps = code.books.shape[2], code.codes.shape[2]
    channels = torch.arange(subspace * size, (subspace + 1) * size)
    return channels * taps + torch.arange(taps)[:, None]


def _better_words(code: ProductCode, wanted: Quadratic, subspace: int) -> ProductCode:
    """All codewords of a subspace at once: least squares over every response that they enter."""
    _, codewords, size = code.books.shape
    places, codes = _places(code, subspace), code.codes[:, subspace]
    taps = len(places)
    flat = places.flatten()
    pull = wanted.yx[:, flat] - code.kernel().flatten(1) @ wanted.xx[:, flat]
    right = torch.zeros(codewords, size, dtype=torch.float64)
    right.index_add_(0, codes.flatten(), pull.reshape(-1, size))
    chosen = torch.nn.functional.one_hot(codes, codewords).double().flatten(1)
    seen = wanted.xx[flat][:, flat].reshape(taps, size, taps, size)
    normal = torch.zeros(codewords * codewords, size * size, dtype=torch.float64)
    for one in range(taps):  # all at once would take memory for every pair of positions
        met = chosen[:, one * codewords : (one + 1) * codewords].T @ chosen
        met = met.reshape(codewords, taps, codewords).transpose(1, 2).reshape(-1, taps)
        normal += met @ seen[one].transpose(0, 1).reshape(taps, -1)
    normal = normal.reshape(codewords, codewords, size, size).transpose(1, 2)
    step = _least_step(normal.reshape(codewords * size, -1), right.flatten()).reshape(codewords, size)
    books = code.books.clone()
    books[subspace] += step
    return replace(code, books=books)


def _least_step(normal: Tensor, right: Tensor) -> Tensor:
    """The step to a minimum; directions that no response shows (dead units, unused codewords) stay as they are.

    A pull to where it is, far below what changes a result, keeps the system solvable and never lets the error rise.
    """
    pull = 1e-9 * float(normal.diagonal().max())
    if not pull:
        return torch.zeros_like(right)
    lower = torch.linalg.cholesky(normal + pull * torch.eye(len(normal), dtype=normal.dtype))
    return torch.cholesky_solve(right[:, None], lower)[:, 0]


def _better_codes(code: ProductCode, wanted: Quadratic, subspace: int) -> ProductCode:
    """The best codeword for each filter, one position of the kernel after another, all codewords tried."""
    books, codes = code.books[subspace], code.codes.clone()
    kernel = code.kernel().flatten(1)
    for tap, here in enumerate(_places(code, subspace)):
        own = wanted.xx[here][:, here]
        pull = wanted.yx[:, here] - kernel @ wanted.xx[:, here] + kernel[:, here] @ own
        costs = ((books @ own) * books).sum(1) - 2 * pull @ books.T
        best = costs.argmin(1)
        # A tie, or rounding, must not move a code: the error then could not be told to fall.
        now = costs.gather(1, codes[:, subspace, tap, None])[:, 0]
        moves = costs.gather(1, best[:, None])[:, 0] < now - 1e-12 * now.abs()
        codes[:, subspace, tap] = torch.where(moves, best, codes[:, subspace, tap])
        kernel[:, here] = books[codes[:, subspace, tap]]
    return replace(code, codes=codes)
