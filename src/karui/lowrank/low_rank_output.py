"""Low-rank output layer: Sainath, Kingsbury, Sindhwani, Arisoy, Ramabhadran 2013, "Low-rank matrix factorization for
Deep Neural Network training with high-dimensional output targets", ICASSP (survey 23).

With thousands of targets the last weight matrix holds most of a network's parameters, and few correlated targets are
active at a time. Before training, write it as two linear layers with a narrow, purely linear bottleneck, and train both
factors with the usual loss. Only the output layer is factored: hidden layers lose more by it.

It pays for acoustic and language models and for classifiers of thousands of classes, trained from scratch: fewer
parameters, and shorter training steps too. It does not pay where the output layer is a small part of the network (the
report counts the whole network, not the layer), for few classes, whose number bounds what a factorisation saves, nor
for a layer tied to an embedding, which is refused: its factors would untie it. Short training favours
the whole layer: on a small word model of two epochs a quarter of the width as rank cost 6 % in perplexity and an eighth
14 %, while on a thousand classes it cost nothing (`results/low_rank_output.md`).

Paper -> here: `A` (outputs x hidden units) -> the weight, `r` -> rank, the two factors -> the two linear layers.

DEPARTURE: the rank may be given as a share of the layer's width; the paper sweeps it, and takes 128 for
2,220 targets.

DEPARTURE: a pointwise convolution that gives a map of class scores is an output layer too; the paper has linear ones.

DEPARTURE: training uses the optimiser of the bench; the paper also trains by a second-order method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from karui.errors import SettingError, did_you_mean, require
from karui.lowrank._choice import Choice, unless_larger
from karui.lowrank._common import carry_out, factor_matrix
from karui.lowrank._fresh import conversion_needs
from karui.lowrank._output import output_layer
from karui.lowrank._scan import Seen
from karui.model import Model
from karui.numerics.svd import factored_size
from karui.technique import Bench, Card, technique
from karui.technique.card import Need
from karui.technique.redraw import redrawn
from karui.train.randomness import undisturbed

Start = Literal["scratch", "output", "svd"]


@technique(
    Card(
        survey=23,
        slug="low_rank_output",
        title="Low-rank matrix factorization for Deep Neural Network training with high-dimensional output targets",
        kind="replace",
        needs=("labels", "training"),
        reduces=("parameters", "macs", "bytes"),
        identity={"ratio": 1.0},
        quick={"ratio": 0.08, "epochs": 1},
        pays="output layers over thousands of targets, in networks trained from scratch; training is faster too",
        costs="few classes, networks whose parameters are elsewhere; layers tied to an embedding are refused",
    )
)
@dataclass(frozen=True, kw_only=True)
class LowRankOutput:
    """Write the output layer as two linear layers with a narrow bottleneck, and train the network so.

    Settings:
        ratio: rank as a share of the output layer's input width, in (0, 1]; 1 leaves the layer.
        rank: the rank itself, from 1; None keeps to `ratio`.
        start: where training starts. "scratch": all weights are drawn anew, as in the paper; "output": only the two
            factors are, on hidden layers that were trained before; "svd": the factors are those of the trained output
            layer, as in SVD restructuring (survey 11).
        layer: path of the output layer; "" finds the last linear layer, if its outputs are the network's.
        epochs: passes over the training data; 0 leaves the network untrained.

    Needs: labels and training data, unless `epochs` is 0.

    Raises:
        SettingError: a setting is out of range, or `layer` names no output layer that can be factored.
        NeedError: there is nothing to train on.

    Relations: `SvdRestructuring` (11) factors the layers of a trained network, this one an output layer before it is
    trained; `SvdSoftmax` (25) keeps the whole layer and looks at a part of it.

    Example:
        >>> import karui
        >>> model = karui.Model(nn.Linear(1024, 2220, bias=False), example=(torch.zeros(1, 1024),))
        >>> LowRankOutput(rank=128, epochs=0).apply(model, karui.Bench()).parameters
        415232
    """

    ratio: float = 0.125
    rank: int | None = None
    start: Start = "scratch"
    layer: str = ""
    epochs: int = 30

    def __post_init__(self) -> None:
        require(0 < self.ratio <= 1, f"ratio is {self.ratio}; give a share of the width in (0, 1], for example 0.125")
        require(self.rank is None or self.rank >= 1, f"rank is {self.rank}; give a number from 1, for example 128")
        require(self.epochs >= 0, f"epochs is {self.epochs}; give 0 or more passes over the training data")
        if self.start not in get_args(Start):
            did_you_mean(self.start, list(get_args(Start)), "start", SettingError)

    def needs(self) -> tuple[Need, ...]:
        """Labels and training data, unless nothing is trained."""
        return conversion_needs(1.0 if self.rank is not None or self.ratio < 1 else 0.0, self.epochs)

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The network with its output layer factored, trained."""
        assert model is not None  # noqa: S101  (the card's kind asks for one)
        one, choice = self._choose(model)
        told = {"start": self.start}
        if one is None or not choice.replaced:
            return carry_out(model, (choice,), {}, "low-rank output layer", told)
        layer = self._built(one, choice.ranks[0], bench.seed)
        new = carry_out(model, (choice,), {one.path: layer}, "low-rank output layer", told)
        if self.start == "scratch":
            new = redrawn(new, bench.seed)
        return bench.fit(new, epochs=self.epochs, label="low-rank output layer") if self.epochs else new

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What would be done with the output layer, and what the whole network saves by it."""
        (choice,) = self.choose(model)
        if not choice.replaced:
            return (choice.describe(),)
        before, after = model.parameters, model.parameters - choice.parameters[0] + choice.parameters[1]
        return choice.describe(), f"the whole network: {before:,} -> {after:,} parameters"

    def choose(self, model: Model) -> tuple[Choice, ...]:
        """The rank of the output layer, or the reason why it is left."""
        return (self._choose(model)[1],)

    def _choose(self, model: Model) -> tuple[Seen | None, Choice]:
        one, reason = output_layer(model, self.layer, _objection)
        if one is None:
            return None, Choice(self.layer, reason=reason)
        outputs, inputs = one.layer.weight.shape[:2]
        full = min(outputs, inputs)
        rank = min(full, self.rank if self.rank is not None else max(1, math.ceil(self.ratio * inputs - 1e-9)))
        dense, factored = outputs * inputs, factored_size((outputs, inputs), rank)
        bias = outputs if one.layer.bias is not None else 0
        places = one.outputs
        choice = Choice(
            one.path,
            ranks=(rank,),
            full=(full,),
            parameters=(dense + bias, factored + bias),
            macs=(places * dense, places * factored),
        )
        return one, unless_larger(choice)

    def _built(self, one: Seen, rank: int, seed: int) -> nn.Module:
        """The two layers: by SVD of the trained weight, or drawn anew."""
        layer: Any = factor_matrix(one.layer, rank)[0]
        if self.start != "svd":
            with undisturbed():
                torch.manual_seed(seed)
                layer.reset_parameters()
        return layer


def _objection(layer: Any) -> str:
    if isinstance(layer, nn.Linear):
        return ""
    if any(taps != 1 for taps in layer.kernel_size):
        return f"{type(layer).__name__} with kernel {' x '.join(map(str, layer.kernel_size))} sees space"
    return "" if layer.groups == 1 else f"{type(layer).__name__} with {layer.groups} groups has no one weight matrix"
