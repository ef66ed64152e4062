"""An additive model of one and two inputs as a layer: look up each input's bin in its table, and add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

Form = Literal["numbers", "vector", "binary"]


def as_answer(scores: Float[Tensor, "batch outputs"], form: Form) -> Float[Tensor, "batch *answer"]:
    """Scores in the form of the network that they stand for.

    Args:
        scores: one column for each output.
        form: "numbers" as they are; "vector", the only column as `[batch]`; "binary", the only column is the logit of
            class 1 against class 0, given as two logits that add up to zero.

    Example:
        >>> as_answer(torch.tensor([[3.0]]), "binary").tolist()
        [[-1.5, 1.5]]
    """
    if form == "vector":
        return scores[:, 0]
    return torch.cat([-scores / 2, scores / 2], dim=1) if form == "binary" else scores


class Additive(nn.Module):
    """`b + sum of h_i(x_i) + sum of h_ij(x_i, x_j)`, each h a table over bins.

    Inputs of any shape are flattened. The tables are parameters, the edges of the bins are not.

    Args:
        bins: number of bins of each input.
        outputs: columns of the tables.
        pairs: inputs of each pair.
        pair_bins: number of bins of each input within pairs.
        form: of the answer, see `as_answer`.

    Example:
        >>> Additive(bins=(3, 2), outputs=4, pairs=((0, 1),), pair_bins=(3, 2))(torch.zeros(5, 2)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        bins: Sequence[int],
        outputs: int,
        pairs: Sequence[Sequence[int]] = (),
        pair_bins: Sequence[int] = (),
        form: Form = "numbers",
    ) -> None:
        super().__init__()
        self.bins, self.outputs = tuple(bins), outputs
        self.form: Form = form
        self.pairs, self.pair_bins = tuple((int(i), int(j)) for i, j in pairs), tuple(pair_bins)
        self.intercept = nn.Parameter(torch.zeros(outputs))
        self.tables = nn.Parameter(torch.zeros(sum(self.bins), outputs))
        self.register_buffer("edges", _no_edges(self.bins))
        self.register_buffer("starts", _starts(self.bins))
        self.edges: Tensor
        self.starts: Tensor
        cells = [self.pair_bins[i] * self.pair_bins[j] for i, j in self.pairs]
        if self.pairs:
            self.pair_tables = nn.Parameter(torch.zeros(sum(cells), outputs))
            self.register_buffer("pair_edges", _no_edges(self.pair_bins))
            self.register_buffer("pair_starts", _starts(cells))
            self.register_buffer("ends", torch.tensor(self.pairs).T.contiguous())
            self.register_buffer("strides", torch.tensor([self.pair_bins[j] for _, j in self.pairs]))
            self.pair_edges: Tensor
            self.pair_starts: Tensor
            self.ends: Tensor
            self.strides: Tensor

    def settings(self) -> dict[str, Any]:
        """What `Additive(**settings)` rebuilds it from."""
        return {
            "bins": list(self.bins),
            "outputs": self.outputs,
            "pairs": [list(pair) for pair in self.pairs],
            "pair_bins": list(self.pair_bins),
            "form": self.form,
        }

    def forward(self, input: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *answer"]:  # noqa: A002
        """The sum of what the tables hold at the bins of each sample."""
        x = input.flatten(1)
        places = _places(x, self.edges) + self.starts
        scores = functional.embedding(places, self.tables).sum(1) + self.intercept
        if self.pairs:
            within = _places(x, self.pair_edges)
            first, second = within.index_select(1, self.ends[0]), within.index_select(1, self.ends[1])
            cells = first * self.strides + second + self.pair_starts
            scores = scores + functional.embedding(cells, self.pair_tables).sum(1)
        return as_answer(scores, self.form)


def _places(x: Float[Tensor, "batch inputs"], edges: Float[Tensor, "inputs edges"]) -> Int[Tensor, "batch inputs"]:
    return (x.unsqueeze(2) >= edges).sum(2)


def _no_edges(bins: Sequence[int]) -> Tensor:
    """Room for the edges of each input; where it has fewer than others, infinity, which no value reaches."""
    return torch.full((len(bins), max([1, *(n - 1 for n in bins)])), torch.inf)


def _starts(sizes: Sequence[int]) -> Tensor:
    return torch.tensor([0, *sizes[:-1]]).cumsum(0)
