"""Several classifiers as one: the mean of their probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float


class Averaged(nn.Module):
    """Gives the logarithm of the mean of its members' class probabilities: logits, whose softmax is that mean.

    Args:
        members: networks that take the same inputs and give logits `[batch, classes, ...]`.

    Example:
        >>> net = nn.Linear(4, 3)
        >>> x = torch.rand(2, 4)
        >>> bool(torch.allclose(Averaged([net, net])(x).softmax(1), net(x).softmax(1)))
        True
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, *inputs: Any) -> Float[Tensor, "batch classes *positions"]:
        """Logits of the whole."""
        logits = torch.stack([member(*inputs).log_softmax(1) for member in self.members])
        return logits.logsumexp(0) - torch.tensor(len(self.members), dtype=logits.dtype, device=logits.device).log()
