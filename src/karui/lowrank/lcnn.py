"""Lookup-based networks: Bagherinezhad, Rastegari, Farhadi 2017, "LCNN: Lookup-based Convolutional Neural Network",
CVPR, arXiv 1611.06473 (survey 29).

Each layer has a small dictionary of channel vectors, and every position of every filter is a mixture of few of them.
The input meets the dictionary once, and the filters look its maps up. Trained from scratch: the mixture is a dense
tensor that a penalty and a hard threshold make sparse, and what has been zero once stays zero.

It pays in counted multiplications and in bytes, and where a trained dictionary meets few examples or few iterations:
then only mixtures are learnt. It pays in time where zeros are left out: in torch with the kernel of
`karui.layers.sparse_conv` (`karui[fast]`), on large maps. An engine that multiplies zeros, as those of exported files
do, does more work than the dense layer where the dictionary is as large as the input. Without batch normalisation it
hardly trains.

Paper -> here: see `karui.layers.lookup`; `lambda` -> strength, `epsilon` -> the threshold.

DEPARTURE: entries are set to zero after each step, which every forward pass then sees, where the authors do so before
each forward pass; their gradients and momentum stay zero.

DEPARTURE: batch normalisation goes into every lookup layer that has none behind it; the authors' networks have their
own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from karui.errors import require
from karui.layers.factored import conv_settings
from karui.layers.lookup import LookupConv, LookupLinear, lookup_layers, threshold
from karui.lowrank._choice import Choice
from karui.lowrank._common import carry_out
from karui.lowrank._fresh import conversion_needs, require_conversion
from karui.lowrank._scan import Seen, scan
from karui.measuring import count
from karui.model import Model, Note
from karui.model.following import followings
from karui.technique import Bench, Card, technique
from karui.technique.redraw import redrawn
from karui.train import Influence
from karui.train.masks import MaskKeeper
from karui.train.randomness import undisturbed

if TYPE_CHECKING:
    from karui.technique.card import Need
    from karui.train.influence import Moment


@dataclass(frozen=True)
class LookupSparsity(Influence):
    """The penalty on mixtures, and the threshold under which an entry becomes zero and stays so.

    Settings:
        strength: weight of the penalty, in thresholds: the loss grows by `strength threshold |P|` (equation 5).
    """

    strength: float = 0.1

    def attach(self, module: nn.Module) -> None:
        """Set to zero what is small, and keep gradients off it."""
        MaskKeeper(_large(module)).attach(module)

    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        """The loss with the penalty."""
        for layer in lookup_layers(moment.module).values():
            loss = loss + self.strength * threshold(layer) * layer.mixture.weight.abs().sum()
        return loss

    def constraints(self, module: nn.Module, moment: Moment) -> None:
        """Keep the zeros, and set to zero what has become small."""
        large = _large(module)
        keeper = MaskKeeper(large)
        keeper.narrow(module, large)
        keeper.constraints(module, moment)

    def finish(self, module: nn.Module) -> nn.Module:
        """Take the masks off; the zeros stay in the mixtures."""
        return MaskKeeper(_large(module)).finish(module)


def _large(module: nn.Module) -> Mapping[str, Bool[Tensor, "..."]]:
    """Where the entries of each mixture are above the threshold."""
    return {
        f"{path}.mixture.weight".lstrip("."): layer.mixture.weight.detach().abs() > threshold(layer)
        for path, layer in lookup_layers(module).items()
    }


def multiplications(model: Model) -> dict[str, int]:
    """Multiplications of each lookup layer for one sample: `k C HW + nnz(P) H'W'`; what is zero is not counted."""
    done = {layer.path: layer for layer in count(model).layers}
    told = {}
    for path, layer in lookup_layers(model.module).items():
        parts = [done[f"{path}.{name}".lstrip(".")] for name in ("dictionary", "mixture")]
        live = int(torch.count_nonzero(layer.mixture.weight))
        told[path] = parts[0].macs + parts[1].macs * live // layer.mixture.weight.numel()
    return told


@technique(
    Card(
        survey=29,
        slug="lcnn",
        title="LCNN: Lookup-based Convolutional Neural Network",
        kind="replace",
        needs=("labels", "training"),
        reduces=("bytes",),
        identity={"share": 0.0},
        quick={"size": 8, "linear_size": 16, "epochs": 1},
        arxiv="1611.06473",
        pays="counted multiplications and bytes of a network that is trained from scratch; few examples of new classes",
        costs="time in exported files, whose zeros are multiplied; small networks, short trainings (they need a larger "
        "strength)",
    )
)
@dataclass(frozen=True, kw_only=True)
class Lcnn:
    """Replace the layers by lookup layers, and train the network from scratch until their mixtures are sparse.

    The output layer is left unless `sizes` names it.

    Settings:
        size: vectors in the dictionary of a convolution; never more than it has input channels.
        linear_size: the same of a linear layer.
        sizes: dictionaries of single layers, as (path, size) pairs; they go before the other settings.
        strength: weight of the penalty that makes mixtures sparse; 0 leaves what the threshold alone does.
        norm: whether batch normalisation goes into lookup layers that have none behind them.
        share: share of the layers that are replaced, those that do most work first, in [0, 1].
        skip: paths of layers to leave.
        draw: whether all other weights are drawn anew, as the paper trains from scratch.
        epochs: passes over the training data; 0 leaves the network untrained.

    Needs: labels and training data, unless `epochs` is 0.

    Raises:
        SettingError: a setting is out of range, or names no layer.
        NeedError: there is nothing to train on.

    Relations: `ProductQuantization` (19) has codes for slices of the channels, and keeps trained weights.

    Example:
        >>> import karui
        >>> model = karui.Model(nn.Conv2d(64, 32, 3), example=(torch.zeros(1, 64, 8, 8),))
        >>> light = Lcnn(sizes=(("", 20),), epochs=0, norm=False).apply(model, karui.Bench())
        >>> [tuple(part.weight.shape) for part in light.module.children()]
        [(20, 64, 1, 1), (32, 20, 3, 3)]
    """

    size: int = 30
    linear_size: int = 512
    sizes: tuple[tuple[str, int], ...] = ()
    strength: float = 0.1
    norm: bool = True
    share: float = 1.0
    skip: tuple[str, ...] = ()
    draw: bool = True
    epochs: int = 30

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple((path, size) for path, size in self.sizes))
        object.__setattr__(self, "skip", tuple(self.skip))
        for name in ("size", "linear_size"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; give a number from 1")
        for path, size in self.sizes:
            require(size >= 1, f"sizes has {size} for '{path}'; give a number from 1")
        require(0 <= self.strength < math.inf, f"strength is {self.strength}; give 0 or more, for example 0.1")
        require_conversion(self.share, self.epochs)

    def needs(self) -> tuple[Need, ...]:
        """Labels and training data, unless nothing is converted or trained."""
        return conversion_needs(self.share, self.epochs)

    def influence(self, model: Model, bench: Bench) -> LookupSparsity:
        """What makes the mixtures of a network of lookup layers sparse while it trains."""
        del model, bench
        return LookupSparsity(self.strength)

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The network of lookup layers, trained."""
        assert model is not None  # noqa: S101  (the card's kind asks for one)
        if not self.share:
            return model
        choices, seen = self.choose(model), {one.path: one for one in self._scan(model)[0]}
        taken = [choice for choice in choices if choice.replaced]
        with undisturbed():
            torch.manual_seed(bench.seed)
            normed = self._normed(model, [seen[choice.path] for choice in taken])
            layers = {c.path: _layer(seen[c.path], c.ranks[0], norm=c.path in normed) for c in taken}
        new = carry_out(model, choices, layers, "LCNN", {"strength": self.strength, "draw": self.draw})
        if not layers:
            return new
        new = redrawn(new, bench.seed) if self.draw else new
        if self.epochs:
            new = bench.fit(new, epochs=self.epochs, influence=self.influence(new, bench), label="LCNN")
        return new.evolve(new.module, _told(new, {choice.path: choice.macs[0] for choice in taken}))

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What would be done with each layer, and why."""
        return tuple(choice.describe() for choice in self.choose(model))

    def choose(self, model: Model) -> tuple[Choice, ...]:
        """The dictionary of each layer, or the reason why it is left."""
        if not self.share:
            return ()
        seen, left = self._scan(model)
        made = [self._choose(one) for one in seen]
        able = sorted((choice for choice in made if choice.replaced), key=lambda choice: -choice.macs[0])
        taken = {choice.path for choice in able[: max(1, round(self.share * len(able)))]}
        reason = f"it does less work than the share of layers that is replaced ({self.share})"
        chosen = [c if not c.replaced or c.path in taken else Choice(c.path, reason=reason) for c in made]
        normed = self._normed(model, [one for one in seen if one.path in taken])
        layers = {one.path: one.layer for one in seen}
        return (*(_with_norm(c, layers[c.path]) if c.path in normed else c for c in chosen), *left)

    def _scan(self, model: Model) -> tuple[tuple[Seen, ...], tuple[Choice, ...]]:
        seen, left = scan(model, lambda _: "", self.skip)
        known = {choice.path: choice.reason for choice in left}
        for path, _ in self.sizes:
            why = known.get(path, "there is no such layer with a weight")
            require(any(one.path == path for one in seen), f"sizes names '{path}', which cannot be replaced: {why}")
        return seen, left

    def _choose(self, one: Seen) -> Choice:
        own, layer = dict(self.sizes).get(one.path), one.layer
        linear = isinstance(layer, nn.Linear)
        if own is None and one.final:
            return Choice(one.path, reason="it is the output layer; name it in sizes to replace it")
        filters, channels = layer.weight.shape[:2]
        groups, taps = 1 if linear else layer.groups, layer.weight[0, 0].numel()
        if channels == 1 and groups > 1:
            return Choice(one.path, reason="a depthwise convolution has single channels, and so no vectors of them")
        size = min(own or (self.linear_size if linear else self.size), channels)
        held, bias = groups * size * channels + size * filters * taps, filters if layer.bias is not None else 0
        macs = groups * size * channels * one.inputs + size * filters * taps * one.outputs
        return Choice(
            one.path,
            ranks=(size,),
            full=(channels,),
            parameters=(layer.weight.numel() + bias, held + bias),
            macs=(layer.weight.numel() * one.outputs, macs),
            form=f"a dictionary of {size} vectors (before its mixture is sparse)",
        )

    def _normed(self, model: Model, seen: list[Seen]) -> set[str]:
        """The layers that get batch normalisation: a linear layer only where it meets single vectors."""
        if not self.norm:
            return set()
        able = [one.path for one in seen if not isinstance(one.layer, nn.Linear) or one.outputs == len(one.made)]
        found = followings(model, able)
        return {path for path in able if found[path].scale is None}


def _with_norm(choice: Choice, layer: Any) -> Choice:
    """The choice with a batch normalisation in place of a bias."""
    before, after = choice.parameters
    return replace(choice, parameters=(before, after + len(layer.weight) * (2 - (layer.bias is not None))))


def _layer(one: Seen, size: int, *, norm: bool) -> nn.Module:
    """The untrained lookup layer in place of a layer."""
    old = one.layer
    if isinstance(old, nn.Linear):
        layer: Any = LookupLinear(old.in_features, old.out_features, size=size, bias=old.bias is not None, norm=norm)
    else:
        layer = LookupConv(**conv_settings(old), size=size, norm=norm)
    return layer.to(old.weight).train(old.training)


def _told(model: Model, dense: Mapping[str, int]) -> Note:
    """What became of the mixtures."""
    layers = lookup_layers(model.module)
    live = sum(int(torch.count_nonzero(layer.mixture.weight)) for layer in layers.values())
    total, done = sum(layer.mixture.weight.numel() for layer in layers.values()), multiplications(model)
    before, after = sum(dense.values()), sum(done.values())
    return Note(
        f"LCNN: {100 * live / total:.1f} % of the mixtures live, {before:,} -> {after:,} multiplications in its layers",
        {"live": live, "of": total, "multiplications": done, "dense": dict(dense)},
    )
