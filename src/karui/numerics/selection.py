"""Which entries of a tensor survive: by rank, by threshold, or at random; always within a mask, so that masks nest."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def keep_largest(scores: Float[Tensor, "*shape"], alive: Bool[Tensor, "*shape"], count: int) -> Bool[Tensor, "*shape"]:
    """The `count` entries of largest score among those alive (all of these, if they are fewer).

    Exactly that many survive: of equal scores the earlier entries do.

    Example:
        >>> keep_largest(torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([False, True, True, True]), 2).tolist()
        [False, False, True, True]
    """
    ranked = scores.detach().masked_fill(~alive, -torch.inf).reshape(-1).argsort(descending=True, stable=True)
    chosen = torch.zeros_like(alive).reshape(-1)
    chosen[ranked[:count]] = True
    return chosen.reshape(alive.shape) & alive


def keep_largest_overall(
    scores: Mapping[str, Float[Tensor, "..."]], alive: Mapping[str, Bool[Tensor, "..."]], count: int, *, least: int = 1
) -> dict[str, Bool[Tensor, "..."]]:
    """The `count` entries of largest score over all tensors, but no fewer than `least` of any one.

    The floor keeps a ranking over all layers from emptying one of them, which would cut the network in two.

    Example:
        >>> scores = {"a": torch.tensor([9.0, 8.0, 7.0]), "b": torch.tensor([1.0, 2.0])}
        >>> alive = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
        >>> {name: mask.tolist() for name, mask in keep_largest_overall(scores, alive, 3).items()}
        {'a': [True, True, False], 'b': [False, True]}
    """
    first = {name: keep_largest(score, alive[name], least) for name, score in scores.items()}
    # What the floor has claimed ranks before everything else and counts towards `count`.
    ranked = {name: score.detach().masked_fill(first[name], torch.inf) for name, score in scores.items()}
    flat = torch.cat([ranked[name].reshape(-1) for name in scores])
    living = torch.cat([alive[name].reshape(-1) for name in scores])
    claimed = sum(int(mask.sum()) for mask in first.values())
    chosen = keep_largest(flat, living, max(count, claimed))
    parts = chosen.split([score.numel() for score in scores.values()])
    return {name: part.reshape(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def threshold(weight: Float[Tensor, "..."], alive: Bool[Tensor, "..."], quality: float) -> float:
    """`quality` times the standard deviation of the weights alive; those already pruned do not count.

    Example:
        >>> weight = torch.tensor([1.0, -1.0, 0.0])
        >>> round(threshold(weight, weight != 0, 0.5), 4)
        0.7071
    """
    living = weight.detach()[alive]
    return quality * float(living.std()) if living.numel() > 1 else 0.0


def keep_above(
    weight: Float[Tensor, "*shape"], alive: Bool[Tensor, "*shape"], quality: float
) -> Bool[Tensor, "*shape"]:
    """The entries alive whose absolute value is not below `threshold`.

    Example:
        >>> weight = torch.tensor([1.0, -1.0, 0.1, -0.1])
        >>> keep_above(weight, torch.ones(4, dtype=torch.bool), 1.0).tolist()
        [True, True, False, False]
    """
    return alive & (weight.detach().abs() >= threshold(weight, alive, quality))


def rearranged(mask: Bool[Tensor, "*shape"], generator: torch.Generator) -> Bool[Tensor, "*shape"]:
    """As many survivors, at places drawn anew.

    Example:
        >>> mask = torch.tensor([True, True, False, False, False])
        >>> int(rearranged(mask, torch.Generator().manual_seed(0)).sum())
        2
    """
    order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
    return mask.reshape(-1)[order].reshape(mask.shape)
