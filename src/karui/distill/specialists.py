"""Specialists: networks that each know a few confusable classes, and how they speak together (survey 30, section 5).

Where there are very many classes, an ensemble of whole networks is too dear. A specialist tells a set of classes that
the generalist confuses, and calls all others by one "dustbin" class.

Paper -> here: S^m -> classes, p^g -> general, p^m -> special, q -> the combined distribution.

DEPARTURE: q is found by the fixed-point iteration that setting the gradient to zero gives (each step lowers the sum of
divergences, and none needs a step size), where the paper descends the gradient for each image. Both end at the same q.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from karui.data import Batches
from karui.errors import SurgeryError, UsageError, require
from karui.measuring.inference import inference
from karui.model import Classification, Model, Note, layer_at, replace_layers
from karui.model.task import labelled

if TYPE_CHECKING:
    from karui.technique import Bench


STARTS = 10
"""Runs of k-means, of which the closest is taken: from an unlucky start it ends with two centres in one cluster."""


def confusable_classes(
    probabilities: Float[Tensor, "samples classes"], clusters: int, *, seed: int = 0, passes: int = 20
) -> tuple[tuple[int, ...], ...]:
    """Classes that a network often predicts together: on-line k-means on the columns of its predictions' covariance.

    Args:
        probabilities: what the generalist says of samples.
        clusters: number of sets at most; one that stays empty is left out.
        seed: draws the first centres and the order of the columns, of each of ten starts.
        passes: how often each column is seen.

    Raises:
        UsageError: there are more clusters than classes.

    Example:
        >>> noise = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
        >>> pairs = torch.stack([noise[:, 0], 1 - noise[:, 0], noise[:, 1], 1 - noise[:, 1]], 1) / 2
        >>> len(confusable_classes(pairs, 2))
        2
    """
    classes = probabilities.shape[1]
    require(
        0 < clusters <= classes,
        f"{clusters} clusters of {classes} classes are asked for.",
        "Give a number from 1 to that of the classes.",
        UsageError,
    )
    columns = torch.cov(probabilities.double().T)
    generator = torch.Generator().manual_seed(seed)
    _, nearest = min((_online(columns, clusters, passes, generator) for _ in range(STARTS)), key=lambda found: found[0])
    sets = [tuple((nearest == k).nonzero().flatten().tolist()) for k in range(clusters)]
    return tuple(members for members in sets if members)


def _online(
    columns: Float[Tensor, "classes classes"], clusters: int, passes: int, generator: torch.Generator
) -> tuple[float, Int[Tensor, "classes"]]:
    """One run of k-means, a column at a time: the sum of squared distances, and each column's centre."""
    centres = columns[torch.randperm(len(columns), generator=generator)[:clusters]].clone()
    counts = torch.ones(clusters)
    for _ in range(passes):
        for column in columns[torch.randperm(len(columns), generator=generator)]:
            closest = int((centres - column).square().sum(1).argmin())
            counts[closest] += 1
            centres[closest] += (column - centres[closest]) / counts[closest]
    distances, nearest = torch.cdist(columns, centres).min(1)
    return float(distances.square().sum()), nearest


def combine(
    general: Float[Tensor, "samples classes"],
    special: Sequence[Float[Tensor, "samples members_and_dustbin"]],
    classes: Sequence[Sequence[int]],
    active: Bool[Tensor, "samples specialists"],
    *,
    tolerance: float = 1e-10,
    limit: int = 10_000,
) -> Float[Tensor, "samples classes"]:
    """The q that minimises KL(p^g, q) + sum over active specialists of KL(p^m, q), equation 5.

    For a specialist's term q is summed over the classes of its dustbin, which is its last probability. With A active
    ones the minimum satisfies (1 + A) q = p^g + sum of each p^m spread over the classes as q itself spreads them.

    Args:
        general: the generalist's probabilities.
        special: each specialist's, over its classes and the dustbin.
        classes: the classes of each specialist, in the order of its probabilities.
        active: which specialists speak of which sample.
        tolerance: the largest change of a probability at which the iteration ends.
        limit: iterations at most.

    Example:
        >>> general = torch.tensor([[0.4, 0.4, 0.2]])
        >>> sure = torch.tensor([[0.9, 0.1, 0.0]])  # of classes 0 and 1
        >>> q = combine(general, [sure], [(0, 1)], torch.tensor([[True]]))
        >>> bool(q[0, 0] > 0.6)
        True
    """
    p, q = general.double(), general.double()
    speaking = [number for number in range(len(special)) if active[:, number].any()]
    if not speaking:
        return general.clone()
    share = 1 / (1 + active.sum(1, keepdim=True).double())
    for _ in range(limit):
        total = p.clone()
        for number in speaking:
            total += active[:, number, None] * _spread(special[number].double(), classes[number], q)
        following = share * total
        change, q = float((following - q).abs().max()), following
        if change < tolerance:
            break
    return torch.where(active.any(1, keepdim=True), q.to(general.dtype), general)


def _spread(
    special: Float[Tensor, "samples members_and_dustbin"], members: Sequence[int], q: Float[Tensor, "samples classes"]
) -> Float[Tensor, "samples classes"]:
    """A specialist's probabilities over all classes, its dustbin's shared out as q has it."""
    rest = q.clone()
    rest[:, list(members)] = 0.0
    spread = special[:, -1:] * rest / rest.sum(1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
    spread[:, list(members)] = special[:, :-1]
    return spread


@dataclass(frozen=True, eq=False, kw_only=True)
class Specialist:
    """A network over `classes` and, last, a dustbin for all others."""

    model: Model
    classes: tuple[int, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Council:
    """A generalist and its specialists, asked together.

    Settings:
        generalist: knows all classes.
        specialists: each knows some.
    """

    generalist: Model
    specialists: tuple[Specialist, ...] = ()

    def probabilities(self, *inputs: Any, most: int = 1) -> Float[Tensor, "samples classes"]:
        """The combined probabilities; a specialist speaks if it knows one of the generalist's `most` likely classes."""
        general = _asked(self.generalist, inputs)
        if not self.specialists:
            return general
        likely = general.topk(most, dim=1).indices
        told = [tuple(one.classes) for one in self.specialists]
        active = torch.stack([torch.isin(likely, torch.tensor(known)).any(1) for known in told], 1)
        special = [_asked(one.model, inputs) for one in self.specialists]
        return combine(general, special, told, active)


def _asked(model: Model, inputs: tuple[Any, ...]) -> Float[Tensor, "samples classes"]:
    with inference(model.module) as module:
        return module(*inputs).softmax(1)


def relabel(targets: Int[Tensor, "samples"], classes: Sequence[int]) -> Int[Tensor, "samples"]:
    """Class numbers as a specialist counts them: its own from 0, all others in the dustbin behind.

    Numbers below 0 are no classes, such as the -100 of a sample without label, and stay.

    Example:
        >>> relabel(torch.tensor([7, 2, 5, 7]), [2, 7]).tolist()
        [1, 0, 2, 1]
    """
    places = torch.full((int(max(targets.max(), *classes)) + 1,), len(classes))
    places[list(classes)] = torch.arange(len(classes))
    return torch.where(targets < 0, targets, places[targets.clamp(min=0)])


def dustbin_shift(share: float) -> float:
    """What the dustbin's logit gains for a training in which the special classes were oversampled to one half.

    That is the log of how many times oftener than the others they were seen: (1 - share) / share.

    Example:
        >>> round(dustbin_shift(0.2), 3)
        1.386
    """
    return math.log((1 - share) / share)


def train_specialist(
    generalist: Model, classes: Sequence[int], bench: Bench, *, epochs: int | None = None, layer: str | None = None
) -> Specialist:
    """A specialist that starts as the generalist and is trained half on its classes, half on random others.

    Args:
        generalist: a classifier whose last layer is linear.
        classes: what it shall tell apart.
        bench: its training data are resampled for this, those without label left out; other data than tensors are read
            once.
        epochs: passes over the resampled data; None takes the training's.
        layer: path of the layer that gives the logits; None takes the last linear one.

    Raises:
        SurgeryError: the last layer is not linear.
        UsageError: the classes are fewer than two or are not in the data.
    """
    members = tuple(sorted(set(classes)))
    inputs, targets = Batches(bench.train).fetch(torch.arange(len(bench.train)))
    known = labelled(targets, generalist.task)
    special = torch.isin(targets, torch.tensor(members)) & known
    require(
        len(members) > 1 and bool(special.any()) and bool((known & ~special).any()),
        f"A specialist of the classes {', '.join(map(str, members))} has nothing to tell apart in the training data.",
        "Give some, not all, of the classes, and two at least.",
        UsageError,
    )
    generator = torch.Generator().manual_seed(bench.seed)
    mine, others = special.nonzero().flatten(), (known & ~special).nonzero().flatten()
    drawn = torch.randint(len(others), (len(mine),), generator=generator)
    index = torch.cat([mine, others[drawn]])
    data = TensorDataset(*(value[index] for value in inputs), relabel(targets[index], members))
    started, path = _narrowed(generalist, members, layer)
    if isinstance(started.task, Classification):  # its own class of that number is another one
        started = replace(started, task=replace(started.task, ignore=None))
    trained = replace(bench, train=data).fit(started, epochs=epochs, label="specialist")
    shift = dustbin_shift(float(special[known].double().mean()))
    with torch.no_grad():
        trained.module.get_parameter(f"{path}.bias")[-1] += shift
    note = Note(f"dustbin class corrected by {shift:.4g} for oversampling", {"classes": list(members)})
    return Specialist(model=trained.evolve(trained.module, note), classes=members)


def _narrowed(generalist: Model, members: tuple[int, ...], layer: str | None) -> tuple[Model, str]:
    """The generalist with a last layer of its own: rows of the members, and the mean of the others' for the dustbin."""
    linear = [path for path, part in generalist.module.named_modules() if isinstance(part, nn.Linear)]
    path = layer if layer is not None else (linear[-1] if linear else "")
    old = layer_at(generalist.module, path)
    if not isinstance(old, nn.Linear):
        raise SurgeryError("The generalist's last layer is not linear.", "Name a linear layer that gives the logits.")
    others = [c for c in range(old.out_features) if c not in members]
    new = nn.Linear(old.in_features, len(members) + 1)
    with torch.no_grad():
        new.weight.copy_(torch.cat([old.weight[list(members)], old.weight[others].mean(0, keepdim=True)]))
        bias = torch.zeros(old.out_features) if old.bias is None else old.bias
        # Together the others are as likely as all of them: log of their number more than their mean.
        new.bias.copy_(torch.cat([bias[list(members)], bias[others].mean(0, keepdim=True) + math.log(len(others))]))
    return replace_layers(generalist, {path: new}, check=False), path
