"""The output layer of SVD-Softmax: preview logits for a whole vocabulary, exact ones for the most likely words.

Shim, Lee, Choi, Boo, Sung 2017, "SVD-Softmax: Fast Softmax Approximation on Large Vocabulary Neural Networks", NIPS.

Paper -> here: `A = U Sigma V^T` -> the linear layer's weight, `B = U Sigma` -> `preview` and `rest` side by side, `V^T`
-> `rotation`, `W` -> window, `N` -> full_view, `h~` -> the rotated input.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from karui.errors import require
from karui.numerics.full_view import full_view


class SvdSoftmaxHead(nn.Module):
    """A linear layer for inference, whose `full_view` largest outputs are exact and the others estimates.

    Estimates use the first `window` coordinates of the input, turned so that those matter most. The softmax is over
    all outputs: estimates feed the normaliser, and every word keeps a probability. While training, all outputs
    are exact and the layer's own weights stay as they are.

    Shapes: `rotation` `[inputs, inputs]`, `preview` `[outputs, window]`, `rest` `[outputs, inputs - window]`; each is
    contiguous, so that the preview reads nothing else.

    Settings:
        in_features: width of the input.
        out_features: size of the vocabulary.
        window: coordinates that the preview uses, 1 to `in_features` (then everything is exact).
        full_view: outputs that are made exact, 0 (preview only) to `out_features`.
        bias: whether there is one.

    Example:
        >>> head = SvdSoftmaxHead.from_linear(nn.Linear(16, 100), window=16, full_view=5).eval()
        >>> head(torch.zeros(2, 16)).shape
        torch.Size([2, 100])
    """

    def __init__(self, in_features: int, out_features: int, window: int, full_view: int, bias: bool = True) -> None:
        super().__init__()
        require(1 <= window <= in_features, f"window is {window}; give 1 to {in_features}, the width of the input")
        within = 0 <= full_view <= out_features
        require(within, f"full_view is {full_view}; give 0 to {out_features}, the number of outputs")
        self.in_features, self.out_features = in_features, out_features
        self.window, self.full_view = window, full_view
        self.rotation = _frozen(in_features, in_features)
        self.preview = _frozen(out_features, window)
        self.rest = _frozen(out_features, in_features - window)
        self.bias = _frozen(out_features) if bias else None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, window: int, full_view: int, basis: Float[Tensor, "inputs inputs"] | None = None
    ) -> SvdSoftmaxHead:
        """The head that stands for a trained linear layer, in its type, place and mode.

        Args:
            linear: the trained layer.
            window: coordinates that the preview uses.
            full_view: outputs that are made exact.
            basis: orthogonal, the new coordinates as columns; None takes the weight's right singular vectors, as the
                paper does, and any other serves for comparison.
        """
        head = cls(linear.in_features, linear.out_features, window, full_view, bias=linear.bias is not None)
        head.to(linear.weight).train(linear.training)
        head.rebuild(linear.weight, linear.bias, basis)
        return head

    def settings(self) -> dict[str, Any]:
        """What `SvdSoftmaxHead(**settings)` rebuilds it from."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "window": self.window,
            "full_view": self.full_view,
            "bias": self.bias is not None,
        }

    @torch.no_grad()
    def rebuild(
        self,
        weight: Float[Tensor, "outputs inputs"],
        bias: Float[Tensor, "outputs"] | None = None,
        basis: Float[Tensor, "inputs inputs"] | None = None,
    ) -> None:
        """Take over the weight (and bias) of the linear layer, for example after it was trained further."""
        turned, rotation = rotate(weight) if basis is None else (weight @ basis, basis.T)
        self.rotation.copy_(rotation)
        self.preview.copy_(turned[:, : self.window])
        self.rest.copy_(turned[:, self.window :])
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def forward(self, hidden: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Logits: exact for the `full_view` words of the largest previews, the previews for all others."""
        turned = functional.linear(hidden, self.rotation)
        previews = self._previews(turned)
        if self.training or self.window == self.in_features or self.full_view == self.out_features:
            return previews + functional.linear(turned[..., self.window :], self.rest)
        if not self.full_view:
            return previews
        exact, words = self._full_view(turned, previews)
        return previews.scatter(-1, words, exact)

    def log_prob(self, hidden: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Log-probabilities of all words."""
        return self(hidden).log_softmax(-1)

    def softmax(self, hidden: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Probabilities of all words; they sum to 1."""
        return self(hidden).softmax(-1)

    def topk(
        self, hidden: Float[Tensor, "*batch inputs"], k: int
    ) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
        """The `k` largest of the exact logits and their words, in falling order, without a pass over all logits.

        Raises:
            SettingError: `k` is more than the number of exact logits.
        """
        everything = self.window == self.in_features or self.full_view == self.out_features
        count = self.out_features if everything else self.full_view
        require(1 <= k <= count, f"k is {k}; give 1 to {count}, the number of exact logits")
        if everything:
            values, words = self(hidden).topk(k)
            return values, words
        turned = functional.linear(hidden, self.rotation)
        exact, candidates = self._full_view(turned, self._previews(turned))
        values, places = exact.topk(k)
        return values, candidates.gather(-1, places)

    def _previews(self, turned: Tensor) -> Tensor:
        return functional.linear(turned[..., : self.window], self.preview, self.bias)

    def _full_view(self, turned: Tensor, previews: Tensor) -> tuple[Tensor, Tensor]:
        """Exact logits of the words with the largest previews, and these words: the rest of their rows is added."""
        return full_view(previews, self.rest, turned[..., self.window :], self.full_view)


def rotate(
    weight: Float[Tensor, "outputs inputs"],
) -> tuple[Float[Tensor, "outputs inputs"], Float[Tensor, "inputs inputs"]]:
    """`B = U Sigma` and `R^T` of the thin SVD `weight = U Sigma R^T`: `weight h = B (R^T h)` for every `h`.

    Columns of `B` have falling norms. `R` comes from the small Gram matrix of the inputs: it is orthogonal to rounding
    whatever the spectrum, and `B = weight R` is then exact.
    """
    matrix = weight.detach().double()
    _, vectors = torch.linalg.eigh(matrix.T @ matrix)
    basis = vectors.flip(1)
    return matrix @ basis, basis.T


def operations(outputs: int, inputs: int, window: int, full_view: int) -> int:
    """Multiply-adds for one input: rotation, preview, rest of the rows in full view (`outputs inputs` before)."""
    return inputs * inputs + outputs * window + full_view * (inputs - window)


def _frozen(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape), requires_grad=False)
