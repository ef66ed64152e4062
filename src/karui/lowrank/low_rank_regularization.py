"""Low-rank regularisation: Tai, Xiao, Zhang, Wang, E 2016, "Convolutional neural networks with low-rank
regularization", ICLR, arXiv 1511.06067 (survey 22).

A convolution becomes one along the rows over all channels and one along the columns over its maps. With the kernel laid
out as a matrix of (channels, rows) by (filters, columns) the best such pair at a given number of maps is a truncated
singular value decomposition: a global optimum in closed form. A trained network needs about one epoch of fine-tuning
then. Or the factored form is trained from scratch; it is twice as deep, so batch normalisation follows each second
convolution, before the non-linearity.

It pays for kernels of 3x3 and more, at once and without data; the two convolutions are dense, so time follows
multiply-adds more closely than with depthwise forms. It does not pay for pointwise kernels, nor where a layer has few
channels. At as many multiply-adds a CP decomposition that is fitted well (survey 17) is closer to trained kernels, here
on every layer tried; only the usual greedy one is not. Nothing is penalised: the regularisation is the factored form
itself.

Paper -> here: `W` -> kernel, `V` -> vertical, `H` -> horizontal, `K` -> rank, `d` -> kernel size, `C`, `N` -> channels,
filters.

DEPARTURE: ranks follow from the share of multiply-adds that a layer may keep or from the energy of its singular values,
where the paper sets them by hand (`rank` and `ranks` do that).

DEPARTURE: from scratch, weights are drawn by their fan-in, where the authors take normal ones with deviation 0.01; and
where the network normalises a convolution already, no second normalisation is added.

DEPARTURE: a one-dimensional kernel is split into its taps and a pointwise layer, a three-dimensional one into its
first dimension and the other two; the paper has two-dimensional kernels.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from karui.errors import SettingError, did_you_mean, require
from karui.layers.axes import chain_cost
from karui.layers.factored import NORMS, FactoredConv
from karui.layers.spatial import split_space, split_stages
from karui.lowrank._choice import Choice, unless_larger
from karui.lowrank._common import carry_out, fine_tune, require_data, require_fine_tuning, require_ranks, tracked
from karui.lowrank._per_layer import LARGE, Offering
from karui.lowrank._scan import Seen, filters_of, scan
from karui.lowrank._split import split_full, split_kernels
from karui.model.following import followings
from karui.numerics.svd import Energy
from karui.numerics.unfold import split_groups, unfold
from karui.technique import Bench, Card, technique
from karui.technique.redraw import redrawn

if TYPE_CHECKING:
    from karui.model import Model

Order = Literal["vertical", "horizontal", "better"]


@technique(
    Card(
        survey=22,
        slug="low_rank_regularization",
        title="Convolutional neural networks with low-rank regularization",
        kind="replace",
        reduces=("parameters", "macs", "bytes"),
        identity={"share": 1.0, "epochs": 0},
        quick={"share": 0.5, "epochs": 1},
        arxiv="1511.06067",
        pays="kernels of 3x3 and more: in closed form, without data; time follows multiply-adds",
        costs="pointwise kernels, few channels; a well fitted CP is closer to the kernel at as many multiply-adds",
    )
)
@dataclass(frozen=True, kw_only=True)
class LowRankRegularization(Offering):
    """Write every convolution as one along the rows and one along the columns, by SVD or to be trained from scratch.

    Settings:
        share: share of each layer's multiply-adds to keep, in (0, 1]; 1 leaves the layers.
        rank: the same number of maps between the two convolutions for every layer instead, those of all groups
            together; None keeps to `share`.
        energy: share of the squared singular values to keep, in (0, 1], instead of a share of the multiply-adds.
        ranks: ranks of single layers, as (path, rank) pairs; they go before the other settings.
        order: which dimension of space is seen first: "vertical" (rows, the paper's), "horizontal" (the last one), or
            "better", whichever leaves the smaller error.
        scratch: draw all weights of the network anew, so that the factored form is trained from the beginning.
        normalise: with `scratch`, put batch normalisation after each second convolution that has none.
        skip: paths of layers to leave.
        epochs: passes over the data, for fine-tuning or for the whole training; 0 trains nothing.
        learning_rate: of them; None takes the bench's.

    Needs: nothing; training data and a task if `epochs` is not 0.

    Raises:
        SettingError: a setting is out of range, or names no layer.
        NeedError: there is nothing to train on.

    Relations: scheme 2 of `LowRankExpansion` (13) has this form and fits it to responses; `CpDecomposition` (17) has
    one map for each component.

    Example:
        >>> import karui
        >>> model = karui.Model(nn.Conv2d(16, 32, 3, padding=1), example=(torch.zeros(1, 16, 8, 8),))
        >>> light = LowRankRegularization(rank=8, epochs=0).apply(model, karui.Bench())
        >>> [tuple(stage.weight.shape) for stage in light.module]
        [(8, 16, 3, 1), (32, 8, 1, 3)]
    """

    most: ClassVar[int] = LARGE

    share: float = 0.33
    rank: int | None = None
    energy: float | None = None
    ranks: tuple[tuple[str, int], ...] = ()
    order: Order = "vertical"
    scratch: bool = False
    normalise: bool = True
    skip: tuple[str, ...] = ()
    epochs: int = 1
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple((path, rank) for path, rank in self.ranks))
        object.__setattr__(self, "skip", tuple(self.skip))
        within = 0 < self.share <= 1
        require(within, f"share is {self.share}; give a share of the multiply-adds in (0, 1], for example 0.33")
        require(self.rank is None or self.rank >= 1, f"rank is {self.rank}; give a number from 1, for example 32")
        held = self.energy is None or 0 < self.energy <= 1
        require(held, f"energy is {self.energy}; give a share in (0, 1], for example 0.9")
        require(self.rank is None or self.energy is None, "rank and energy are both given; give one of them")
        require(not (self.scratch and self.energy is not None), "energy is of trained weights; give rank with scratch")
        for path, rank in self.ranks:
            require(rank >= 1, f"ranks has {rank} for '{path}'; give a number from 1")
        if self.order not in get_args(Order):
            did_you_mean(self.order, list(get_args(Order)), "order", SettingError)
        require_fine_tuning(self.epochs, self.learning_rate)

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The factored model, fine-tuned or trained."""
        assert model is not None  # noqa: S101  (the card's kind asks for one)
        require_data("low_rank_regularization", model, bench, self.epochs)
        seen, left = self._scan(model)
        normed, choices, layers = self._normed(model, seen), [], {}
        for one in tracked(seen, "factor", shown=bench.progress):
            choice, dim = self.choice_and_dim(one, normed)
            if choice.replaced:
                chain, error = _build(one.layer, choice.ranks[0], dim)
                layers[one.path] = _with_norm(chain) if one.path in normed else chain
                choice = replace(choice, error=None if self.scratch else error)
            choices.append(choice)
        factored = carry_out(model, (*choices, *left), layers, "low-rank regularisation", {"scratch": self.scratch})
        if not layers:
            return factored
        if self.scratch:
            factored = redrawn(factored, bench.seed)
        label = "train the factored network" if self.scratch else "fine-tune the factored network"
        return fine_tune(factored, bench, self.epochs, self.learning_rate, label)

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What would be done with each layer, and why."""
        return tuple(choice.describe() for choice in self.choose(model))

    def choose(self, model: Model) -> tuple[Choice, ...]:
        """The rank of each layer, or the reason why it is left."""
        seen, left = self._scan(model)
        normed = self._normed(model, seen)
        return (*(self.choice_and_dim(one, normed)[0] for one in seen), *left)

    def alone(self, model: Model, one: Seen, speedup: float) -> tuple[LowRankRegularization, Choice]:
        """For a budget: the settings that do this to one layer and nothing else.

        Rows first is what `LowRankExpansion` offers of its second scheme; so here is what that leaves: columns first,
        where that is nearer to the kernel, and kernels with one dimension of space.
        """
        del model
        bare = replace(self, rank=None, energy=None, ranks=(), scratch=False, epochs=0)
        choice, dim = replace(bare, share=1 / speedup, order="better").choice_and_dim(one)
        kernel = one.layer.kernel_size
        if not dim and split_full(one.layer.weight.shape[1], filters_of(one), kernel):
            choice = Choice(one.path, reason="rows first is nearer, which low_rank_expansion offers")
        own: Any = ((one.path, *choice.ranks),) if choice.replaced else ()
        return replace(bare, share=1.0, ranks=own, order="horizontal" if dim else "vertical"), choice

    def layer_for(self, one: Seen, choice: Choice, bench: Bench, evidence: Any) -> nn.Module:
        """For a budget: the two convolutions in closed form."""
        del bench, evidence
        return _build(one.layer, choice.ranks[0], len(one.layer.kernel_size) - 1 if self.order == "horizontal" else 0)[
            0
        ]

    def _normed(self, model: Model, seen: Sequence[Seen]) -> frozenset[str]:
        """The layers that get batch normalisation: from scratch, those that have none behind them."""
        if not (self.scratch and self.normalise):
            return frozenset()
        found = followings(model, [one.path for one in seen])
        return frozenset(path for path, following in found.items() if following.scale is None)

    def _scan(self, model: Model) -> tuple[tuple[Seen, ...], tuple[Choice, ...]]:
        seen, left = scan(model, _objection, self.skip)
        require_ranks([path for path, _ in self.ranks], seen, left)
        return seen, left

    def choice_and_dim(self, one: Seen, normed: Collection[str] = ()) -> tuple[Choice, int]:
        """The choice, and the dimension of space that is seen first."""
        last = len(one.layer.kernel_size) - 1
        dims = {"vertical": (0,), "horizontal": (last,), "better": (0, last)}[self.order]
        found = [(self._at(one, dim, norm=one.path in normed), dim) for dim in dict.fromkeys(dims)]
        if len(found) == 1 or not all(choice.replaced for choice, _ in found):
            return next((pair for pair in found if pair[0].replaced), found[0])
        lost = [split_loss(one.layer, choice.ranks[0] // one.layer.groups, dim) for choice, dim in found]
        choice, dim = found[lost.index(min(lost))]
        return replace(choice, remark=f"dimension {dim} first"), dim

    def _at(self, one: Seen, dim: int, *, norm: bool) -> Choice:
        conv, groups = one.layer, one.layer.groups
        kernel, dense = conv.kernel_size, conv.weight.numel()
        own, each = dict(self.ranks).get(one.path) or self.rank, conv.out_channels // groups
        rows, columns = conv.weight.shape[1] * kernel[dim], each * math.prod(kernel) // kernel[dim]
        full = min(rows, columns)
        if own is not None:
            rank = max(1, own // groups)
        elif self.energy is not None:
            values = [torch.linalg.svdvals(matrix) for matrix in matrices_of(conv, dim)]
            rank = max(Energy(self.energy, squared=True)(one, (rows, columns)) for one in values)
        elif self.share == 1:
            return Choice(one.path, reason="share is 1, so that nothing is to be saved")
        else:
            unit = chain_cost(split_stages(conv, 1, each, dim=dim), *one.space)[1]
            rank = max(1, math.floor(self.share * dense * one.outputs / unit + 1e-9))
        rank = min(rank, full)
        held, macs = chain_cost(split_stages(conv, rank, each, dim=dim), *one.space)
        bias = conv.out_channels if conv.bias is not None else 0
        choice = Choice(
            one.path,
            ranks=(groups * rank,),
            full=(groups * full,),
            parameters=(dense + bias, held + (2 * conv.out_channels if norm else bias)),
            macs=(dense * one.outputs, macs),
        )
        return unless_larger(choice)


def matrices_of(conv: Any, dim: int = 0) -> Float[Tensor, "groups rows columns"]:
    """The kernel of each group, in float64, as the matrix of (channels, dimension `dim`) by (filters, the others)."""
    return torch.stack([unfold(kernel, (1, 2)) for kernel in _kernels(conv, dim)])


def split_loss(conv: Any, rank: int, dim: int = 0) -> float:
    """Relative error of the best two convolutions with `rank` maps a group between them: what the SVD discards."""
    values = torch.linalg.svdvals(matrices_of(conv, dim)).square()
    return math.sqrt(float(values[:, rank:].sum()) / max(float(values.sum()), 1e-300))


def _kernels(conv: Any, dim: int) -> Float[Tensor, "groups filters channels first *others"]:
    return split_groups(conv.weight.detach().double(), conv.groups).movedim(3 + dim, 3)


def _build(conv: Any, rank: int, dim: int) -> tuple[FactoredConv, float]:
    """The two convolutions in closed form, and their relative error; `rank` is that of all groups together."""
    each = rank // conv.groups
    vertical, horizontal = split_kernels(_kernels(conv, dim), each)
    return split_space(conv, vertical, horizontal, dim=dim), split_loss(conv, each, dim)


def _with_norm(chain: FactoredConv) -> nn.Sequential:
    """The chain without its bias, which normalisation would take away, and batch normalisation."""
    settings = chain.settings()
    settings["stages"][-1]["bias"] = False
    bare = FactoredConv(**settings)
    norm = NORMS[chain.dimensions](chain.stages[-1].out_channels)
    return nn.Sequential(bare, norm).to(chain.stages[-1].weight).train(chain.training)


def _objection(layer: Any) -> str:
    if isinstance(layer, nn.Linear):
        return "a linear layer has no space to split (svd_restructuring factors it)"
    if all(taps == 1 for taps in layer.kernel_size):
        return "its kernel has one position, so that nothing is to be split (svd_restructuring factors it)"
    return ""
