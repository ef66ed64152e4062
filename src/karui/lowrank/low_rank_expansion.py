"""Low-rank expansions: Jaderberg, Vedaldi, Zisserman 2014, "Speeding up Convolutional Neural Networks with Low Rank
Expansions", BMVC, arXiv 1405.3866 (survey 13).

Two structures times two objectives. Scheme 1: the two-dimensional slices of all filters are mixtures of few separable
filters, which all input channels share, so a convolution becomes a vertical and a horizontal depthwise one and a
pointwise one. Scheme 2: a convolution becomes a vertical one over all channels and a horizontal one over its maps.
Filter reconstruction imitates the kernel; data reconstruction imitates what the kernel makes of real inputs, and
jointly, what the original network makes of them while the earlier layers are compressed already.

It pays for kernels of 5x5 and more, and for 3x3 ones at a small speed-up, with inputs at hand: fitting the responses
halves the error or better, without labels. It does not pay for first layers of few channels, nor in engines that are
slow at depthwise layers (scheme 1: many maps, each seen once); measure the time.

Paper -> here: `s_m = v_m h_m^T` -> filters, `a` -> mix, `M` (scheme 1), `K` (scheme 2) -> rank, `d` -> kernel size,
`Phi` -> inputs, `C`, `N` -> channels, filters.

DEPARTURE: data reconstruction descends by back-propagation on the exact error over all calibration windows, which
their second moments tell, in place of stochastic steps on the windows; and the bias is fitted with the factors. A
hundredth of isotropic inputs is added to those seen, so that factors do not grow and cancel one another where the
inputs hardly vary.

DEPARTURE: filter reconstruction of scheme 2 is in closed form, whose alternating solution the paper computes; `solver`
gives that one.

DEPARTURE: after the filters of scheme 1 are cut to rank 1, alternation goes on with filters held there, which takes
away the bias of the penalty; the paper ends with the mixtures.

DEPARTURE: three-dimensional kernels are split by scheme 2 into their first dimension and the others; the paper has
two-dimensional ones. The groups of a grouped convolution are split one by one, and share the filters of scheme 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from karui.errors import require
from karui.lowrank._calibrate import Calibration, regularised
from karui.lowrank._choice import Choice
from karui.lowrank._common import carry_out, fine_tune, require_data, require_fine_tuning, require_ranks, tracked
from karui.lowrank._expansion import SCHEMES, Expanded, Joint, Separable, choose_rank, flat_objection
from karui.lowrank._per_layer import LARGE, Offering, PerLayer
from karui.lowrank._scan import Seen, groups_of, scan
from karui.lowrank._watching import Shelf
from karui.model import replace_layers
from karui.numerics.unfold import split_groups
from karui.technique import Bench, Card, technique

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique.card import Need

OBJECTIVES = ("filter", "data")
SOLVERS = ("closed", "alternating")


@technique(
    Card(
        survey=13,
        slug="low_rank_expansion",
        title="Speeding up Convolutional Neural Networks with Low Rank Expansions",
        kind="replace",
        needs=("calibration",),
        reduces=("parameters", "macs", "bytes"),
        identity={"speedup": 1.0},
        quick={"speedup": 1.5, "images": 200, "iterations": 20},
        arxiv="1405.3866",
        pays="kernels of 5x5 and more, or small speed-ups of 3x3 ones, with inputs at hand and no labels",
        costs="first layers of few channels; scheme 1 in engines that are slow at depthwise layers",
    )
)
@dataclass(frozen=True, kw_only=True)
class LowRankExpansion(PerLayer, Offering):
    """Split every convolution over space, to imitate its kernel or its responses.

    The first convolution is left alone unless `ranks` names it.

    Settings:
        scheme: 1 for separable filters that all channels share and a pointwise mixture, 2 for a vertical and a
            horizontal convolution.
        speedup: how many times fewer multiply-adds each layer shall do, from 1; its rank is the largest that holds it.
        ranks: ranks of single layers, as (path, rank) pairs; they go before `speedup`.
        shared: whether the separable filters of scheme 1 are the same for all input channels.
        objective: "filter" imitates kernels, "data" responses.
        joint: whether a layer is fitted on the inputs that the split layers before it give (data only).
        solver: "closed" or "alternating", for the kernels of scheme 2.
        images: calibration inputs.
        positions: random positions of each layer's output that are looked at, for each input.
        iterations: most steps of descent for each layer.
        skip: paths of layers to leave.
        epochs: passes over the data for fine-tuning; 0 leaves the factors as they are.
        learning_rate: of the fine-tuning; None takes the bench's.

    Needs: calibration inputs if the objective is "data"; labels and a task if `epochs` is not 0.

    Raises:
        SettingError: a setting is out of range, or names no layer.
        NeedError: there are no calibration inputs, or nothing to fine-tune on.

    Relations: `AsymmetricNonlinear` (16) looks at responses behind the ReLU; `SeparableFilters` (14) finds the filters
    of scheme 1 in other ways, also in three dimensions.

    Example:
        >>> import karui, torch
        >>> layers = torch.nn.Conv2d(3, 16, 5), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 5)
        >>> model = karui.Model(torch.nn.Sequential(*layers), example=(torch.zeros(1, 3, 16, 16),))
        >>> light = LowRankExpansion(objective="filter", ranks=(("2", 12),)).apply(model, karui.Bench())
        >>> [tuple(layer.weight.shape) for layer in light.module[2]]
        [(12, 16, 5, 1), (32, 12, 1, 5)]
    """

    most: ClassVar[int] = LARGE

    scheme: int = 2
    speedup: float = 2.0
    ranks: tuple[tuple[str, int], ...] = ()
    shared: bool = True
    objective: str = "data"
    joint: bool = True
    solver: str = "closed"
    images: int = 1000
    positions: int = 20
    iterations: int = 150
    skip: tuple[str, ...] = ()
    epochs: int = 0
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple((path, rank) for path, rank in self.ranks))
        object.__setattr__(self, "skip", tuple(self.skip))
        require(self.scheme in SCHEMES, f"scheme is {self.scheme}; give 1 or 2")
        require(self.speedup >= 1, f"speedup is {self.speedup}; give a number from 1, for example 2")
        for path, rank in self.ranks:
            require(rank >= 1, f"ranks has {rank} for '{path}'; give a number from 1")
        require(self.objective in OBJECTIVES, f'objective is "{self.objective}"; give "filter" or "data"')
        require(self.solver in SOLVERS, f'solver is "{self.solver}"; give "closed" or "alternating"')
        require(self.images >= 1, f"images is {self.images}; give a number from 1, for example 1000")
        require(self.positions >= 1, f"positions is {self.positions}; give a number from 1, for example 20")
        require(self.iterations >= 0, f"iterations is {self.iterations}; give 0 or more, for example 150")
        require_fine_tuning(self.epochs, self.learning_rate)

    def needs(self) -> tuple[Need, ...]:
        """What these settings need: kernels are imitated without inputs."""
        return ("calibration",) if self.objective == "data" else ()

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The model with its convolutions split, fine-tuned if asked for."""
        assert model is not None  # noqa: S101  (the card's kind asks for one)
        require_data("low_rank_expansion", model, bench, self.epochs)
        seen, left = self._scan(model)
        calibration, shelf = Calibration(model, bench, self.images, self.positions), Shelf.of(self, model, bench)
        current, layers, told = model, {}, list(left)
        for one in tracked(seen, "split layers", shown=bench.progress):
            choice = self.choice_for(one)
            if choice.replaced:
                make = partial(self._made, calibration, current if self.joint else model, one, choice)
                layers[one.path], choice = shelf.layer(one, make)
                if self.joint:
                    current = replace_layers(current, {one.path: layers[one.path]}, check=False)
            told.append(choice)
        wanted = {"scheme": self.scheme, "speedup": self.speedup, "objective": self.objective, "joint": self.joint}
        light = carry_out(model, told, layers, f"Low-rank expansion, scheme {self.scheme}", wanted)
        return fine_tune(light, bench, self.epochs, self.learning_rate, "fine-tune the network") if layers else light

    def _made(self, calibration: Calibration, source: Model, one: Seen, choice: Choice) -> tuple[nn.Module, Choice]:
        """The split layer, on the inputs that `source` gives it, and the choice with its error."""
        expanded = self._expanded(one, choice.ranks[0])
        error = expanded.error
        if self.objective == "data":
            weights = split_groups(one.layer.weight.detach(), groups_of(one))
            moments = calibration.moments(source, one)
            held = [regularised(each, weight, centred=True) for each, weight in zip(moments, weights, strict=True)]
            expanded = expanded.fitted(held, self.iterations)
            error = expanded.response_error(moments)
        return expanded.build(), replace(choice, error=error)

    def _scan(self, model: Model) -> tuple[tuple[Seen, ...], tuple[Choice, ...]]:
        """Layers that can be split, in the order of their calls, and the others."""
        seen, left = scan(model, self._objection, self.skip)
        named = [path for path, _ in self.ranks]
        require_ranks(named, seen, left)
        reason = "the first convolution is left alone; name it in ranks to split it"
        first = tuple(Choice(one.path, reason=reason) for one in seen if one.first and one.path not in named)
        kept = [one for one in seen if not one.first or one.path in named]
        return tuple(sorted(kept, key=lambda one: one.order)), (*left, *first)

    def _objection(self, layer: Any) -> str:
        flat = flat_objection(layer)
        if flat:
            return flat
        if self.scheme == 1 and len(layer.kernel_size) != 2:
            return "scheme 1 is for two dimensions of space; separable_filters (14) does three"
        if self.scheme == 2 and layer.kernel_size[0] == 1:
            return "its kernel has nothing to part along the first dimension"
        return ""

    def choice_for(self, one: Seen) -> Choice:
        """The rank by the setting; the layer is left if that would not save anything."""
        own = dict(self.ranks).get(one.path)
        return choose_rank(one, self._scheme(), self.speedup, own, fits_bias=self.objective == "data")

    def alone(self, model: Model, one: Seen, speedup: float) -> tuple[LowRankExpansion, Choice]:
        """For a budget: the settings that do this to one layer and nothing else."""
        del model
        bare = replace(self, objective="filter", speedup=speedup, ranks=(), epochs=0)
        choice = bare.choice_for(one)
        return replace(bare, speedup=1.0, ranks=((one.path, *choice.ranks),) if choice.replaced else ()), choice

    def layer_for(self, one: Seen, choice: Choice, bench: Bench, evidence: Any) -> nn.Module:
        """For a budget: the layer whose kernel imitates the old one."""
        del bench, evidence
        return self._expanded(one, choice.ranks[0]).build()

    def _scheme(self) -> Separable | Joint:
        return SCHEMES[self.scheme](shared=self.shared)

    def _expanded(self, one: Seen, rank: int) -> Expanded:
        return self._scheme().expand(one, rank, alternating=self.solver == "alternating")
