"""Rank-constrained topology: Nakkiran, Alvarez, Prabhavalkar, Parada 2015, "Compressing Deep Neural Networks using a
Rank-Constrained Topology", Interspeech (survey 27); known since as the SVDF layer.

The first layer of a network on patches of frames by features holds a two-dimensional filter for each unit. Constrain
each filter to a rank: a sum of a few outer products of a filter over features and one over time, summed inside the unit
before the non-linearity. The network is trained from scratch in this form. Units share nothing, so the layer is no
bottleneck. Fed frame by frame, it projects each frame once and remembers the projections
(`karui.layers.rank_constrained.FrameStream`).

It pays for wide first layers on large patches (spectrograms), and in streaming, where a new frame costs a small part of
a patch. It does not pay for small patches or where the layer is a small part of the network; and a network that is
given whole patches does `rank` times the multiply-adds of the dense layer, since every frame is projected for every
unit (`RankConstrained.dense` is faster there). Convolutions, which share one filter over all places, are refused, and
so are linear layers that see no patch.

Paper -> here: `w_m` -> filters, `alpha` -> project, `beta` -> over_time, `T` -> frames, `F` -> features, `R` -> rank.

DEPARTURE: maps of several channels count the channels of a frame as features of it; the paper has one channel.

DEPARTURE: weights are drawn so that the outputs spread as a linear layer's do; the authors' public network takes a
truncated normal of deviation 0.01.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from karui.errors import SettingError, did_you_mean, require
from karui.layers.rank_constrained import RankConstrained
from karui.lowrank._choice import Choice, unless_larger
from karui.lowrank._common import carry_out
from karui.lowrank._fresh import conversion_needs
from karui.lowrank._scan import Seen, scan
from karui.model import Model
from karui.technique import Bench, Card, technique
from karui.technique.card import Need
from karui.technique.redraw import redrawn
from karui.train.randomness import undisturbed

Start = Literal["scratch", "layer", "svd"]


@technique(
    Card(
        survey=27,
        slug="rank_constrained",
        title="Compressing Deep Neural Networks using a Rank-Constrained Topology",
        kind="replace",
        needs=("labels", "training"),
        reduces=("parameters", "bytes"),
        identity={"rank": 1_000_000},
        quick={"rank": 1, "epochs": 1, "layer": "hidden"},
        pays="wide first layers on large patches, such as spectrograms, and streaming",
        costs="small patches; whole patches at once, for which it does more multiply-adds than the dense layer",
    )
)
@dataclass(frozen=True, kw_only=True)
class RankConstrainedTopology:
    """Constrain each unit's filter over its patch to a rank, and train the network so.

    Settings:
        rank: outer products in each unit's filter, from 1; where that many would save nothing the layer is left alone.
        frames: frames (rows) of the patch; None takes those of the feature map whose flattening the layer is given.
        start: where training starts. "scratch": all weights are drawn anew, as in the paper; "layer": only this layer's
            are; "svd": each filter is the best of its rank for the trained one, and all others stay.
        layer: path of the layer; "" takes the first linear one that is called.
        epochs: passes over the training data; 0 leaves the network untrained.

    Needs: labels and training data, unless `epochs` is 0.

    Raises:
        SettingError: a setting is out of range, or `layer` names a layer that cannot be constrained.
        NeedError: there is nothing to train on.

    Relations: `LowRankOutput` (23) and `SvdRestructuring` (11) factor a layer's matrix across its units.

    Example:
        >>> import karui
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(98 * 40, 1280))
        >>> model = karui.Model(net, example=(torch.zeros(1, 98, 40),))
        >>> RankConstrainedTopology(epochs=0).apply(model, karui.Bench()).parameters
        354560
    """

    rank: int = 2
    frames: int | None = None
    start: Start = "scratch"
    layer: str = ""
    epochs: int = 30

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"rank is {self.rank}; give a number from 1, for example 2")
        told = f"frames is {self.frames}; give a number from 1, or None to take the rows of the flattened map"
        require(self.frames is None or self.frames >= 1, told)
        require(self.epochs >= 0, f"epochs is {self.epochs}; give 0 or more passes over the training data")
        if self.start not in get_args(Start):
            did_you_mean(self.start, list(get_args(Start)), "start", SettingError)

    def needs(self) -> tuple[Need, ...]:
        """Labels and training data, unless nothing is trained."""
        return conversion_needs(1.0, self.epochs)

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The network with its layer constrained, trained."""
        assert model is not None  # noqa: S101  (the card's kind asks for one)
        one, choice = self._choose(model)
        told = {"start": self.start}
        if one is None or not choice.replaced:
            return carry_out(model, (choice,), {}, "rank-constrained topology", told)
        layer, error = self._built(one, bench.seed)
        choice = replace(choice, error=error)
        new = carry_out(model, (choice,), {one.path: layer}, "rank-constrained topology", told)
        if self.start == "scratch":
            new = redrawn(new, bench.seed)
        return bench.fit(new, epochs=self.epochs, label="rank-constrained topology") if self.epochs else new

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What would be done with the layer, and why."""
        return tuple(choice.describe() for choice in self.choose(model))

    def choose(self, model: Model) -> tuple[Choice, ...]:
        """The rank of the layer's filters, or the reason why it is left."""
        return (self._choose(model)[1],)

    def _choose(self, model: Model) -> tuple[Seen | None, Choice]:
        one, reason = self._first(model)
        if one is None:
            return None, Choice(self.layer, reason=reason)
        shape = self._shape(one)
        assert shape is not None  # noqa: S101  (else there is a reason)
        channels, frames, features = shape
        units, full = one.layer.out_features, min(frames, channels * features)
        rank = min(self.rank, full)
        dense, bias = one.layer.weight.numel(), units if one.layer.bias is not None else 0
        over_time, projected = units * rank * frames, units * rank * channels * features
        choice = Choice(
            one.path,
            ranks=(rank,),
            full=(full,),
            parameters=(dense + bias, over_time + projected + bias),
            macs=(one.outputs * dense, one.outputs * (over_time + frames * projected)),
            form=f"filters of rank {rank} over {frames} frames of {channels * features}",
        )
        return one, unless_larger(choice, macs=False)

    def _first(self, model: Model) -> tuple[Seen | None, str]:
        """The layer as the example met it, or None and why there is none."""
        seen, left = scan(model, _objection)
        if not self.layer:
            one = min(seen, key=lambda one: one.order, default=None)
            reason = "no linear layer is called" if one is None else self._no_patch(one)
            where = "" if one is None else f"{one.path}: "
            return (None, f"{where}{reason}; name another with layer=...") if reason else (one, "")
        one = next((one for one in seen if one.path == self.layer), None)
        reasons = {choice.path: choice.reason for choice in left}
        reason = self._no_patch(one) if one else reasons.get(self.layer, "there is no such layer with a weight")
        require(not reason, f"layer is '{self.layer}', which cannot be constrained: {reason}", error=SettingError)
        return one, ""

    def _no_patch(self, one: Seen) -> str:
        if one.inputs != len(one.space):
            return f"it is applied at {one.inputs} positions, not to one patch"
        if self.frames is not None and one.layer.in_features % self.frames:
            return f"its {one.layer.in_features} inputs are not {self.frames} frames of equal size"
        return "" if self._shape(one) else "its input is no flattened map; give the number of frames"

    def _shape(self, one: Seen) -> tuple[int, int, int] | None:
        """Channels, frames and features of the layer's patch; None where it is not known to see one."""
        if self.frames is not None:
            return 1, self.frames, one.layer.in_features // self.frames
        if not one.map:
            return None
        channels, (frames, *rest) = (1, one.map) if len(one.map) == 2 else (one.map[0], one.map[1:])
        return channels, frames, math.prod(rest)

    def _built(self, one: Seen, seed: int) -> tuple[RankConstrained, float | None]:
        """The constrained layer, and the error of its start where it has one."""
        shape, dense = self._shape(one), one.layer
        assert shape is not None  # noqa: S101  (else there was a reason)
        channels, frames, features = shape
        rank = min(self.rank, frames, channels * features)
        with undisturbed():
            torch.manual_seed(seed)
            layer = RankConstrained(
                frames, features, dense.out_features, rank, bias=dense.bias is not None, channels=channels
            )
        layer = layer.to(dense.weight).train(dense.training).requires_grad_(dense.weight.requires_grad)
        return layer, layer.fit(dense.weight, dense.bias) if self.start == "svd" else None


def _objection(layer: Any) -> str:
    return "" if isinstance(layer, nn.Linear) else f"{type(layer).__name__} has no filter over one whole patch"
