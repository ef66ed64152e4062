"""Random channel pruning (survey 69): Mittal, Bhardwaj, Khapra, Ravindran, "Recovering from Random Pruning: On the
Plasticity of Deep Convolutional Neural Networks", WACV 2018.

Filters are drawn by chance, the same share in every layer, and cut layer by layer with an epoch of training after each;
fine-tuning follows. At 25 to 50 % of the filters the result is as good as with criteria that look at weights or data:
networks recover from what they lost, whatever it was. That makes it the control of every structured pruning here:
`karui.technique.pruning.harness` runs criteria and chance under this one protocol.

It pays as a baseline, and where fine-tuning is long. It does NOT pay without fine-tuning (chance then loses clearly),
or at extreme ratios, for which the paper claims nothing.

Paper -> here: p % of each layer's filters -> `ratio`, stage I (prune a layer, train an epoch) -> `layer_epochs`, stage
II (fine-tune) -> `epochs`, random draw -> `draw`, class-specific pruning -> `classes`.

DEPARTURE: units of linear and other layers are drawn like filters (`linear=False` cuts convolutions only, as the paper
does).

DEPARTURE: the paper trains with one fixed optimiser; here the bench's is used, the same for every criterion compared.

DEPARTURE: of the criteria that chance is compared with, sensitivity is here the L1 norm of the loss's gradient in a
unit's weights, averaged over batches; the paper's exact form could not be checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from karui.errors import require
from karui.technique import Card, technique
from karui.technique.pruning.classes import of_classes
from karui.technique.pruning.criteria import Uniform
from karui.technique.pruning.plan import candidates, remarks, shares
from karui.technique.pruning.schedule import cut_layer_by_layer, cut_once
from karui.technique.pruning.scope import Quota, Scope

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique import Bench
    from karui.technique.card import Need


@technique(
    Card(
        survey=69,
        slug="random_channel_pruning",
        title="Recovering from Random Pruning: On the Plasticity of Deep Convolutional Neural Networks",
        kind="cut",
        needs=("labels", "training"),
        reduces=("parameters", "macs", "bytes"),
        identity={"ratio": 0.0},
        quick={"ratio": 0.5, "layer_epochs": 1, "epochs": 1},
        arxiv="1801.10447",
        pays="As the control for any criterion, and at 25 to 50 % of the filters with enough fine-tuning.",
        costs="Without fine-tuning, and at extreme ratios.",
    )
)
@dataclass(frozen=True, kw_only=True)
class RandomChannels:
    """Remove channels drawn by chance from every coupled group that one layer makes, layer by layer, and fine-tune.

    Settings:
        ratio: share of the units cut in each group, in [0, 1).
        ratios: shares of single layers by name or shell pattern ("layer3.*"), which ratio then does not touch.
        skip: layers left whole, by name or shell pattern.
        tied: whether maps that several layers write into (at shortcuts) are cut too.
        linear: whether units of other layers than convolutions are cut too.
        multiple: what is kept is a multiple of this many units, as engines like (8); 1 keeps the ratio exact.
        allow_normalisation: whether groups are cut that a normalisation across channels mixes.
        draw: number of the random draw; the bench's seed and the draw fix what is cut, so that another draw keeps the
            training's seed.
        layer_epochs: passes over the training data after each layer's cut; 0 cuts all layers at once.
        epochs: passes of fine-tuning at the end; 0 fine-tunes nothing.
        classes: class numbers to train for, if the network is needed for these only; empty for all.

    Needs:
        Nothing to draw. Labels and training data to fine-tune.

    Raises:
        SettingError: a share, multiple or draw is out of range, or a layer named is not there or cannot be cut.
        SurgeryError: no group can be cut; single ones stay whole, told in the lineage.
        DataError: a class has no sample.

    Relations: `L1Filters` (62) chooses by weights; `karui.technique.pruning.harness` compares both and others.

    Example:
        >>> import torch, karui
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 3))
        >>> model = karui.Model(net, example=(torch.zeros(1, 1, 8, 8),))
        >>> light = RandomChannels(ratio=0.25, layer_epochs=0, epochs=0).apply(model, karui.Bench())
        >>> light.module[0].weight.shape
        torch.Size([6, 1, 3, 3])
    """

    ratio: float = 0.5
    ratios: Mapping[str, float] = field(default_factory=dict, hash=False)
    skip: tuple[str, ...] = ()
    tied: bool = False
    linear: bool = True
    multiple: int = 1
    allow_normalisation: bool = False
    draw: int = 0
    layer_epochs: int = 1
    epochs: int = 20
    classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        Quota.of(self)
        for name in ("draw", "layer_epochs", "epochs"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; give 0 or more")

    def needs(self) -> tuple[Need, ...]:
        """Labels and training data, unless nothing is cut or nothing is trained."""
        return () if Quota.of(self).nothing or self.epochs + self.layer_epochs == 0 else ("labels", "training")

    def remarks(self, model: Model) -> tuple[str, ...]:
        """For `plan`: how much of each group is cut, and what is left whole and why."""
        return remarks(model, Scope.of(self), Quota.of(self))

    def apply(self, model: Model, bench: Bench) -> Model:
        """The model with random units gone, fine-tuned."""
        if Quota.of(self).nothing:
            return model
        if self.classes:
            bench = of_classes(bench, self.classes)
        found = candidates(model, Scope.of(self))
        counts = Quota.of(self).counts(found.groups, shares(found, Quota.of(self)))
        if not counts:
            return model
        chance, allowed = Uniform(self.draw), self.allow_normalisation
        if self.layer_epochs:
            light = cut_layer_by_layer(
                model, bench, chance, counts, label="random", epochs=self.layer_epochs, allow_normalisation=allowed
            )
        else:
            light = cut_once(model, bench, chance, counts, label="random", allow_normalisation=allowed)
        return bench.fit(light, epochs=self.epochs, label="fine-tune") if self.epochs else light
