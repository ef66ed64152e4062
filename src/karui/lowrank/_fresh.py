"""What the techniques share that train a factored network from scratch.

A network's definition is converted: its layers are replaced by untrained ones, all weights are drawn anew, and the
network is trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from karui.errors import require
from karui.lowrank._choice import Choice, unless_larger
from karui.lowrank._common import carry_out
from karui.lowrank._scan import Seen, scan
from karui.measuring import count
from karui.model import Model
from karui.technique import Bench, require_passes
from karui.technique.card import Need
from karui.technique.redraw import redrawn
from karui.train.randomness import undisturbed


@dataclass(frozen=True)
class Offer:
    """What would be done with one layer, and the untrained layer that would take its place."""

    choice: Choice
    layer: nn.Module | None = None


def require_conversion(share: float, epochs: int) -> None:
    """Refuse impossible settings of a conversion."""
    require(0 <= share <= 1, f"share is {share}; give a share of the layers in [0, 1]")
    require_passes(epochs=epochs)


def conversion_needs(share: float, epochs: int) -> tuple[Need, ...]:
    """Labels and training data, unless nothing is converted or trained."""
    return ("labels", "training") if share and epochs else ()


def offers(
    model: Model,
    fits: Callable[[Any], str],
    make: Callable[[Seen], tuple[nn.Module, str]],
    *,
    skip: Sequence[str] = (),
    share: float = 1.0,
    seed: int = 0,
) -> tuple[Offer, ...]:
    """For each layer with a weight, the layer that would take its place, or the reason why it is left.

    Args:
        model: the model whose definition is converted.
        fits: the technique's own objection to a layer, "" for none.
        make: the untrained layer that takes a layer's place, and what to call it.
        skip: paths of layers to leave.
        share: share of the layers that can be replaced, those that do most multiply-adds first.
        seed: of the new weights.

    Raises:
        SettingError: `skip` names no layer.
    """
    seen, left = scan(model, fits, skip)
    made = []
    with undisturbed():
        torch.manual_seed(seed)
        for one in seen:
            layer, form = make(one)
            made.append(_priced(one, layer.to(one.layer.weight).train(one.layer.training), form))
    able = sorted((offer for offer in made if offer.layer is not None), key=lambda offer: -offer.choice.macs[0])
    taken = {offer.choice.path for offer in able[: max(1, round(share * len(able)))]}
    reason = f"it does less work than the share of layers that is replaced ({share})"
    chosen = [
        offer if offer.layer is None or offer.choice.path in taken else Offer(Choice(offer.choice.path, reason=reason))
        for offer in made
    ]
    return (*chosen, *map(Offer, left))


def _priced(one: Seen, layer: nn.Module, form: str) -> Offer:
    """The offer with parameters and multiply-adds, counted on the layers themselves; none where it saves nothing."""
    (before, macs), (after, light) = (_counted(one, module) for module in (one.layer, layer))
    choice = unless_larger(Choice(one.path, form=form, parameters=(before, after), macs=(macs, light)))
    return Offer(choice, layer if choice.replaced else None)


def _counted(one: Seen, module: nn.Module) -> tuple[int, int]:
    """(parameters, multiply-adds) of a module in the layer's place; maps of one size are counted once."""
    parameters, macs = 0, 0
    for size, times in Counter(one.space).items():
        example = torch.zeros(1, one.layer.in_channels, *size).to(one.layer.weight)
        counts = count(Model(module, example=(example,)))
        parameters, macs = counts.parameters, macs + times * counts.macs
    return parameters, macs


def convert(model: Model, bench: Bench, made: Sequence[Offer], name: str, *, draw: bool, epochs: int) -> Model:
    """The model with the offered layers, drawn anew if asked for, and trained.

    Where no layer can be replaced the model stays as it is, with a note of the reasons.
    """
    layers = {offer.choice.path: offer.layer for offer in made if offer.layer is not None}
    new = carry_out(model, [offer.choice for offer in made], layers, name, {"draw": draw})
    if not layers:
        return new
    if draw:
        new = redrawn(new, bench.seed)
    return bench.fit(new, epochs=epochs, label=name) if epochs else new
