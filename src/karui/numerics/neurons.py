"""How well one neuron alone tells something, and which neurons to keep so that they tell much and not the same."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def ranks(values: Float[Tensor, "samples neurons"]) -> Float[Tensor, "samples neurons"]:
    """The rank of each sample for each neuron, from 1; equal values share the mean of their ranks.

    Example:
        >>> ranks(torch.tensor([[3.0], [1.0], [3.0]])).flatten().tolist()
        [2.5, 1.0, 2.5]
    """
    ordered = values.T.contiguous().sort(1).values
    below = torch.searchsorted(ordered, values.T.contiguous(), right=False)
    upto = torch.searchsorted(ordered, values.T.contiguous(), right=True)
    return ((below + 1 + upto).double() / 2).T


def one_neuron_auc(
    values: Float[Tensor, "samples neurons"], positive: Bool[Tensor, "samples attributes"]
) -> Float[Tensor, "neurons attributes"]:
    """Area under the ROC curve of each neuron as a detector of each attribute, or of its absence: 0.5 to 1.

    A low response tells as much as a high one. Only the order of responses counts, so that a neuron's scale does not.
    An attribute that all samples have, or none, tells nothing: 0.5.

    Example:
        >>> one_neuron_auc(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[True], [False], [False]])).item()
        1.0
    """
    number = positive.double().sum(0)
    others = len(values) - number
    area = ranks(values).T @ positive.double() - number * (number + 1) / 2
    area = area / (number * others).clamp(min=1)
    area = torch.where((number == 0) | (others == 0), 0.5, area)
    return torch.maximum(area, 1 - area)


def anova_f(values: Float[Tensor, "samples neurons"], classes: Int[Tensor, "samples"]) -> Float[Tensor, "neurons"]:
    """One-way analysis of variance: the variance between classes over that within, each by its degrees of freedom.

    A neuron that is constant within each class has F infinite, one that is constant at all 0.

    Example:
        >>> anova_f(torch.tensor([[0.0], [2.0], [10.0], [12.0]]), torch.tensor([0, 0, 1, 1])).item()
        50.0
    """
    rows, kinds = values.double(), classes.unique()
    mean, between, within = rows.mean(0), torch.zeros(rows.shape[1]).double(), torch.zeros(rows.shape[1]).double()
    for kind in kinds:
        part = rows[classes == kind]
        between += len(part) * (part.mean(0) - mean).square()
        within += (part - part.mean(0)).square().sum(0)
    f = (between / max(1, len(kinds) - 1)) / (within / max(1, len(rows) - len(kinds)))
    return torch.where(between == 0, 0.0, f)


def likeness(descriptors: Float[Tensor, "neurons attributes"], width: float) -> Float[Tensor, "neurons neurons"]:
    """exp(-||a_i - a_j||² / (2 s²)), s the width, and 0 on the diagonal: how alike two neurons' profiles are."""
    alike = torch.exp(-torch.cdist(descriptors, descriptors).square() / (2 * width**2))
    return alike - torch.diag(alike.diagonal())


def energy(
    kept: Float[Tensor, "*sets neurons"], cost: Float[Tensor, "neurons"], alike: Float[Tensor, "neurons neurons"],
    weight: float,
) -> Float[Tensor, "*sets"]:  # fmt: skip
    """E(y) = sum_i cost_i y_i + weight sum_{i != j} alike_ij y_i y_j, of one set of neurons or of many."""
    return kept @ cost + weight * ((kept @ alike) * kept).sum(-1)


def free_energy(
    q: Float[Tensor, "neurons"], cost: Float[Tensor, "neurons"], alike: Float[Tensor, "neurons neurons"],
    weight: float, temperature: float,
) -> float:  # fmt: skip
    """E(q) less the temperature times the entropy of independent choices with probabilities q."""
    entropy = -(torch.xlogy(q, q) + torch.xlogy(1 - q, 1 - q)).sum()
    return float(energy(q, cost, alike, weight) - temperature * entropy)


def sweep(
    q: Float[Tensor, "neurons"], cost: Float[Tensor, "neurons"], alike: Float[Tensor, "neurons neurons"],
    weight: float, temperature: float,
) -> Float[Tensor, "neurons"]:  # fmt: skip
    """One pass of mean field, neuron after neuron: each update is the best for that neuron, the others as they are."""
    q = q.clone()
    for i in range(len(q)):
        q[i] = torch.sigmoid(-(cost[i] + 2 * weight * (alike[i] @ q)) / temperature)
    return q


def mean_field(
    cost: Float[Tensor, "neurons"],
    alike: Float[Tensor, "neurons neurons"],
    weight: float,
    *,
    temperature: float = 0.01,
    tolerance: float = 1e-4,
) -> Float[Tensor, "neurons"]:
    """Probabilities to keep each neuron that nearly minimise the energy: mean field, cooled to a temperature.

    It starts at 1 (all choices open) and halves the temperature; at each, sweeps go on until no probability changes by
    more than the tolerance.

    Example:
        >>> mean_field(torch.tensor([-1.0, 0.5]), torch.zeros(2, 2), 0.0).round().tolist()
        [1.0, 0.0]
    """
    q, now = torch.full_like(cost, 0.5), 1.0
    while True:
        for _ in range(200):
            following = sweep(q, cost, alike, weight, now)
            change, q = float((following - q).abs().max()), following
            if change < tolerance:
                break
        if now <= temperature:
            return q
        now = max(temperature, now / 2)


def resized(
    kept: Bool[Tensor, "neurons"], number: int, cost: Float[Tensor, "neurons"],
    alike: Float[Tensor, "neurons neurons"], weight: float,
) -> Bool[Tensor, "neurons"]:  # fmt: skip
    """A set of so many neurons near one of another size: of little energy for its size.

    Neurons come or go one after another, each time the one that leaves the energy lowest given those kept then; at last
    one is exchanged for another for as long as that lowers the energy.

    Args:
        kept: where it starts.
        number: of neurons to keep; all where there are fewer.
        cost: of each neuron.
        alike: of each two.
        weight: of a pair.

    Example:
        >>> twins = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> resized(torch.tensor([True, False, False]), 2, torch.tensor([-1.0, -1.0, 0.1]), twins, 5.0).tolist()
        [True, False, True]
    """
    y, cost, alike, number = kept.to(torch.float64), cost.double(), alike.double(), min(number, len(kept))
    while (change := number - int(y.sum())) != 0:
        marginal = cost + 2 * weight * (alike @ y)
        place = marginal.masked_fill(y > 0, torch.inf).argmin() if change > 0 else (
            marginal.masked_fill(y == 0, -torch.inf).argmax()
        )  # fmt: skip
        y[place] = 1 - y[place]
    while 0 < number < len(y):
        marginal, inside, outside = cost + 2 * weight * (alike @ y), y.nonzero()[:, 0], (y == 0).nonzero()[:, 0]
        gain = marginal[inside][:, None] - marginal[outside] + 2 * weight * alike[inside][:, outside]
        best = int(gain.argmax())
        if float(gain.flatten()[best]) <= 1e-9 * (1 + float(marginal.abs().max())):
            break
        y[inside[best // len(outside)]], y[outside[best % len(outside)]] = 0.0, 1.0
    return y > 0
