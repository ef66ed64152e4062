"""Which neurons of a layer to keep, and how well features tell same from different (survey 32)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from karui.data import Batches
from karui.distill._nuisances import NUISANCES, Change, changed
from karui.errors import NeedError, UsageError, require
from karui.model import Model
from karui.numerics.neurons import likeness, mean_field, one_neuron_auc, resized
from karui.train.guide import Guide
from karui.train.randomness import seed_of
from karui.train.statistics import flattened


def responses_of(model: Model, layer: str, dataset: Any) -> tuple[Float[Tensor, "samples neurons"], Any]:
    """What a layer gives for each sample, and the samples' targets."""
    guide, batches = Guide(model, (layer,)), Batches(dataset)
    rows, targets = [], []
    with torch.no_grad():
        for index in torch.arange(len(batches)).split(256):
            inputs, target = batches.fetch(index)
            rows.append(flattened(guide(inputs)[1], (layer,))[layer])
            targets.append(target)
    return torch.cat(rows), torch.cat(targets) if isinstance(targets[0], Tensor) else None


def descriptors_of(
    model: Model,
    layer: str,
    dataset: Any,
    attributes: Mapping[str, Bool[Tensor, "samples"]] | None = None,
    seed: int = 0,
    *,
    wanted: Mapping[str, Bool[Tensor, "samples"]] | None = None,
    changes: Mapping[str, Change] = NUISANCES,
) -> tuple[Float[Tensor, "neurons wanted"], Float[Tensor, "neurons unwanted"]]:
    """How well each neuron alone tells each wanted and each unwanted attribute, on data that it was not trained on.

    Args:
        model: the teacher.
        layer: path of its layer.
        dataset: held-out (picture, identity) pairs.
        attributes: unwanted ones by name, True where a sample has one; None changes the pictures instead.
        seed: draws which way each picture is changed.
        wanted: wanted attributes by name, such as sex and age, True where a sample has one; None takes the identities.
        changes: what is done to the pictures.

    Raises:
        NeedError: targets are not class numbers and no attributes are wanted instead, or inputs are not pictures and no
            attributes are given.
    """
    require_told(dataset, attributes, wanted)
    values, identity = responses_of(model, layer, dataset)
    if wanted is not None:
        good = one_neuron_auc(values, torch.stack(list(wanted.values()), 1))
    else:
        assert identity is not None  # noqa: S101  (required above)
        good = one_neuron_auc(values, identity[:, None] == identity.unique()[None])
    if attributes is not None:
        return good, one_neuron_auc(values, torch.stack(list(attributes.values()), 1))
    pictures = Batches(dataset).fetch(torch.arange(len(values)))[0][0]
    unwanted, guide = [], Guide(model, (layer,))
    for number, change in enumerate(changes.values()):
        other, more = changed(pictures, change, seed_of(seed, "nuisance", number))
        with torch.no_grad():
            rows = [flattened(guide((part,))[1], (layer,))[layer] for part in other.split(256)]
        unwanted.append(one_neuron_auc(torch.cat(rows), more[:, None]))
    return good, torch.cat(unwanted, 1)


def require_told(
    dataset: Any,
    attributes: Mapping[str, Bool[Tensor, "samples"]] | None,
    wanted: Mapping[str, Bool[Tensor, "samples"]] | None,
) -> None:
    """Refuse held-out data that do not tell what neurons should answer to and what they should not.

    Raises:
        NeedError: targets are not class numbers and no attributes are wanted instead, or inputs are not pictures and no
            attributes are given.
        SettingError: an attribute is not told of each sample.
    """
    for setting, told in (("attributes", attributes), ("wanted", wanted)):
        require(told is None or bool(told), f"{setting} names none; leave it out")
        for name, of_samples in (told or {}).items():
            whole = of_samples.shape == (len(dataset),)
            got = f"{setting}['{name}'] has the shape {list(of_samples.shape)}"
            require(whole, f"{got}; give True or False for each of the {len(dataset)} validation samples")
    inputs, identity = Batches(dataset).fetch(torch.arange(1))
    numbered = isinstance(identity, Tensor) and identity.ndim == 1 and not identity.is_floating_point()
    require(
        wanted is not None or numbered,
        "Selection needs identities.",
        "Give (input, class number) pairs, or wanted=...",
        NeedError,
    )
    pictures = isinstance(inputs[0], Tensor) and inputs[0].ndim == 4
    require(
        attributes is not None or pictures,
        "The inputs are not pictures.",
        "Give attributes=... that are to be left alone.",
        NeedError,
    )


def cost_of(
    wanted: Float[Tensor, "neurons wanted"], unwanted: Float[Tensor, "neurons unwanted"]
) -> Float[Tensor, "neurons"]:
    """The unary term: the best area over unwanted attributes less the mean over wanted ones; negative is worth keeping.

    Example:
        >>> cost_of(torch.tensor([[0.75, 0.75]]), torch.tensor([[0.5]])).item()
        -0.25
    """
    return unwanted.max(1).values - wanted.mean(1)


def chosen(
    wanted: Float[Tensor, "neurons wanted"],
    unwanted: Float[Tensor, "neurons unwanted"],
    number: int | None = None,
    *,
    redundancy: float = 0.01,
    width: float = 0.1,
) -> Int[Tensor, "kept"]:
    """The neurons that minimise the energy nearly, by mean field; in order.

    Args:
        wanted: descriptors.
        unwanted: descriptors.
        number: how many: those above 1/2, and from there one by one by the energy that each adds, given the others.
            None keeps those above 1/2.
        redundancy: lambda, the weight of pairs.
        width: s, the distance of descriptors at which two neurons are alike.
    """
    cost = cost_of(wanted, unwanted)
    alike = likeness(torch.cat([wanted, unwanted], 1), width)
    kept = mean_field(cost, alike, redundancy) > 0.5
    if number is not None:
        kept = resized(kept, number, cost, alike, redundancy)
    return kept.nonzero().flatten()


def select_neurons(
    model: Model, layer: str, dataset: Any, number: int | None = None, *,
    attributes: Mapping[str, Bool[Tensor, "samples"]] | None = None, redundancy: float = 0.01, width: float = 0.1,
    seed: int = 0, wanted: Mapping[str, Bool[Tensor, "samples"]] | None = None,
    changes: Mapping[str, Change] = NUISANCES,
) -> Int[Tensor, "kept"]:  # fmt: skip
    """The neurons of a layer that tell identities, leave alone what is unwanted, and do not repeat one another.

    Args:
        model: the teacher; left as it is.
        layer: path of its layer.
        dataset: held-out (input, identity) pairs.
        number: how many; None keeps those that the energy says.
        attributes: unwanted ones by name, True where a sample has one; None changes the pictures instead.
        redundancy: lambda, the weight of pairs.
        width: s, the distance of descriptors at which two neurons are alike.
        seed: draws which way each picture is changed.
        wanted: wanted attributes by name; None takes the identities.
        changes: what is done to the pictures where no attributes are given.
    """
    good, unwanted = descriptors_of(model, layer, dataset, attributes, seed, wanted=wanted, changes=changes)
    return chosen(good, unwanted, number, redundancy=redundancy, width=width)


def verification_accuracy(
    features: Float[Tensor, "samples features"], identities: Int[Tensor, "samples"], *, pairs: int = 2000, seed: int = 0
) -> float:
    """Share of pairs rightly called same or different by the cosine of their features, as many of each kind.

    The threshold is the best one on the other half of the pairs, each half in turn.

    Example:
        >>> apart = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> verification_accuracy(apart, torch.tensor([0, 0, 1, 1]), pairs=100)
        1.0
    """
    generator = torch.Generator().manual_seed(seed)
    unit = nn.functional.normalize(features.double() - features.double().mean(0), dim=1)
    alike = unit @ unit.T
    equal = identities[:, None] == identities[None]
    upper = torch.ones_like(equal).triu(1)
    cosines, truth = [], []
    for same, among in ((True, equal & upper), (False, ~equal & upper)):
        places = among.flatten().nonzero().flatten()
        require(
            len(places) > 0,
            "There are no pairs of both kinds.",
            "Give several samples of several identities.",
            UsageError,
        )
        drawn = places[torch.randint(len(places), (pairs // 2,), generator=generator)]
        cosines.append(alike.flatten()[drawn])
        truth.append(torch.full((pairs // 2,), same))
    cosine, same = torch.cat(cosines), torch.cat(truth)
    order = torch.randperm(len(cosine), generator=generator)
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    right = 0
    for known, asked in (halves, halves[::-1]):
        limits = cosine[known].unique()
        best = max(limits, key=lambda limit: int(((cosine[known] >= limit) == same[known]).sum()))
        right += int(((cosine[asked] >= best) == same[asked]).sum())
    return right / len(order)
