"""Deep mutual learning: Zhang, Xiang, Hospedales and Lu 2018, "Deep Mutual Learning" (survey 39).

Networks of the same or of other architectures, started from different initial values, are trained on the same batches,
each by the labels and by what its peers say at that moment. There is no teacher that was trained before.

Pays where labels are few and a network alone is sure of its training data: peers differ in what they hold likely beside
the right class, and each learns that from the others. Does not pay where there is a good teacher already (distillation
costs one training, this one for each peer), or where labels are many. Nothing gets smaller unless a small peer is kept.

Measured with two peers, six seeds in each setting (`results/deep_mutual_learning.md`): predictions are always softer.
Small convolutional networks with batch normalisation on 600 colour pictures gain 1.7 points (35.2 to 36.9 %), and
weight noise raises their loss less; perceptrons on 300 to 400 digits gain nothing (0.0, -0.9, and 0.0 with a fifth of
the labels at random) and are no flatter. A small network (10 units) gains nothing beside a large one (256, 256), which
loses 0.8 points. On CIFAR-10 from the start, five passes at a rate of 0.1, a peer costs 13 to 16 points against the
same network trained alone at equal cost (`results/distillation_table.md`): there is not time enough for two.

Paper -> here: Theta_1 -> the given model, Theta_2 ... Theta_K -> further peers, p_k -> softmax of a peer's outputs,
D_KL(p_l || p_k) -> `divergence`, DML_e -> variant="ensemble".

DEPARTURE: the given model keeps the values that it has; give an untrained one for the paper's setting. Its weights that
are exactly zero stay so (`keep_zeros`), so that a pruned network can learn from whole ones.

DEPARTURE: a peer's answers for another one's update come from a forward pass of their own, also where its parameters
have not changed since the last: K(K-1) passes without gradient a step, the price of exact alternation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from karui.distill._asking import require_classes
from karui.distill._teachers import Teacher, lacking_teachers, teachers_of
from karui.errors import NeedError, require, told
from karui.model import Model, Note
from karui.model.averaging import averaged
from karui.numerics.soft_targets import log_soften
from karui.technique import Card, require_passes, technique
from karui.technique.joint import fit_together
from karui.technique.redraw import redrawn
from karui.train.joint import Answer
from karui.train.masks import MaskKeeper, zero_masks
from karui.train.randomness import seed_of

if TYPE_CHECKING:
    from karui.technique import Bench

SLUG = "deep_mutual_learning"
NUMBERS = "Set weight=0 to train without a word of the others; numbers of a teacher are learned by logit_regression."
Variant = Literal["mean", "ensemble"]
Keep = Literal["first", "best", "smallest", "ensemble"]


def divergence(
    theirs: Float[Tensor, "batch classes *positions"], logits: Float[Tensor, "batch classes *positions"]
) -> Float[Tensor, ""]:
    """KL(p_l || p_k) of a peer's log-probabilities and one's own logits, averaged over the batch (equation 4).

    Example:
        >>> z = torch.tensor([[1.0, 3.0]])
        >>> divergence(z.log_softmax(1), z + 2.0).abs().item() < 1e-6
        True
    """
    return (theirs.exp() * (theirs - log_soften(logits))).sum(1).mean()


def mutual_loss(
    logits: Float[Tensor, "batch classes *positions"],
    peers: Float[Tensor, "peers batch classes *positions"],
    variant: Variant = "mean",
) -> Float[Tensor, ""]:
    """What pulls a network to its peers: the mean of the divergences, or that from their mean (section 3.3).

    Args:
        logits: its own, with gradient.
        peers: the logits of the others, which are taken as they are.
        variant: "mean" or "ensemble" (DML_e).

    Example:
        >>> z = torch.randn(3, 4)
        >>> mutual_loss(z, torch.stack([z, z])).abs().item() < 1e-6
        True
    """
    told_by = torch.stack([log_soften(one) for one in peers.detach()])
    if variant == "ensemble":
        mean = told_by.logsumexp(0) - math.log(len(peers))
        return divergence(mean, logits)
    return torch.stack([divergence(one, logits) for one in told_by]).mean()


@dataclass(frozen=True)
class Mutual:
    """The loss of each peer.

    Settings:
        variant: "mean" or "ensemble".
        weight: of the divergence, beside the labels' loss.
    """

    variant: Variant = "mean"
    weight: float = 1.0

    def __call__(
        self, number: int, hard: Tensor, targets: Any, own: Answer, others: tuple[Answer, ...]
    ) -> Float[Tensor, ""]:
        """Of the peer of this number; a batch without labels counts by its divergence alone."""
        del number, targets
        if not others or self.weight == 0:
            return hard
        outputs, peers = own.outputs, [other.outputs for other in others]
        require(
            isinstance(outputs, Tensor) and outputs.ndim >= 2 and all(one.shape == outputs.shape for one in peers),
            f"'{SLUG}': a peer gives {told(outputs)} and others {', '.join(told(one) for one in peers)}.",
            "It is for classification: every peer must give logits [batch, classes, ...] of the same classes.",
            NeedError,
        )
        mutual = self.weight * mutual_loss(outputs, torch.stack(peers), self.variant)
        return hard + mutual


@technique(
    Card(
        survey=39,
        slug="deep_mutual_learning",
        title="Deep Mutual Learning",
        kind="influence",
        needs=("labels", "training"),
        identity={"epochs": 0},
        quick={"peers": 2, "epochs": 1},
        arxiv="1706.00384",
        pays="Networks trained together, without a teacher, each better than alone: where labels are few.",
        costs="As many trainings as peers, and a forward pass for each pair; nothing gets smaller by itself.",
    )
)
@dataclass(frozen=True, kw_only=True)
class MutualLearning:
    """Train a network together with peers that learn from it, and it from them.

    Settings:
        peers: networks of the given architecture, the given one counted; the others start from new initial values.
        partners: further peers, of any architecture for the same classes: Models, or folders of saved ones.
        weight: of the divergence, beside the labels' loss.
        variant: "mean", the mean of the divergences from each peer; "ensemble", the divergence from their mean.
        alternating: whether each peer sees the updates that others have had in the same step; else all learn from what
            was said before the step.
        keep: the result: "first", the given network; "best" on validation data; "smallest"; or "ensemble", the mean
            of all, which must be of one architecture.
        epochs: passes over the training data; None takes the training's; 0 leaves the given model as it is.
        keep_zeros: whether weights of the given model that are exactly zero stay so.

    Needs:
        Labels and training data. Samples of target -100 have none and are learned from the peers alone
        (`karui.train.transfer.with_unlabelled` mixes them in).

    Raises:
        SettingError: a setting is out of range.
        NeedError: peers do not give logits of the same classes, or the model gives none, as in a regression.
        UsageError: initial values cannot be drawn; an ensemble of different architectures.

    Relations: `KnowledgeDistillation` learns from a trained teacher; `BornAgain` from its former self.

    Example:
        >>> MutualLearning(peers=3, keep="best").variant
        'mean'
    """

    peers: int = 2
    partners: tuple[Teacher, ...] = ()
    weight: float = 1.0
    variant: Variant = "mean"
    alternating: bool = True
    keep: Keep = "first"
    epochs: int | None = None
    keep_zeros: bool = True

    def __post_init__(self) -> None:
        require(self.peers >= 1, f"peers is {self.peers}; give a number from 1, the given network counted")
        require(self.weight >= 0, f"weight is {self.weight}; give a number from 0, for example 1")
        if self.epochs is not None:
            require_passes(epochs=self.epochs)

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What `karui plan` tells of it."""
        del model
        return (f"{self.peers + len(self.partners)} networks are trained together; kept is: {self.keep}",)

    def lacks(self, bench: Bench, *, first: bool) -> list[tuple[str, str]]:
        """What is missing, before any work starts: (message, remedy) pairs."""
        return lacking_teachers(SLUG, self.partners, bench, first=first)

    def apply(self, model: Model, bench: Bench) -> Model:
        """The network that is kept."""
        if self.epochs == 0:
            return model
        trained = self.study(model, bench)
        if self.keep == "ensemble":
            return averaged(trained)
        if self.keep == "smallest":
            return min(trained, key=lambda one: one.parameters)
        if self.keep == "best":
            scores = [bench.evaluate(one) for one in trained]
            return max(zip(scores, trained, strict=True), key=_merit)[1]
        return trained[0]

    def fits(self, model: Model, bench: Bench) -> None:
        """Ask each partner once, so that one that does not fit is told before anything is trained."""
        if self.epochs != 0:
            self._require_classes(model)
        self._partners(model, bench)

    def _require_classes(self, model: Model) -> None:
        if self.weight and self.peers + len(self.partners) > 1:
            require_classes(SLUG, model, NUMBERS)

    def _partners(self, model: Model, bench: Bench) -> tuple[Model, ...]:
        if not self.partners:
            return ()
        alike = "Partners must know the same classes."
        return teachers_of(SLUG, self.partners, model, bench, whole="trains its partners", alike=alike)

    def study(self, model: Model, bench: Bench) -> tuple[Model, ...]:
        """Every peer after the training, the given one first.

        Args:
            model: the first peer.
            bench: with training data.
        """
        self._require_classes(model)
        fresh = [redrawn(model, seed_of(bench.seed, "peer", number)) for number in range(1, self.peers)]
        models = (model, *fresh, *self._partners(model, bench))
        masks = zero_masks(model.module) if self.keep_zeros else {}
        trained = fit_together(
            models,
            bench,
            pull=Mutual(self.variant, self.weight),
            alternating=self.alternating,
            influences={0: MaskKeeper(masks)} if masks else None,
            epochs=self.epochs,
            label="mutual",
        )
        told_of = f"peer of {len(models)} that taught each other"
        return tuple(one.evolve(one.module, Note(told_of, {"peer": n})) for n, one in enumerate(trained))


def _merit(scored: tuple[Any, Model]) -> float:
    score = scored[0]
    return score.value if score.higher_is_better else -score.value
