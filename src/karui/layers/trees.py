"""A sum of decision trees as a layer, walked level by level for all samples and trees at once."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from karui.layers.additive import Form, as_answer


class TreeSum(nn.Module):
    """`b` and the leaves that a sample reaches in each tree, added up. Inputs of any shape are flattened.

    At a node a sample goes left where its input is at most the threshold; a leaf leads to itself.

    Args:
        trees: number of trees.
        nodes: room for nodes of each tree.
        depth: most steps from a root to a leaf.
        outputs: numbers at each leaf.
        form: of the answer, see `karui.layers.additive.as_answer`.

    Example:
        >>> TreeSum(trees=3, nodes=7, depth=2, outputs=4)(torch.zeros(5, 6)).shape
        torch.Size([5, 4])
    """

    def __init__(self, trees: int, nodes: int, depth: int, outputs: int, form: Form = "numbers") -> None:
        super().__init__()
        self.trees, self.nodes, self.depth, self.outputs = trees, nodes, depth, outputs
        self.form: Form = form
        self.intercept = nn.Parameter(torch.zeros(outputs))
        self.values = nn.Parameter(torch.zeros(trees * nodes, outputs))
        own = torch.arange(trees * nodes)
        self.register_buffer("inputs", torch.zeros_like(own))
        self.register_buffer("thresholds", torch.zeros(trees * nodes))
        self.register_buffer("lower", own.clone())
        self.register_buffer("higher", own.clone())
        self.inputs: Tensor
        self.thresholds: Tensor
        self.lower: Tensor
        self.higher: Tensor

    def settings(self) -> dict[str, Any]:
        """What `TreeSum(**settings)` rebuilds it from."""
        return {name: getattr(self, name) for name in ("trees", "nodes", "depth", "outputs", "form")}

    def forward(self, input: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *answer"]:  # noqa: A002
        """The sum over all trees."""
        x = input.flatten(1)
        roots = torch.arange(self.trees, device=x.device) * self.nodes
        node = roots + torch.zeros_like(x[:, :1], dtype=torch.long)
        for _ in range(self.depth):
            low = x.gather(1, self.inputs[node]) <= self.thresholds[node]
            node = torch.where(low, self.lower[node], self.higher[node])
        return as_answer(functional.embedding(node, self.values).sum(1) + self.intercept, self.form)
