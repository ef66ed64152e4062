"""Class probabilities softened by a temperature, of one network or several, and the cross-entropy between them.

All are computed in single precision at least: they are small numbers, whose differences half precision loses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Rule = Callable[[Float[Tensor, "teachers batch classes *positions"], float], Float[Tensor, "batch classes *positions"]]
"""How the logits of several networks become one distribution: `arithmetic` or `geometric`, or another function."""


def widened(logits: Tensor) -> Tensor:
    """Floating-point numbers in single precision at least, as soft targets need it; others as they are.

    Example:
        >>> import torch
        >>> widened(torch.zeros(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) if logits.is_floating_point() else logits


def soften(logits: Float[Tensor, "batch classes *positions"], temperature: float) -> Float[Tensor, "..."]:
    """softmax(z / T) over the classes: the higher T, the more the small probabilities tell.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> [f"{soften(logits, temperature)[0, 1].item():.2f}" for temperature in (1.0, 10.0)]
        ['0.12', '0.45']
    """
    return (widened(logits) / temperature).softmax(1)


def log_soften(logits: Float[Tensor, "batch classes *positions"], temperature: float = 1.0) -> Float[Tensor, "..."]:
    """Its logarithm, exact also where a probability is 0 in rounding."""
    return (widened(logits) / temperature).log_softmax(1)


def arithmetic(logits: Float[Tensor, "teachers batch classes *positions"], temperature: float) -> Float[Tensor, "..."]:
    """The mean of the softened probabilities of several networks."""
    softened = (widened(logits) / temperature).softmax(2)
    return softened[0] if len(softened) == 1 else softened.mean(0)


def geometric(logits: Float[Tensor, "teachers batch classes *positions"], temperature: float) -> Float[Tensor, "..."]:
    """Their normalised geometric mean: the softmax of the mean of their softened logits."""
    return (widened(logits) / temperature).mean(0).softmax(1)


def soft_cross_entropy(
    logits: Float[Tensor, "batch classes *positions"],
    targets: Float[Tensor, "batch classes *positions"],
    temperature: float,
) -> Float[Tensor, ""]:
    """T² times the cross-entropy of softmax(z / T) against soft targets, averaged over the batch (and positions).

    The gradient of the cross-entropy shrinks as 1/T²; the factor keeps the balance with a hard loss at any T.

    Example:
        >>> import torch
        >>> z = torch.tensor([[1.0, 3.0]], requires_grad=True)
        >>> soft_cross_entropy(z, soften(torch.tensor([[3.0, 5.0]]), 2.0), 2.0).backward()
        >>> z.grad.abs().max().item() < 1e-6
        True
    """
    samples = logits.numel() / logits.shape[1]
    return (targets * log_soften(logits, temperature)).sum() * -(temperature**2 / samples)


def distillation_loss(
    logits: Float[Tensor, "batch classes *positions"],
    targets: Float[Tensor, "batch classes *positions"],
    hard: Float[Tensor, ""],
    *,
    temperature: float,
    weight: float,
) -> Float[Tensor, ""]:
    """The loss of distillation, a T² CE(soft) + (1 - a) hard; at a = 1 no label counts, not even a missing one.

    Args:
        logits: the student's, without temperature.
        targets: the teachers' probabilities at this temperature.
        hard: the loss against the labels, at temperature 1.
        temperature: T.
        weight: a, in [0, 1].
    """
    if weight == 0:
        return hard
    soft = soft_cross_entropy(logits, targets, temperature)
    return soft if weight == 1 else torch.add((1 - weight) * hard, soft, alpha=weight)
