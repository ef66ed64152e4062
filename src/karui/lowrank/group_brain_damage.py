"""Group-wise brain damage: Lebedev, Lempitsky 2016, "Fast ConvNets Using Group-wise Brain Damage", CVPR,
arXiv 1506.02515 (survey 26).

A convolution is a product: its filters, a matrix of filters by pairs of an input channel and a position of the kernel,
times the patches of the input. A pair that no filter uses is a column of zeros, and a row of patches that need not be
gathered: the product gets thinner and stays dense. A penalty on the norms of the columns, as in group lasso, makes
many of them small while the network trains; they are removed gradually, the smallest first, and the network adapts in
between. Each input channel ends with a pattern of positions of its own, which all filters share.

It pays on wide convolutions with kernels of several positions: with 256 channels of 3x3 on maps of 14x14, a fifth of
the columns is 2.9 times as fast as the best dense engine, with numba or as an ONNX file (one thread; 2.4 times on
another machine). It does not pay at densities above about a half, where gathering costs what the product saves, nor
on first or narrow layers, and less on large maps of few channels. Depthwise convolutions are left: their columns are
single weights.

Measured on the digits, kernels of 5x5, three seeds, equal epochs (`results/group_brain_damage.md`): at a quarter of the
inner columns 98.3 % when removed gradually, 97.4 and 97.4 % at once, with the penalty and without; dense 98.6 %. At a
tenth 96.4, 95.0 and 94.5 %. Not shown: that learned patterns beat one that is drawn at random and trained from the
start, which was as good (98.2 and 96.9 %); nor that norms of columns form two heaps under the penalty.

Paper -> here: `K` (filters by channels and offsets) -> weight, a group `(i, j, s)` -> a column, `lambda` -> lam, `tau`
-> density, `theta` (the threshold) -> the norm of the last column that is removed at a step.

DEPARTURE: the threshold is not given but follows from the density, which falls by the same factor at each removal, so
that the density that was asked for is reached exactly.

DEPARTURE: the weight of the penalty follows the loss, of which the penalty is a tenth, unless `lam` gives it. The
truncated form of the penalty is not offered; `shrink` is a proximal step in its place.

DEPARTURE: linear layers may be treated alike (`linear`): their columns are inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from karui.errors import require
from karui.layers.group_sparse import group_sparse_layer
from karui.lowrank._choice import Choice
from karui.lowrank._columns import (
    BrainDamage,
    Pattern,
    as_mask,
    column_norms,
    columns_of,
    fixed_columns,
    kept,
    name_of,
    surviving,
    weight_of,
)
from karui.lowrank._common import carry_out, fine_tune, require_fine_tuning
from karui.lowrank._per_layer import LARGE, Offering, PerLayer, all_others
from karui.lowrank._scan import Seen, filters_of, groups_of, scan
from karui.model import Note, layer_at
from karui.technique import Bench, Card, technique
from karui.technique.card import Need
from karui.technique.pruning.dead_units import dead_units_out
from karui.train.masks import MaskKeeper, zero_pruned

if TYPE_CHECKING:
    from karui.model import Model


@technique(
    Card(
        survey=26,
        slug="group_brain_damage",
        title="Fast ConvNets Using Group-wise Brain Damage",
        kind="influence",
        needs=("labels", "training"),
        reduces=("parameters", "macs", "bytes"),
        identity={"density": 1.0, "epochs": 0, "tuning": 0},
        quick={"density": 0.4, "rounds": 4, "epochs": 1, "tuning": 0},
        arxiv="1506.02515",
        pays="wide convolutions of 3x3 or more, at a quarter of the columns or fewer; runs fast in any dense engine",
        costs="densities above a half, first and narrow layers (gathering costs what the product saves); no labels",
    )
)
@dataclass(frozen=True, kw_only=True)
class GroupBrainDamage(PerLayer, Offering):
    """Train under a penalty on columns of the filter matrices, remove columns step by step, and leave them out.

    Settings:
        density: share of the columns of each layer that is left, in (0, 1].
        rounds: removals during the training, from 1; 1 removes all at once at its end.
        lam: weight of the penalty, 0 or more; None makes the penalty a `share` of the loss.
        share: the penalty as a share of the loss, 0 or more, where `lam` is None.
        shrink: what each column's norm loses in an epoch by proximal steps, beside the penalty; 0 or more.
        across: whether columns of all layers are ranked together by their norms; `density` is then that of all.
        pattern: "learned", or a control: "centre", "cross" and "random" keep these positions from the start, without a
            penalty.
        linear: whether linear layers lose inputs too.
        cut_unread: whether units of which no column is left are cut out of the layers before.
        skip: paths of layers to leave.
        epochs: passes over the training data under the penalty; 0 removes columns at once.
        tuning: passes without the penalty afterwards.
        learning_rate: of these; None takes the bench's.

    Needs: labels and training data, unless nothing is trained.

    Raises:
        SettingError: a setting is out of range, or names no layer.
        NeedError: there is nothing to train on.

    Relations: `L1Filters` (62) removes rows of the same matrix, that is whole filters; `MagnitudePruning` (52) single
    weights, which saves no time in a dense engine.

    Example:
        >>> import karui
        >>> model = karui.Model(nn.Conv2d(8, 8, 3), example=(torch.zeros(1, 8, 6, 6),))
        >>> light = GroupBrainDamage(density=0.25, epochs=0, tuning=0).apply(model, karui.Bench())
        >>> light.module.weight.shape, light.module(torch.zeros(1, 8, 6, 6)).shape
        (torch.Size([8, 18]), torch.Size([1, 8, 4, 4]))
    """

    ladder: ClassVar[tuple[float, ...]] = (4.0,)
    most: ClassVar[int] = LARGE

    density: float = 0.25
    rounds: int = 30
    lam: float | None = None
    share: float = 0.1
    shrink: float = 0.0
    across: bool = False
    pattern: Pattern = "learned"
    linear: bool = False
    cut_unread: bool = True
    skip: tuple[str, ...] = ()
    epochs: int = 20
    tuning: int = 10
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", tuple(self.skip))
        require(0 < self.density <= 1, f"density is {self.density}; give a share of the columns in (0, 1], as 0.25")
        require(self.rounds >= 1, f"rounds is {self.rounds}; give a number of removals from 1, for example 30")
        for name in ("lam", "share", "shrink"):
            value = getattr(self, name)
            within = value is None or 0 <= value < float("inf")
            require(within, f"{name} is {value}; give 0 or more, for example 0.1")
        require(self.tuning >= 0, f"tuning is {self.tuning}; give 0 or more passes over the training data")
        require_fine_tuning(self.epochs, self.learning_rate)

    def needs(self) -> tuple[Need, ...]:
        """Labels and training data, unless nothing is trained."""
        return ("labels", "training") if self.epochs or self.tuning else ()

    def influence(self, model: Model, bench: Bench) -> BrainDamage:
        """The penalty and the removals alone, for any training of this model."""
        seen, _ = self._scan(model)
        learned, masks = self.pattern == "learned", {}
        for one in seen:
            whole = torch.ones(groups_of(one), one.layer.weight[0].numel(), dtype=torch.bool)
            alive = whole if learned else fixed_columns(one.layer, self.pattern, self.density, bench.seed)
            masks[name_of(one.path)] = as_mask(alive, one.layer.weight)
        return BrainDamage(
            groups={one.path: groups_of(one) for one in seen},
            keeper=MaskKeeper(masks),
            density=self.density,
            rounds=self.rounds if learned and self.density < 1 else 0,
            lam=self.lam if learned else 0.0,
            share=self.share,
            shrink=self.shrink if learned else 0.0,
            across=self.across,
        )

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The model trained so, without the columns that are gone."""
        assert model is not None  # noqa: S101  (the card's kind asks for one)
        steps = self.influence(model, bench)
        if self.epochs:
            model = bench.fit(model, epochs=self.epochs, influence=steps, label="group-wise brain damage")
        else:
            model = self._at_once(model, steps)
        light = self.compress(model)
        return fine_tune(light, bench, self.tuning, self.learning_rate, "fine-tune what is left")

    def _at_once(self, model: Model, steps: BrainDamage) -> Model:
        """The model with its columns set to zero as it stands."""
        model = model.copy()
        zero_pruned(model.module, steps.keeper.masks)
        if self.pattern == "learned":
            norms = {
                path: column_norms(weight_of(model.module, path).detach(), count)
                for path, count in steps.groups.items()
            }
            whole = {path: torch.ones_like(norm, dtype=torch.bool) for path, norm in norms.items()}
            left = surviving(norms, whole, self.density, across=self.across)
            masks = {name_of(path): as_mask(m, weight_of(model.module, path)) for path, m in left.items()}
            zero_pruned(model.module, masks)
        return model.evolve(model.module, Note(f"columns set to zero, {self.density:.0%} left"))

    def compress(self, model: Model) -> Model:
        """The model with layers that hold only the columns that are not zero. Nothing is trained."""
        seen, left = self._scan(model)
        if self.cut_unread and not all(map(_reads_all, seen)):
            model = dead_units_out(model)
            seen, left = self._scan(model)
        choices, layers = list(left), {}
        for one in seen:
            alive = columns_of(one.layer.weight.detach() != 0, groups_of(one))
            choices.append(_choice(one, int(alive.sum())))
            if choices[-1].replaced:
                layers[one.path] = group_sparse_layer(layer_at(model.module, one.path), alive)
        return carry_out(model, choices, layers, "group-wise brain damage", {"density": self.density})

    def alone(self, model: Model, one: Seen, speedup: float) -> tuple[GroupBrainDamage, Choice]:
        """For a budget: the settings that do this to one layer at once and nothing else, and what becomes of it."""
        alone = replace(
            self,
            density=1 / speedup,
            pattern="learned",
            across=False,
            linear=isinstance(one.layer, nn.Linear),
            cut_unread=False,
            skip=tuple(all_others(model, one)),
            epochs=0,
            tuning=0,
        )
        return alone, alone.choice_for(one)

    def layer_for(self, one: Seen, choice: Choice, bench: Bench, evidence: Any) -> nn.Module:
        """For a budget: the layer with its columns of the largest norms."""
        del choice, bench, evidence
        norms = column_norms(one.layer.weight.detach(), groups_of(one))
        alive = surviving({"": norms}, {"": torch.ones_like(norms, dtype=torch.bool)}, self.density, across=False)
        return group_sparse_layer(one.layer, alive[""])

    def _scan(self, model: Model) -> tuple[tuple[Seen, ...], tuple[Choice, ...]]:
        return scan(model, self._objection, self.skip)

    def _objection(self, layer: Any) -> str:
        if isinstance(layer, nn.Linear):
            return "" if self.linear else "linear layers are left (linear=False)"
        if layer.out_channels == layer.groups:
            return "each of its groups has one filter: a column would be a single weight"
        if self.pattern in ("centre", "cross") and max(layer.kernel_size) == 1:
            return f"its kernel has one position, which '{self.pattern}' keeps"
        return ""

    def choice_for(self, one: Seen) -> Choice:
        """The columns that are left, by the setting."""
        groups, columns = groups_of(one), one.layer.weight[0].numel()
        if self.pattern in ("centre", "cross"):
            return _choice(one, int(fixed_columns(one.layer, self.pattern, self.density, 0).sum()))
        return _choice(one, groups * kept(columns, self.density))


def _choice(one: Seen, live: int) -> Choice:
    """What becomes of a layer of which so many columns are left, over all groups."""
    groups, each = groups_of(one), filters_of(one)
    columns, places = groups * one.layer.weight[0].numel(), one.outputs
    if live == columns:
        return Choice(one.path, reason="all of its columns are left")
    bias = len(one.layer.weight) if one.layer.bias is not None else 0
    return Choice(
        one.path,
        parameters=(each * columns + bias, each * live + bias),
        macs=(each * columns * places, each * live * places),
        form=f"{live:,} of {columns:,} columns",
    )


def _reads_all(one: Seen) -> bool:
    """Whether the layer has a column left for each of its input channels."""
    alive, channels = columns_of(one.layer.weight.detach() != 0, groups_of(one)), one.layer.weight.shape[1]
    return bool(alive.unflatten(1, (channels, -1)).any(2).all())
