"""Separable filters: Rigamonti, Sironi, Lepetit, Fua 2013, "Learning Separable Filters", CVPR; extended by Sironi,
Tekin, Rigamonti, Lepetit, Fua 2015, IEEE TPAMI (survey 14).

A bank of filters is a mixture of fewer separable ones, which all of its filters share. Three ways to find them: a
penalty on the nuclear norms of free filters that is raised until each is of rank 1 (`comb`); the CP decomposition of
the stacked bank (`td`, the journal's and the best); or sparse coding of pictures with separable filters from the start,
without a look at the bank (`direct`, the baseline). `karui.numerics.separable` and its neighbours work on any bank, in
two and three dimensions; here the bank is the slices of a convolution, one for each filter and input channel.

It pays for large kernels (7x7 and more, 3-D) and for first layers, whose slices are smooth and alike. It does not pay
for 3x3 kernels, where a few shared filters must stand for nine positions, nor in engines that are slow at depthwise
layers; measure the time.

Paper -> here: `f_j` -> bank, `s_k` -> filters, `w_kj` -> mix, `K` -> rank, `m` -> maps, `lambda_1` -> sparsity,
`lambda_*` -> the threshold that rises (`comb`), flatness (`direct`).

DEPARTURE: filters of `comb` are kept at length 1, so that small filters cannot evade the penalty; each has a step size
of its own; and after the cut to rank 1 the alternation goes on with filters held there, which takes away the bias of
the penalty.

DEPARTURE: with `comb` one filter more may leave a larger error, since the cut to rank 1 comes after all else: of three
random filters of 5x5 four separable ones left 0.43 and five 0.52. With `td` the error never rose (18 random banks).

DEPARTURE: in a network the bank is given, so `direct` learns its filters on the inputs of the layer, each channel a
picture, and mixes the layer's slices of them; in the paper it replaces the bank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from karui.errors import require
from karui.lowrank._choice import Choice
from karui.lowrank._common import carry_out, fine_tune, require_data, require_fine_tuning, require_ranks, tracked
from karui.lowrank._expansion import Separable, choose_rank, flat_objection, separated
from karui.lowrank._per_layer import Offering, PerLayer
from karui.lowrank._scan import Seen, scan
from karui.lowrank._watching import Shelf
from karui.model.responses import responses
from karui.numerics.separable import Mixture, by_nuclear_norm, mixed, rank_one
from karui.numerics.separable_cp import by_tensor
from karui.numerics.sparse_coding import learn_filters
from karui.technique import Bench, Card, technique

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique.card import Need

METHODS = ("comb", "td", "direct")
_MAPS = 256


@technique(
    Card(
        survey=14,
        slug="separable_filters",
        title="Learning Separable Filters",
        kind="replace",
        reduces=("parameters", "macs", "bytes"),
        identity={"speedup": 1.0},
        quick={"speedup": 1.5, "restarts": 1},
        pays="large kernels, in two or three dimensions, and first layers",
        costs="3x3 kernels, whose slices have little in common; engines that are slow at depthwise layers",
    )
)
@dataclass(frozen=True, kw_only=True)
class SeparableFilters(PerLayer, Offering):
    """Write the slices of every convolution as mixtures of a few separable filters.

    Settings:
        method: "td" by tensor decomposition, "comb" by the nuclear norm, "direct" by sparse coding of the inputs.
        speedup: how many times fewer multiply-adds each layer shall do, from 1; its rank is the largest that holds it.
        ranks: ranks of single layers, as (path, rank) pairs; they go before `speedup`.
        shared: one basis for all slices of a layer, or (False) one for each input channel.
        restarts: random starts of "td", of which the best is taken.
        images: calibration inputs of "direct".
        sparsity: weight of the maps' absolute values in "direct".
        flatness: how far "direct" shrinks the singular values of its filters at each step, at the end.
        rounds: turns of "direct".
        skip: paths of layers to leave.
        epochs: passes over the data for fine-tuning; 0 leaves the factors as they are.
        learning_rate: of the fine-tuning; None takes the bench's.

    Needs: nothing; calibration inputs for "direct", labels and a task if `epochs` is not 0.

    Raises:
        SettingError: a setting is out of range, or names no layer.
        NeedError: there are no calibration inputs, or nothing to fine-tune on.

    Relations: scheme 1 of `LowRankExpansion` (13) is "comb", and can fit the mixture to responses.

    Example:
        >>> import karui
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 7))
        >>> model = karui.Model(net, example=(torch.zeros(1, 3, 16, 16),))
        >>> light = SeparableFilters(ranks=(("0", 10),)).apply(model, karui.Bench())
        >>> [tuple(one.shape) for one in light.module[0].filters], light.parameters
        ([(1, 10, 7), (1, 10, 7)], 636)
    """

    ladder: ClassVar[tuple[float, ...]] = (4.0,)

    method: str = "td"
    speedup: float = 2.0
    ranks: tuple[tuple[str, int], ...] = ()
    shared: bool = True
    restarts: int = 3
    images: int = 64
    sparsity: float = 0.3
    flatness: float = 0.1
    rounds: int = 60
    skip: tuple[str, ...] = ()
    epochs: int = 0
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple((path, rank) for path, rank in self.ranks))
        object.__setattr__(self, "skip", tuple(self.skip))
        require(self.method in METHODS, f'method is "{self.method}"; give "td", "comb" or "direct"')
        require(self.speedup >= 1, f"speedup is {self.speedup}; give a number from 1, for example 2")
        for path, rank in self.ranks:
            require(rank >= 1, f"ranks has {rank} for '{path}'; give a number from 1")
        told = 'method "direct" learns one basis for all channels; give shared=True'
        require(self.shared or self.method != "direct", told)
        for name in ("restarts", "images", "rounds"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}; give a number from 1")
        require(self.sparsity > 0, f"sparsity is {self.sparsity}; give a positive number, for example 0.3")
        within = 0 < self.flatness < 0.5
        require(within, f"flatness is {self.flatness}; give a share of a filter's length below 0.5, for example 0.1")
        require_fine_tuning(self.epochs, self.learning_rate)

    def needs(self) -> tuple[Need, ...]:
        """What these settings need: only sparse coding looks at inputs."""
        return ("calibration",) if self.method == "direct" else ()

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The model with its convolutions written as mixtures, fine-tuned if asked for."""
        assert model is not None  # noqa: S101  (the card's kind asks for one)
        require_data("separable_filters", model, bench, self.epochs)
        seen, left = self._scan(model)
        layers, told, shelf = {}, list(left), Shelf.of(self, model, bench)
        for one in tracked(seen, "find separable filters", shown=bench.progress):
            choice = self.choice_for(one)
            if choice.replaced:
                layers[one.path], choice = shelf.layer(one, partial(self._made, model, one, choice, bench))
            told.append(choice)
        wanted = {"method": self.method, "speedup": self.speedup, "shared": self.shared}
        light = carry_out(model, told, layers, "Separable filters", wanted)
        return fine_tune(light, bench, self.epochs, self.learning_rate, "fine-tune the network") if layers else light

    def _made(self, model: Model, one: Seen, choice: Choice, bench: Bench) -> tuple[nn.Module, Choice]:
        """The mixture, and the choice with its error."""
        found = separated(one.layer, self._solver(model, one, choice.ranks[0], bench), shared=self.shared)
        return found.build(), replace(choice, error=found.error)

    def _scan(self, model: Model) -> tuple[tuple[Seen, ...], tuple[Choice, ...]]:
        seen, left = scan(model, flat_objection, self.skip)
        require_ranks([path for path, _ in self.ranks], seen, left)
        return seen, left

    def choice_for(self, one: Seen) -> Choice:
        """The rank by the setting; the layer is left if that would not save anything."""
        own = dict(self.ranks).get(one.path)
        return choose_rank(one, Separable(shared=self.shared), self.speedup, own, fits_bias=False)

    def alone(self, model: Model, one: Seen, speedup: float) -> tuple[SeparableFilters, Choice]:
        """For a budget: the settings that do this to one layer and nothing else."""
        del model
        bare = replace(self, method="td", speedup=speedup, ranks=(), restarts=1, epochs=0)
        choice = bare.choice_for(one)
        return replace(bare, speedup=1.0, ranks=((one.path, *choice.ranks),) if choice.replaced else ()), choice

    def layer_for(self, one: Seen, choice: Choice, bench: Bench, evidence: Any) -> nn.Module:
        """For a budget: the mixture of separable filters."""
        del evidence
        rank, tries = choice.ranks[0], self.restarts
        solve = lambda bank: by_tensor(bank, rank, restarts=tries, seed=bench.seed)  # noqa: E731
        return separated(one.layer, solve, shared=self.shared).build()

    def _solver(
        self, model: Model, one: Seen, rank: int, bench: Bench
    ) -> Callable[[Float[Tensor, "bank *taps"]], Mixture]:
        if self.method == "comb":
            return lambda bank: by_nuclear_norm(bank, rank)
        if self.method == "td":
            return lambda bank: by_tensor(bank, rank, restarts=self.restarts, seed=bench.seed)
        filters = learn_filters(
            self._pictures(model, one, bench),
            rank,
            one.layer.kernel_size,
            sparsity=self.sparsity,
            flatness=self.flatness,
            rounds=self.rounds,
            seed=bench.seed,
        )
        return lambda bank: mixed(bank, rank_one(filters))

    def _pictures(self, model: Model, one: Seen, bench: Bench) -> Float[Tensor, "pictures *space"]:
        """Channels of the layer's inputs, at random, each as a picture; those that are constant tell nothing.

        A layer that is called on maps of several sizes is looked at on those of the size that shows most.
        """
        sizes: dict[torch.Size, list[Tensor]] = {}
        for response in self._responses(model, one, bench):
            sizes.setdefault(response.given.shape[2:], []).append(response.given.flatten(0, 1))
        maps = torch.cat(max(sizes.values(), key=lambda given: sum(part.numel() for part in given)))
        lively = maps[maps.flatten(1).double().std(dim=1) > 1e-6]
        maps = lively if len(lively) else maps
        order = torch.randperm(len(maps), generator=torch.Generator().manual_seed(bench.seed))
        return maps[order[:_MAPS]]

    def _responses(self, model: Model, one: Seen, bench: Bench) -> Any:
        return responses(model.module, model.module, one.path, bench.calibration(self.images), calls=one.calls)
