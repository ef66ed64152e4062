"""Compression-aware training: Alvarez, Salzmann 2017, "Compression-aware Training of Deep Networks", NIPS,
arXiv 1711.02638 (survey 28).

A network that is trained for nothing but its loss has full ranks, and factoring it afterwards costs accuracy. Here it
is trained to be factored: ordinary steps on the loss, and once an epoch the proximal operator of the nuclear norm,
which takes the same amount off every singular value of each layer's matrix, so that many become exactly zero. A second
one does the same to the norms of whole units. Then each layer is written as two through the directions that are left,
where that saves, and units that are zero are cut out.

It pays where ranks shall be found by the training: they end exact, and factoring at them changes nothing. That
factoring after ordinary training loses more was not seen on the digits: four convolutions with batch normalisation, at
the ranks that training reached (58 % of the parameters, three seeds) 98.8 % against 99.1 % for the SVD of the ordinary
network, which has 99.3 % itself; at two fifths and a fifth of the weights, below those ranks, no difference beyond the
intervals without fine-tuning (`results/compression_aware_training.md`). Nor did units fall before the network was lost.
It does not pay without training (the closed forms of this chapter need none). Batch
normalisation undoes the shrinking of a layer's scale, not that of its small singular values against its large ones.
Thresholds do not follow the learning rate: a rate that falls to nothing leaves them as they are, and too large a tau
then ruins the network. A unit that is zero and then shifted (by normalisation or a bias) under a padded convolution
stays, as it still speaks.

Paper -> here: `Theta_l` -> weight, `tau` -> tau, `lambda` -> lam, `P_l` -> columns, `alpha` -> l1_share.

DEPARTURE: thresholds are given for one epoch, and parts of it where proximal steps are more frequent, so that the same
number means the same pressure; the paper has a learning rate times a strength.

DEPARTURE: a proximal step always follows the last step, whenever it would be due, so that zeros are exact at the end.

DEPARTURE: linear layers are treated alike; output layers keep all their units. The paper has convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from karui.errors import require
from karui.lowrank._choice import Choice, unless_larger
from karui.lowrank._common import blocks, carry_out, factor_matrix, fine_tune, require_fine_tuning
from karui.lowrank._proximal import CompressionAware, rank_of, require_thresholds
from karui.lowrank._scan import Seen, filters_of, groups_of, scan
from karui.model import Note, layer_at
from karui.numerics.svd import Energy, Parameters, factored_size
from karui.technique import Bench, Card, technique
from karui.technique.card import Need
from karui.technique.pruning.dead_units import dead_units_out

if TYPE_CHECKING:
    from karui.model import Model


@technique(
    Card(
        survey=28,
        slug="compression_aware_training",
        title="Compression-aware Training of Deep Networks",
        kind="influence",
        needs=("labels", "training"),
        reduces=("parameters", "macs", "bytes"),
        identity={"tau": 0.0, "epochs": 0, "share": None},
        quick={"share": 0.5, "warmup": 0, "epochs": 1},
        arxiv="1711.02638",
        pays="networks that are trained anyway and whose ranks shall be found by it; factoring at them is exact",
        costs="sizes below the ranks that training reached; on the digits the SVD of an ordinary network was as good",
    )
)
@dataclass(frozen=True, kw_only=True)
class CompressionAwareTraining:
    """Train with proximal steps that lower ranks and silence units, then factor the layers and cut those units.

    Settings:
        tau: what every singular value loses in one epoch, 0 or more.
        lam: what every unit's norm loses in one epoch, times the root of the number of its weights; 0 lets units be.
        l1_share: share of `lam` that goes to single weights instead, in [0, 1].
        every: steps between proximal steps; None is once an epoch.
        warmup: epochs without proximal steps.
        ramp: epochs in which the thresholds rise to the full ones after that.
        energy: share of the squared singular values that a layer keeps, in (0, 1]; 1 keeps all that are not zero.
        share: the largest share of a layer's weights that its factors may hold instead, in (0, 1); None keeps to
            `energy`.
        skip: paths of layers to leave.
        epochs: passes over the training data with proximal steps; 0 only factors.
        tuning: passes of fine-tuning of the factored network; 0 leaves it.
        learning_rate: of the fine-tuning; None takes the bench's.

    Needs: labels and training data, unless nothing is trained.

    Raises:
        SettingError: a setting is out of range, or names no layer.
        NeedError: there is nothing to train on.

    Relations: `SvdRestructuring` (11) factors the same matrices of linear layers after ordinary training.

    Example:
        >>> import karui
        >>> net = nn.Linear(64, 64)
        >>> _ = net.weight.data.copy_(torch.randn(64, 3) @ torch.randn(3, 64))
        >>> model = karui.Model(net, example=(torch.zeros(1, 64),))
        >>> CompressionAwareTraining(epochs=0).remarks(model)
        (': rank 3 of 64, 4,160 -> 448 parameters',)
    """

    tau: float = 0.1
    lam: float = 0.0
    l1_share: float = 0.0
    every: int | None = None
    warmup: int = 2
    ramp: int = 1
    energy: float = 1.0
    share: float | None = None
    skip: tuple[str, ...] = ()
    epochs: int = 30
    tuning: int = 0
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", tuple(self.skip))
        require_thresholds(self)
        require(0 < self.energy <= 1, f"energy is {self.energy}; give a share in (0, 1], for example 0.9")
        within = self.share is None or 0 < self.share < 1
        require(within, f"share is {self.share}; give a share of each layer's weights in (0, 1), for example 0.2")
        require(self.tuning >= 0, f"tuning is {self.tuning}; give 0 or more passes over the training data")
        require_fine_tuning(self.epochs, self.learning_rate)
        taken = not self.epochs or self.warmup < self.epochs or not (self.tau or self.lam)
        told = f"warmup is {self.warmup} of {self.epochs} epochs: no proximal step would be taken; give fewer"
        require(taken, told)

    def needs(self) -> tuple[Need, ...]:
        """Labels and training data, unless nothing is trained."""
        return ("labels", "training") if self.epochs or self.tuning else ()

    def influence(self, model: Model, bench: Bench) -> CompressionAware:
        """The proximal steps alone, for any training of this model; layers that do not learn have none."""
        del bench
        seen, _ = scan(model, _objection, self.skip)
        return CompressionAware(
            layers={one.path: not one.final for one in seen if one.layer.weight.requires_grad},
            tau=self.tau,
            lam=self.lam,
            l1_share=self.l1_share,
            every=self.every,
            warmup=self.warmup,
            ramp=self.ramp,
        )

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The model trained so, factored and cut."""
        assert model is not None  # noqa: S101  (the card's kind asks for one)
        if self.epochs:
            steps = self.influence(model, bench)
            model = bench.fit(model, epochs=self.epochs, influence=steps, label="compression-aware training")
            told = {
                "layers": list(steps.layers),
                "ranks and units": [[list(pair) for pair in row] for row in steps.history],
            }
            model = model.evolve(model.module, Note("ranks and living units, epoch by epoch", told))
        light = self.compress(model)
        return fine_tune(light, bench, self.tuning, self.learning_rate, "fine-tune the factored network")

    def compress(self, model: Model) -> Model:
        """The model without units that are zero, and with its layers factored where that saves. Nothing is trained."""
        if self.lam:
            model = dead_units_out(model)
        choices, layers = [], {}
        for choice in self.choose(model):
            if not choice.replaced:
                choices.append(choice)
                continue
            layer = layer_at(model.module, choice.path)
            layers[choice.path], error = factor_matrix(layer, choice.ranks[0], balanced=True)
            choices.append(replace(choice, error=error))
        return carry_out(model, choices, layers, "compression-aware training", {"energy": self.energy})

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What would be done with each layer as it is now; the training lowers ranks."""
        return tuple(choice.describe() for choice in self.choose(model))

    def choose(self, model: Model) -> tuple[Choice, ...]:
        """The rank of each layer, or the reason why it is left."""
        seen, left = scan(model, _objection, self.skip)
        return (*(self._chosen(one) for one in seen), *left)

    def _chosen(self, one: Seen) -> Choice:
        """Groups share a rank, since they share a layer: the largest that any of them asks for."""
        groups, rows = groups_of(one), filters_of(one)
        columns = one.layer.weight[0].numel()
        shape, dense = (rows, columns), one.layer.weight.numel()
        spectra = torch.linalg.svdvals(blocks(one.layer))
        if self.share is not None:
            rank = Parameters(self.share)(spectra[0], shape)
        elif self.energy == 1:
            rank = max(1, *(rank_of(values) for values in spectra))
        else:
            rank = max(Energy(self.energy, squared=True)(values, shape) for values in spectra)
        bias = len(one.layer.weight) if one.layer.bias is not None else 0
        factored, places = groups * factored_size(shape, rank), one.outputs
        choice = Choice(
            one.path,
            ranks=(rank,),
            full=(min(shape),),
            parameters=(dense + bias, factored + bias),
            macs=(dense * places, factored * places),
        )
        return unless_larger(choice)


def _objection(layer: Any) -> str:
    if not isinstance(layer, nn.Linear) and layer.out_channels == layer.groups:
        return "each of its groups has one filter, whose matrix is of rank 1"
    return ""
