"""CP decomposition of convolutions: Lebedev, Ganin, Rakhuba, Oseledets, Lempitsky 2015, "Speeding-up Convolutional
Neural Networks Using Fine-tuned CP-Decomposition", ICLR, arXiv 1412.6553 (survey 17).

A kernel over filters, channels, rows and columns is a tensor with four modes. Written as a sum of outer products by
non-linear least squares, it becomes four thin layers: pointwise to one map for each component, depthwise along the
rows, depthwise along the columns, pointwise to the filters. Then the whole network is fine-tuned.

It pays where a convolution has many channels and a kernel of 3x3 or more, and there is data to fine-tune on: at a given
number of multiply-adds the error of the kernel is large, and fine-tuning repairs it. It does not pay without
fine-tuning, nor where time is bound by memory, since three of the four layers do little work for each number they read:
measure it. Components that cancel one another make training unstable; `ridge` keeps them from it.

Paper -> here: `K(i, j, s, t)` -> the kernel, `R` -> rank, `K^x`, `K^y` -> axes, `K^s` -> channels, `K^t` -> filters.

DEPARTURE: the paper fits with Tensorlab's dogleg trust region from random starts; here alternating least squares from
several starts comes first, and a damped Gauss-Newton method with conjugate gradients polishes the best.

DEPARTURE: a little weight on the factors' norms (`ridge`) is the default, 0 gives the paper's plain fit: on trained
kernels it hardly changes the error and keeps components ten times smaller.

DEPARTURE: the rank follows from the share of multiply-adds that a layer may keep, where the paper sets it by hand.

DEPARTURE: one- and three-dimensional convolutions have one depthwise layer for each dimension of space, the groups of a
grouped convolution are decomposed one by one; the paper has neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from karui.errors import SettingError, did_you_mean, require
from karui.layers.axes import axis_stages, chain_cost, factor_axes, factor_axes_merged
from karui.lowrank._choice import Choice, unless_larger
from karui.lowrank._common import carry_out, fine_tune, require_data, require_fine_tuning, require_ranks
from karui.lowrank._per_layer import Offering, PerLayer
from karui.lowrank._scan import Seen, scan
from karui.lowrank._watching import kept, watched
from karui.model.taps import layer_at
from karui.numerics.cp import CP
from karui.numerics.cp_fit import SOLVERS, Solver, cp
from karui.numerics.unfold import split_groups
from karui.technique import Bench, Card, technique
from karui.train import Paced

if TYPE_CHECKING:
    from karui.model import Model
    from karui.numerics.cp import Watch

_QUICK = 10
"""Sweeps for a candidate of a budget."""


@technique(
    Card(
        survey=17,
        slug="cp_decomposition",
        title="Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition",
        kind="replace",
        reduces=("parameters", "macs", "bytes"),
        identity={"share": 1.0, "epochs": 0},
        quick={"share": 0.5, "sweeps": 20, "iterations": 5, "epochs": 1},
        arxiv="1412.6553",
        pays="convolutions of 3x3 or more with many channels, with data to fine-tune on",
        costs="no fine-tuning, few channels, pointwise or depthwise kernels; depthwise layers are bound by memory",
    )
)
@dataclass(frozen=True, kw_only=True)
class CpDecomposition(PerLayer, Offering):
    """Write every convolution that sees space as pointwise, depthwise, depthwise and pointwise layers, and fine-tune.

    Settings:
        share: share of each layer's multiply-adds to keep, in (0, 1]; 1 leaves the layers.
        rank: the same rank for every layer instead; None keeps to `share`.
        ranks: ranks of single layers, as (path, rank) pairs; they go before the other settings.
        solver: "nls" (non-linear least squares, the paper's), "als" (alternating) or "greedy" (deflation).
        restarts: random starts beside the one from singular vectors.
        sweeps: most sweeps of alternating least squares from each start; power iterations of a greedy component.
        iterations: most steps of non-linear least squares.
        ridge: weight of the factors' norms against the fit, which keeps components from cancelling one another.
        merge_colours: take colours and filters of the first convolution as one mode, so that its kernel has three.
        skip: paths of layers to leave.
        epochs: passes over the data for fine-tuning the whole network; 0 leaves the factors as they are.
        learning_rate: of the fine-tuning, smaller than that of the dense training. None takes the bench's.
        factor_rate: share of that rate that the decomposed layers take, since their gradients vary more.
        frozen_epochs: passes before that, in which the decomposed layers are held still and the rest adapts.
        one_by_one: decompose layer after layer as the fine-tuning has left them, with all of it after each.

    Needs: nothing; training data and a task if there are epochs.

    Raises:
        SettingError: a setting is out of range, or names no layer.
        NeedError: there is nothing to fine-tune on.

    Relations: `Tucker2` (12) keeps a dense core over space; with as many components as filters, and filters that are
    the unit matrix, the chain is one stage of a flattened convolution (15).

    Example:
        >>> import karui
        >>> model = karui.Model(nn.Conv2d(16, 32, 3, padding=1), example=(torch.zeros(1, 16, 8, 8),))
        >>> light = CpDecomposition(rank=8, epochs=0).apply(model, karui.Bench())
        >>> [tuple(stage.weight.shape) for stage in light.module]
        [(8, 16, 1, 1), (8, 1, 3, 1), (8, 1, 1, 3), (32, 8, 1, 1)]
    """

    share: float = 0.25
    rank: int | None = None
    ranks: tuple[tuple[str, int], ...] = ()
    solver: Solver = "nls"
    restarts: int = 1
    sweeps: int = 100
    iterations: int = 60
    ridge: float = 1e-4
    merge_colours: bool = False
    skip: tuple[str, ...] = ()
    epochs: int = 10
    learning_rate: float | None = None
    factor_rate: float = 1.0
    frozen_epochs: int = 0
    one_by_one: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple((path, rank) for path, rank in self.ranks))
        object.__setattr__(self, "skip", tuple(self.skip))
        within = 0 < self.share <= 1
        require(within, f"share is {self.share}; give a share of the multiply-adds in (0, 1], for example 0.25")
        require(self.rank is None or self.rank >= 1, f"rank is {self.rank}; give a number from 1, for example 32")
        for path, rank in self.ranks:
            require(rank >= 1, f"ranks has {rank} for '{path}'; give a number from 1")
        if self.solver not in SOLVERS:
            did_you_mean(self.solver, list(SOLVERS), "solver", SettingError)
        for name in ("restarts", "iterations", "frozen_epochs"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; give 0 or more")
        require(self.sweeps >= 1, f"sweeps is {self.sweeps}; give a number from 1, for example 100")
        require(0 <= self.ridge < math.inf, f"ridge is {self.ridge}; give 0 or more, for example 0.0001")
        require(self.factor_rate >= 0, f"factor_rate is {self.factor_rate}; give 0 or more, for example 0.1")
        require_fine_tuning(self.epochs, self.learning_rate)

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The decomposed model, fine-tuned."""
        assert model is not None  # noqa: S101  (the card's kind asks for one)
        require_data("cp_decomposition", model, bench, self.epochs + self.frozen_epochs)
        choices = self.choose(model)
        left = tuple(choice for choice in choices if not choice.replaced)
        seen = {one.path: one for one in self._scan(model)[0]}
        chosen = [choice for choice in choices if choice.replaced]
        if not chosen:
            return carry_out(model, left, {}, "CP", {"solver": self.solver})
        steps = [[choice] for choice in chosen] if self.one_by_one else [chosen]
        done: tuple[str, ...] = ()
        for step in steps:
            built = self._all_built(model, [seen[choice.path] for choice in step], step, bench)
            layers = {choice.path: layer for choice, (layer, *_) in zip(step, built, strict=True)}
            told = [replace(choice, error=how[1], remark=how[2]) for choice, how in zip(step, built, strict=True)]
            rest = left if step is steps[-1] else ()
            model = carry_out(model, (*told, *rest), layers, "CP", {"solver": self.solver})
            done += tuple(layers)
            model = self._tune(model, bench, done)
        return model

    def _scan(self, model: Model) -> tuple[tuple[Seen, ...], tuple[Choice, ...]]:
        seen, left = scan(model, _objection, self.skip)
        require_ranks([path for path, _ in self.ranks], seen, left)
        return seen, left

    def _merged(self, one: Seen) -> bool:
        return self.merge_colours and one.first and one.layer.in_channels > one.layer.groups

    def choice_for(self, one: Seen) -> Choice:
        """Rank by the setting; the layer is left if that would not save anything."""
        conv, merged = one.layer, self._merged(one)
        own, dense = dict(self.ranks).get(one.path), conv.weight.numel()
        macs = dense * one.outputs
        sizes = (dense // (conv.out_channels * math.prod(conv.kernel_size)), conv.out_channels // conv.groups)
        modes = [math.prod(sizes)] if merged else list(sizes)
        full = min(math.prod(modes + list(conv.kernel_size)) // size for size in (*modes, *conv.kernel_size))
        if own is None and self.rank is None and self.share == 1:
            return Choice(one.path, reason="share is 1, so that nothing is to be saved")
        _, unit = chain_cost(axis_stages(conv, 1, merged=merged), *one.space)
        room = max(1, math.floor(self.share * macs / unit + 1e-9))
        rank = min(own or self.rank or room, full)
        held, spent = chain_cost(axis_stages(conv, rank, merged=merged), *one.space)
        bias = conv.out_channels if conv.bias is not None else 0
        choice = Choice(
            one.path,
            ranks=(rank,),
            full=(full,),
            parameters=(dense + bias, held + bias),
            macs=(macs, spent),
        )
        return unless_larger(choice)

    def alone(self, model: Model, one: Seen, speedup: float) -> tuple[CpDecomposition, Choice]:
        """For a budget: the settings that do this to one layer and nothing else, and what becomes of it."""
        del model
        quick: Any = {"solver": "als", "restarts": 0, "sweeps": _QUICK, "epochs": 0, "frozen_epochs": 0}
        bare = replace(self, share=1 / speedup, rank=None, ranks=(), **quick)
        choice = bare.choice_for(one)
        return replace(bare, share=1.0, ranks=((one.path, *choice.ranks),) if choice.replaced else ()), choice

    def layer_for(self, one: Seen, choice: Choice, bench: Bench, evidence: Any) -> nn.Module:
        """For a budget: the chain of four layers, after a few sweeps of alternating least squares."""
        del evidence
        return self._build(one, choice, bench, lambda *_: None)[0]

    def _all_built(
        self, model: Model, seen: Sequence[Seen], choices: Sequence[Choice], bench: Bench
    ) -> list[tuple[nn.Module, float, str]]:
        """The factored layers, each from its weight in `model`, which a fine-tuning may have changed since the scan."""
        now = [replace(one, layer=layer_at(model.module, one.path)) for one in seen]
        with watched("CP", len(now), shown=bench.progress) as report:
            return [
                self._build(one, choice, bench, report(number, one.path))
                for number, (one, choice) in enumerate(zip(now, choices, strict=True))
            ]

    def _build(self, one: Seen, choice: Choice, bench: Bench, watch: Watch) -> tuple[nn.Module, float, str]:
        """The factored layer, its relative error, and what to tell of it."""
        conv, merged = one.layer, self._merged(one)
        tensors = modes_of(conv, merged=merged)
        settings: dict[str, Any] = {
            name: getattr(self, name) for name in ("solver", "restarts", "sweeps", "iterations", "ridge")
        }
        settings["seed"] = bench.seed
        found = kept(
            bench,
            "cp",
            [tensors, choice.ranks, settings],
            lambda: _fitted(tensors, [cp(block, choice.ranks[0], watch=watch, **settings) for block in tensors]),
        )
        filters, *others = (found[f"factor {mode}"] for mode in range(tensors.ndim - 1))
        if merged:
            each = filters.unflatten(1, (conv.out_channels // conv.groups, -1))
            layer: nn.Module = factor_axes_merged(conv, each, others)
        else:
            layer = factor_axes(conv, filters, others[0], others[1:])
        worst = float(found["cancellation"].max())
        return layer, float(found["error"]), f"cancellation {worst:.1f}"

    def _tune(self, model: Model, bench: Bench, paths: tuple[str, ...]) -> Model:
        rate = self.learning_rate
        adapt = "adapt the rest to the decomposed layers"
        model = fine_tune(model, bench, self.frozen_epochs, rate, adapt, influence=Paced(paths, 0.0))
        influence = Paced(paths, self.factor_rate) if self.factor_rate != 1 else None
        return fine_tune(model, bench, self.epochs, rate, "fine-tune the decomposed network", influence=influence)


def modes_of(conv: Any, *, merged: bool = False) -> Float[Tensor, "groups *modes"]:
    """The kernel in float64, a tensor for each group: filters, channels, then space; `merged` joins the first two."""
    kernel = split_groups(conv.weight.detach().double(), conv.groups)
    return kernel.flatten(1, 2) if merged else kernel


def _objection(layer: Any) -> str:
    if isinstance(layer, nn.Linear):
        return "CP is for convolutions; a linear layer is a matrix, whose CP is its SVD (svd_restructuring)"
    if all(taps == 1 for taps in layer.kernel_size):
        return "its kernel has one position, so that its CP is its SVD (svd_restructuring)"
    if layer.groups == layer.in_channels == layer.out_channels and layer.groups > 1:
        return "a depthwise convolution has no channels to factor"
    return ""


def _fitted(tensors: Float[Tensor, "groups *modes"], parts: list[CP]) -> dict[str, Tensor]:
    """Factors of all groups, mode by mode, with the relative error of all and the cancellation of each."""
    factors = {
        f"factor {mode}": torch.stack([part.factors[mode] for part in parts]) for mode in range(len(parts[0].factors))
    }
    energies = tensors.flatten(1).square().sum(1)
    lost = (energies * torch.tensor([part.error for part in parts]).double().square()).sum()
    told = torch.tensor([part.cancellation for part in parts])
    return {**factors, "error": (lost / energies.sum().clamp(min=1e-300)).sqrt(), "cancellation": told}
